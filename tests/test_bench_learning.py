"""`make learning`: a search that is killed goes on to the same table; settings are chosen by dev rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_learning
from learning import report, search
from learning.contenders import CONTENDERS, GRID, Contender
from learning.search import Journal, Point, ranked

from jaguar.optimizers.names import METHODS

ONLY = ["FZOO"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    bench_learning.Bytes(folder, 5)
    return folder / "bytes-5.pt"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(search, "POINTS", 2)
    monkeypatch.setattr(bench_learning.Bytes, "rows", 4)
    monkeypatch.setattr(bench_learning.Bytes, "batch", 4)
    yield
    torch.set_num_threads(threads)


def main(folder: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / pretrained.name).write_bytes(pretrained.read_bytes())
    words = ["--passes", "40", "--seeds", "2", "--pretraining", "5", "--only", *ONLY, "--variants", "lora"]
    monkeypatch.setattr(sys, "argv", ["bench_learning.py", *words, "--out", str(folder), *more])
    return bench_learning.main()


def table(folder: Path) -> list[dict[str, Any]]:
    """All but what the clock says."""
    found: list[dict[str, Any]] = json.loads((folder / "bytes.json").read_text())["lora"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_search_that_is_killed_twice_ends_with_the_same_table(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(whole, pretrained, monkeypatch) == 0
    real, counted = search.run, [0]
    for limit in (2, 3):
        counted[0] = 0

        def dies(*args: Any, limit: int = limit) -> Any:
            counted[0] += 1
            if counted[0] > limit:
                raise Killed
            return real(*args)

        monkeypatch.setattr(bench_learning, "run", dies)
        with pytest.raises(Killed):
            main(parts, pretrained, monkeypatch)
        with (parts / "bytes.jsonl").open("ab") as file:
            file.write(b'{"point": {"work": "by')  # a line that was being written
    monkeypatch.setattr(bench_learning, "run", real)
    assert main(parts, pretrained, monkeypatch) == 0
    assert table(parts) == table(whole) and len(table(whole)) == 1
    lines = [[json.loads(line) for line in (f / "bytes.jsonl").read_text().splitlines()] for f in (whole, parts)]
    done = [[line["point"] for line in found if "point" in line] for found in lines]
    assert done[0] == done[1], "nothing is run twice, and nothing else"
    assert sum("about" in line for line in lines[1]) == 3  # what each part was made by
    for row in table(whole):
        assert row["contender"] == "FZOO, 8" and row["after"] is not None and row["se"] is not None
    assert (parts / "bytes-lora.png").stat().st_size > 10_000
    assert "| CPU seconds |" in (parts / "bytes.md").read_text()


def result(dev: float | None, held_out: float = 0.0) -> dict[str, Any]:
    return {"dev": dev, "held_out": held_out, "curve": [[0, 0, 1.0], [10, 1, held_out]], "seconds": 1.0, "passes": 10.0}


def searched(contender: Contender, dev: Any, held_out: Any = lambda lr: 0.0) -> tuple[list[Point], dict[str, Any]]:
    """The points of a search in which a setting has the loss `dev(lr)`."""
    done: dict[str, Any] = {}
    asked = []
    for _ in range(100):
        point = next(search.search(("bytes", "full"), contender, 400, [0, 1], done), None)
        if point is None:
            return asked, done
        asked.append(point)
        lr = point.setting["lr"]
        done[point.key] = {"point": vars(point), **result(dev(lr), held_out(lr))}
    raise AssertionError("the search does not end")


def test_the_best_setting_is_found_beyond_the_grid_and_by_dev_rows() -> None:
    contender = Contender("x", "zo-sgd", {"": 1.0})
    asked, done = searched(contender, lambda lr: abs(lr - 50.0), held_out=lambda lr: -lr)
    best = search.finals(("bytes", "full"), contender, 400, [0, 1], done)
    assert [point.seed for point in best] == [0, 1] and best[0].setting["lr"] == 31.6
    assert [point.budget for point in asked] == [100] * (len(GRID) + 2) + [400] * 3
    down, _ = searched(contender, lambda lr: lr)
    assert min(point.setting["lr"] for point in down) < 0.1 / 3.16**3 and len(down) == len(GRID) + search.MORE + 3
    middle, done = searched(contender, lambda lr: None if lr > 1 else abs(lr - 0.9))
    assert search.finals(("bytes", "full"), contender, 400, [0, 1], done)[0].setting["lr"] == 1.0
    assert len(middle) == len(GRID) + 3


def test_a_run_that_diverged_is_last() -> None:
    points = [Point("bytes", "full", "x", {"lr": lr}, 10, 0) for lr in (1.0, 0.5, 0.1)]
    done = {point.key: result(dev) for point, dev in zip(points, (None, 2.0, 1.0), strict=True)}
    assert [point.setting["lr"] for point in ranked(points, done)] == [0.1, 0.5, 1.0]


def test_passes_to_a_loss_lie_between_two_points() -> None:
    row = {"curves": [[[0, 0, 3.0], [10, 1, 2.0], [20, 2, 1.0]], [[0, 0, 3.0], [10, 1, 2.0], [20, 2, None]]]}
    assert report.to_reach(row, 2.5) == 5.0 and report.to_reach(row, 1.5) is None


def test_every_method_is_a_contender() -> None:
    assert {contender.method for contender in CONTENDERS} == set(METHODS)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)


def test_a_cut_journal_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    point = Point("bytes", "full", "x", {"lr": 1.0}, 10, 0)
    journal.add(point, result(1.0))
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"point"')
    again = Journal(tmp_path / "j")
    assert list(again.results) == [point.key]
    again.add(point, result(2.0))
    assert Journal(tmp_path / "j").results[point.key]["dev"] == 2.0

"""`make learning`: a search that is killed goes on to the same table; settings are chosen by dev rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from helpers import tiny
from jaguar.optimizers.names import METHODS
from learning import learning, report, search
from learning.contenders import CONTENDERS, Contender
from learning.peers import PEERS
from learning.reviews import Reviews
from learning.search import Journal, Plan, Point, ranked

BYTES = ["--pretraining", "5", "--only", "FZOO", "--variants", "full"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    learning.Bytes(folder, 5)
    return folder / "bytes-5.pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and beside it files of rows laid out as the demo's; every text is there once."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = list(dict(tiny.sentences(90, seed=3)).items())
    tiny.write_csv(folder / "movie_reviews_train.csv", rows[:60])
    tiny.write_csv(folder / "movie_reviews_test.csv", rows[60:])
    return tiny.causal_lm(folder / "model")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    for work, name, value in (
        (learning.Bytes, "points", 2),
        (learning.Bytes, "rows", 4),
        (learning.Bytes, "batch", 4),
        (Reviews, "batch", 4),
        (Reviews, "dev_rows", 8),
        (Reviews, "held_rows", 8),
    ):
        monkeypatch.setattr(work, name, value)
    yield
    torch.set_num_threads(threads)


def main(folder: Path, pretrained: Path, *more: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / pretrained.name).write_bytes(pretrained.read_bytes())
    return learning.main(["--passes", "40", "--seeds", "2", "--out", str(folder), *more])


def table(folder: Path, work: str = "bytes") -> list[dict[str, Any]]:
    """All but what the clock says."""
    (found,) = json.loads((folder / f"{work}.json").read_text()).values()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def lines(folder: Path, work: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{work}.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("work", ["bytes", "reviews"])
def test_a_search_that_is_killed_twice_ends_with_the_same_table(
    work: str, pretrained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = BYTES if work == "bytes" else ["--model", str(model), "--only", "FZOO", "--variants", "norms"]
    words = ["--work", work, *words]
    assert main(whole, pretrained, *words) == 0
    real, counted = search.run, [0]
    for limit in (2, 3):
        counted[0] = 0

        def dies(*args: Any, limit: int = limit) -> Any:
            counted[0] += 1
            if counted[0] > limit:
                raise Killed
            return real(*args)

        monkeypatch.setattr(learning, "run", dies)
        with pytest.raises(Killed):
            main(parts, pretrained, *words)
        with (parts / f"{work}.jsonl").open("ab") as file:
            file.write(b'{"point": {"work": "by')  # a line that was being written
    monkeypatch.setattr(learning, "run", real)
    assert main(parts, pretrained, *words) == 0
    assert table(parts, work) == table(whole, work) and len(table(whole, work)) == 1
    done = [[line["point"] for line in lines(f, work) if "point" in line] for f in (whole, parts)]
    assert done[0] == done[1], "nothing is run twice, and nothing else"
    assert sum("about" in line for line in lines(parts, work)) == 3  # what each part was made by
    for row in table(whole, work):
        assert row["contender"] == "FZOO, 8" and row["after"] is not None and row["se"] is not None
    assert next(parts.glob(f"{work}-*.png")).stat().st_size > 10_000
    assert "| CPU seconds |" in (parts / f"{work}.md").read_text()


def test_a_search_stops_where_the_next_run_would_end_too_late_and_goes_on(
    pretrained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, real = [0.0], search.run

    def a_minute(*args: Any) -> Any:
        now[0] += 60.0
        return real(*args)

    monkeypatch.setattr(learning, "monotonic", lambda: now[0])
    monkeypatch.setattr(learning, "run", a_minute)
    words = ["--work", "reviews", "--model", str(model), "--only", "ZO-SGD", "--variants", "norms"]
    for minutes, runs in (("0", 0), ("2.5", 2), ("2.5", 4)):
        assert main(tmp_path, pretrained, *words, "--minutes", minutes) == 0
        points = [line for line in lines(tmp_path, "reviews") if "point" in line] if runs else []
        assert len(points) == runs
    assert json.loads((tmp_path / "reviews.json").read_text()) == {"norms": []}  # no search has ended


def test_processes_side_by_side_end_with_the_same_table(
    pretrained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--work", "reviews", "--model", str(model), "--only", "FZOO", "mezo", "--variants", "norms"]
    assert main(tmp_path / "one", pretrained, *words) == 0
    shares: list[str] = []

    class Process:
        """A process that has ended before anybody looks."""

        def __init__(self, command: list[str], **_: Any) -> None:
            assert "--processes" not in command
            shares.append(command[-1])
            self.code = learning.main(command[3:])

        def poll(self) -> int:
            return self.code

        wait, terminate = poll, poll

    monkeypatch.setattr(learning, "subprocess", SimpleNamespace(Popen=Process, DEVNULL=None))
    assert main(tmp_path / "three", pretrained, *words, "--processes", "3", "--part", "1/1") == 0
    assert shares == ["1/3", "2/3", "3/3"]
    assert table(tmp_path / "one", "reviews") == table(tmp_path / "three", "reviews")


def test_a_failed_process_is_said(model: Path, tmp_path: Path, pretrained: Path, capfd: Any) -> None:
    words = ["--work", "reviews", "--model", str(model), "--only", "FZOO", "--variants", "norms", "--processes", "2"]
    (tmp_path / "reviews.md").mkdir()  # where the table belongs
    with pytest.raises(SystemExit, match="2 of 2 processes failed"):
        main(tmp_path, pretrained, *words, "--minutes", "0.001")


def test_shares_of_the_work_are_all_of_it(model: Path, tmp_path: Path) -> None:
    found = []
    for part in ("1/3", "2/3", "3/3"):
        args = learning.parsed(["--work", "reviews", "--model", str(model), "--part", part, "--all"])
        args.out = tmp_path
        found += learning.Search(Reviews("reviews", model), args, None).own
    names = [(plan.where[1], contender.name) for plan, contender in found]
    assert len(set(names)) == len(names)
    assert {name for variant, name in names if variant == "full"} >= {c.name for c in CONTENDERS}


def test_rows_of_the_three_kinds_are_different(model: Path) -> None:
    work = Reviews("reviews", model)
    texts = {name: {example.choices[0].ids for example in part} for name, part in work.rows.items()}
    assert [len(texts[name]) for name in ("dev", "held_out")] == [8, 8] and len(texts["train"]) == 52
    assert len(set.union(*texts.values())) == 68
    seen = [next(losses) for losses in [work.losses(work.network("norms"), 0)] for _ in range(13)]
    assert len({float(closure().detach()) for closure in seen}) > 10


@pytest.mark.parametrize("variant", Reviews.variants)
def test_the_loss_is_that_of_the_whole_forward_of_rows_alone(
    variant: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    work = Reviews("reviews", model)
    net, plain = work.network(variant), []
    words = [choice.targets[0] for choice in work.rows["dev"][0].choices]
    with torch.no_grad():
        for example in work.rows["dev"]:
            logits = net(input_ids=torch.tensor([example.choices[0].ids])).logits[0, -1, words]
            plain.append(float(logits.logsumexp(0) - logits[example.label]))
    assert work.held_out(net, dev=True) == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == {"norms": 5 * 32, "lora": 2 * 8 * (64 + 48), "full": net.num_parameters()}[variant]


def test_a_peer_that_is_not_installed_says_why(
    pretrained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {peer.method for peer in PEERS}:
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--work", "reviews", "--model", str(model), "--variants", "norms"]
    assert main(tmp_path, pretrained, *words, "--only", "mezo", "Muon") == 0
    text = (tmp_path / "reviews.md").read_text()
    assert "| mezo | | cannot run: ModuleNotFoundError: import of mezo halted" in text
    assert "| JAGUAR Muon, one-sided, 4 | | cannot run: weights of normalisation layers are vectors" in text


def test_mezo_is_called_as_its_package_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def update(
        net: Any, inputs: Any, loss_function: Any, epsilon: float, learning_rate: float, random_seed: int
    ) -> None:
        called.append((epsilon, learning_rate, random_seed))
        with torch.no_grad():
            assert float(loss_function(net, inputs)) == float(loss_function(net, inputs)) > 0

    monkeypatch.setitem(sys.modules, "mezo", SimpleNamespace(update=update))
    work, mezo = Reviews("reviews", model), next(peer for peer in PEERS if peer.name == "mezo")
    found = search.run(work, mezo, Point("reviews", "norms", "mezo", {"lr": 0.4, "tau": 0.01}, 8, 0))
    assert [(tau, round(lr, 6)) for tau, lr, _ in called] == [(0.01, 0.4), (0.01, 0.3), (0.01, 0.2), (0.01, 0.1)]
    assert len({seed for *_, seed in called}) == 4 and found["passes"] == 8


@pytest.mark.parametrize("name", ["Forward-Grad", "FO-SGD", "ZO-SGD-Cons"])
def test_a_run_uses_its_forward_passes_whatever_a_step_costs(name: str, model: Path) -> None:
    used(Reviews("reviews", model), "norms", next(c for c in CONTENDERS if c.name == name))


@pytest.mark.slow
@pytest.mark.parametrize("variant", Reviews.variants)
def test_every_contender_runs_where_it_is_not_refused(variant: str, model: Path) -> None:
    work = Reviews("reviews", model)
    for contender in learning.ALL:
        if not contender.refusal(f"reviews {variant}"):
            used(work, variant, contender)


def used(work: Reviews, variant: str, contender: Contender) -> None:
    setting = contender.settings(f"reviews {variant}", [1.0])[0]
    result = search.run(work, contender, Point("reviews", variant, contender.name, setting, 24, 0))
    assert 18 <= result["passes"] <= 30 and result["dev"] is not None


def test_differences_are_paired_by_seed() -> None:
    mean, se = report.paired([1.0, 2.0, 4.0], [0.0, 2.0, 1.0])
    assert mean == pytest.approx(4 / 3) and se == pytest.approx((7 / 3) ** 0.5 / 3**0.5)
    assert report.paired([1.0], [0.5]) == (0.5, None) and report.paired([None, 1.0], [1.0, 1.0]) == (None, None)
    curves = [[[0, 0, 3.0], [10, 1, 2.0]]]
    base = {"contender": "b", "losses": [2.5, 2.5], "after": 2.5, "curves": curves, "passes": 10.0}
    rows = [base, base | {"contender": "x", "losses": [2.0, 2.5]}, {"contender": "y", "refusal": "no"}]
    report.compare(rows, "b")
    assert (rows[1]["difference"], rows[1]["difference_se"], rows[1]["share"]) == (-0.25, 0.25, 0.5)
    assert "difference" not in rows[2]


PLAN = Plan(("bytes", "full"), 400, [0, 1])


def result(dev: float | None, held_out: float = 0.0) -> dict[str, Any]:
    return {"dev": dev, "held_out": held_out, "curve": [[0, 0, 1.0], [10, 1, held_out]], "seconds": 1.0, "passes": 10.0}


def searched(contender: Contender, dev: Any, held_out: Any = lambda lr: 0.0) -> tuple[list[Point], dict[str, Any]]:
    """The points of a search in which a setting has the loss `dev(lr)`."""
    done: dict[str, Any] = {}
    asked = []
    for _ in range(100):
        point = next(PLAN.missing(contender, done), None)
        if point is None:
            return asked, done
        asked.append(point)
        lr = point.setting["lr"]
        done[point.key] = {"point": vars(point), **result(dev(lr), held_out(lr))}
    raise AssertionError("the search does not end")


def test_the_best_setting_is_found_beyond_the_grid_and_by_dev_rows() -> None:
    contender = Contender("x", "zo-sgd", {"": 1.0})
    asked, done = searched(contender, lambda lr: abs(lr - 50.0), held_out=lambda lr: -lr)
    best = PLAN.finals(contender, done)
    assert [point.seed for point in best] == [0, 1] and best[0].setting["lr"] == 31.6
    assert [point.budget for point in asked] == [100] * (len(PLAN.grid) + 2) + [400] * 3
    down, _ = searched(contender, lambda lr: lr)
    assert min(point.setting["lr"] for point in down) < 0.1 / 3.16**3 and len(down) == len(PLAN.grid) + search.MORE + 3
    middle, done = searched(contender, lambda lr: None if lr > 1 else abs(lr - 0.9))
    assert PLAN.finals(contender, done)[0].setting["lr"] == 1.0
    assert len(middle) == len(PLAN.grid) + 3


def test_a_method_that_chooses_its_steps_is_not_searched() -> None:
    contender, done = Contender("x", "zo-sgd", {}, {"lr": "auto"}), dict[str, Any]()
    assert contender.by_row and PLAN.expected(contender, done) == (0, 2)
    while point := next(PLAN.missing(contender, done), None):
        done[point.key] = {"point": vars(point), **result(1.0)}
    assert PLAN.finals(contender, done) == [Point("bytes", "full", "x", {}, 400, seed) for seed in (0, 1)]
    assert len(done) == 2


def test_rows_have_their_losses(model: Path, pretrained: Path) -> None:
    for work in (Reviews("reviews", model), learning.Bytes(pretrained.parent, 5)):
        net = work.network("full")
        whole, rows = (next(work.losses(net, 0, by_row))().detach() for by_row in (False, True))
        assert rows.shape == (4,) and float(rows.mean()) == pytest.approx(float(whole), rel=1e-4)


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

"""`make ablation`: every cell is there, killed or not; what the watch counts is what happened."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import jaguar
from learning import ablation, momentum, search
from learning.momentum import Watch, cell
from learning.search import Point, finals, run
from learning.works import Bytes


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    Bytes(folder, 5)
    return folder / "bytes-5.pt"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(Bytes, "rows", 4)
    for work in (Bytes, ablation.FourRows):
        monkeypatch.setattr(work, "batch", 1)
    monkeypatch.setattr(momentum, "_MEASURED", 2)
    yield
    torch.set_num_threads(threads)


def main(folder: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    folder.mkdir(exist_ok=True)
    (folder / pretrained.name).write_bytes(pretrained.read_bytes())
    words = ["--passes", "40", "--seeds", "2", "--pretraining", "5", "--coordinates", "1.0", "--betas", "0", "0.9"]
    words += ["--only", "SignSGD", "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["bench ablation", *words])
    return ablation.main()


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_every_cell_is_there_after_a_kill_too(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MORE", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(whole, pretrained, monkeypatch) == 0
    real, runs = ablation.run, iter(range(7))

    def dies(*args: Any, **more: Any) -> Any:
        if next(runs, None) is None:
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(ablation, "run", dies)
    with pytest.raises(Killed):
        main(parts, pretrained, monkeypatch)
    monkeypatch.setattr(ablation, "run", real)
    assert main(parts, pretrained, monkeypatch) == 0
    tables = [json.loads((folder / "ablation.json").read_text())["rows"] for folder in (whole, parts)]
    assert tables[0] == tables[1]
    found = [(row["update"], row["coordinates"], row["beta"]) for row in tables[0]]
    assert found == [(update, "1.0", beta) for update in ("sampled", "all") for beta in (0.0, 0.9)]
    for row in tables[0]:
        assert row["after"] is not None and row["se"] is not None
        assert row["entries"] == pytest.approx(20)
        assert (row["flips"] > 0.0) == (row["beta"] > 0.0) and (row["beta"] or row["against"] == 0.0)
    lines = [json.loads(line) for line in (parts / "ablation.jsonl").read_text().splitlines()]
    keys = [Point(**line["point"]).key for line in lines if "point" in line]
    assert len(set(keys)) == len(keys), "nothing is run twice"
    text = (parts / "ablation.md").read_text()
    assert "| JAGUAR SignSGD | sampled | 1.0 | +" in text or "| JAGUAR SignSGD | sampled | 1.0 | -" in text
    assert (parts / "ablation.png").stat().st_size > 10_000


def test_a_watched_run_has_the_same_bits_and_all_coordinates_need_no_update(pretrained: Path) -> None:
    work = Bytes(pretrained.parent, 5)
    for method in momentum.METHODS:
        contender = cell(method, "all", 1.0, 0.9)
        moves_all = replace(contender, options=dict(contender.options) | {"update": "all"})
        assert contender.options["update"] == "sampled"
        point = Point("bytes", "full", contender.name, {"lr": 1e-3, "tau": 1e-3}, 8, 0)
        watched = replace(contender, watch=Watch(work))
        curves = [
            [loss for *_, loss in run(work, one, point, points=2)["curve"]] for one in (contender, moves_all, watched)
        ]
        assert curves[0] == curves[1] == curves[2] and curves[0][0] != curves[0][-1]


def test_a_watch_counts_entries_and_flips(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an optimizer without momentum, whose buffer is what comes in; with lr 0 both measure the same."""
    monkeypatch.setattr(momentum, "_MEASURED", 5)
    work = Bytes(pretrained.parent, 5)
    nets = [work.network("full") for _ in range(2)]
    ours, plain = (
        jaguar.JaguarSignSGD(net.named_parameters(), lr=0.0, beta=beta, coordinates=1.0)
        for net, beta in zip(nets, (0.9, 0.0), strict=True)
    )
    watch = Watch(work)
    watch.attach(ours, nets[0], 5)
    flipped = total = 0
    for first, second in zip(work.losses(nets[0], 0), work.losses(nets[1], 0), strict=True):
        ours.step(first)
        plain.step(second)
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            flipped += int((ours.state[p]["momentum"].sign() != plain.state[q]["momentum"].sign()).sum())
            total += p.numel()
        if ours.steps_done == 5:
            break
    assert flipped > 0.01 * total
    assert watch.summary() == {"entries": 5.0, "flips": flipped / total, "moved": 0.0, "cosine": None}


def test_a_watch_sees_how_far_downhill_a_step_goes(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows of the step itself, the cosine of +-e and the gradient is |rho| / (|g| sqrt(d)), however long."""
    seed = 3
    monkeypatch.setattr(momentum, "_ROWS", seed)
    work = Bytes(pretrained.parent, 5)
    net = work.network("full")
    optimizer = jaguar.JaguarSignSGD(net.named_parameters(), lr=1e-2, coordinates=1.0)
    watch = Watch(work)
    watch.attach(optimizer, net, 1)
    closure = next(work.losses(net, seed))
    gradients = torch.autograd.grad(closure(), list(net.parameters()))
    optimizer.step(closure)
    above, below = optimizer.last_record.losses
    length = sum(float(g.square().sum()) for g in gradients) ** 0.5
    expected = abs(above - below) / 2e-3 / length / sum(g.numel() for g in gradients) ** 0.5
    assert expected > 0 and watch.summary()["cosine"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("longer", [2e-5, 5e-4])
def test_with_all_passes_the_search_goes_on(longer: float) -> None:
    contender, done = cell("JAGUAR SignSGD", "all", 0.01, 0.9), dict[str, Any]()
    best, passes = {100: 1e-4, 400: longer}, list[int]()
    while point := next(momentum.search(("bytes", "full"), contender, 400, [0, 1], done), None):
        passes.append(point.budget)
        far = abs(math.log(point.setting["lr"] / best[point.budget]))
        done[point.key] = {"point": vars(point), "dev": far}
    found = finals(("bytes", "full"), contender, 400, [0, 1], done, momentum.search)
    assert [point.seed for point in found] == [0, 1] and passes == sorted(passes)
    assert found[0].setting["lr"] == pytest.approx(longer, rel=0.33)

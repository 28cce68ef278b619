"""Reports for people: the picture of a run, the table, the lines of a run that skips steps."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from helpers import tiny
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli.finetune.report import Points, StepBar, curves, score_table
from jaguar.scoring import Scorer


def _figure(steps):
    losses = [0.7 - 0.1 * (i % 3) for i in range(steps)]
    held_out = Points("40 held-out rows", [0, steps], [0.9, 0.1], [0.1, 0.9], [0.3, 0.3])
    way = range(max(1, steps // 4), steps + 1, max(1, steps // 4))
    dev = Points("dev rows", [*way], [0.5 for _ in way], [0.9 for _ in way])
    figure = curves(title="a title", losses=losses, points=[held_out, dev])
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 20, 26, 400])
def test_ticks_are_whole_steps(steps):
    for axes in _figure(steps).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2 and all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("steps", [1, 5, 20, 400])
def test_legends_lie_beside_the_axes_and_inside_the_picture(steps):
    figure = _figure(steps)
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 <= axes.get_window_extent().y0  # where no point and no error bar can be
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and figure.bbox.y0 <= legend.y0


@pytest.mark.parametrize(("steps", "label"), [(1, None), (2, "mean of 2 batches"), (20, "mean of 20 batches")])
def test_the_mean_is_of_as_many_batches_as_it_says(steps, label):
    means = [line.get_label() for line in _figure(steps).axes[0].lines if str(line.get_label()).startswith("mean")]
    assert means == ([label] if label else [])
    assert [line.get_label() for line in _figure(26).axes[0].lines][1] == "mean of 25 batches"


def test_skipped_steps_are_in_the_lines_and_in_the_table():
    out = io.StringIO()
    console = Console(file=out, width=200)
    with StepBar(console, 4, 0, 1) as bar:
        bar.update(1, [0.5])
        bar.update(2, [0.5, math.nan], 1)
    console.print(score_table("t", {"zero-shot": {"accuracy": 0.5}, "tuned": {"accuracy": 0.6}}, {}, "1 of 2"))
    first, second, *table = out.getvalue().splitlines()
    assert "skipped" not in first and second.endswith("  1 skipped") and "loss 0.5000" in second
    assert any("skipped steps" in row and "1 of 2" in row for row in table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tiny.causal_lm(folder / "lm")
    tiny.write_csv(folder / "train.csv", tiny.sentences(48, seed=1))
    tiny.write_csv(folder / "test.csv", tiny.sentences(12, seed=2))
    return folder


def _line(folder, out, *more):
    files = ["--train_file", str(folder / "train.csv"), "--test_file", str(folder / "test.csv")]
    line = ["finetune", "--model", str(folder / "lm"), "--output_dir", str(out), "--use_cpu", *files]
    line += ["--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--coordinates", "0.5"]
    line += ["--learning_rate", "1e-4"]  # else the first step, which looks at the curvature, would evaluate more often
    return [*line, "--template", tiny.TEMPLATE, "--verbalizers", " negative", " positive", *more]


def _broken(monkeypatch, is_bad):
    """Losses of training batches are not finite where `is_bad(number of the evaluation)` says so."""
    real, calls = Scorer.loss, []

    def loss(self, *args, **others):
        total, weight = real(self, *args, **others)
        calls.append(total)
        return total * (math.nan if is_bad(len(calls)) else 1.0), weight

    monkeypatch.setattr(Scorer, "loss", loss)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_skips_steps_says_so_to_the_end(folder, tmp_path, monkeypatch, capsys):
    _broken(monkeypatch, lambda call: call > 2)  # all but the first step
    assert cli.main(_line(folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [("skipped" in line, f"{i} skipped" in line) for i, line in enumerate(lines)] == [(False, False)] + 5 * [
        (True, True)
    ]
    assert "5 of 6" in next(line for line in printed.splitlines() if "skipped steps" in line)
    assert "warning: 5 of 6 steps were skipped, because their loss was not finite" in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["skipped_steps"] == 5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("more", [(), ("--num_dev", "8", "--eval_steps", "3")], ids=["plain", "best"])
def test_a_run_that_never_took_a_step_fails_and_saves_no_model(folder, tmp_path, monkeypatch, capsys, more):
    out = tmp_path / "out"
    assert cli.main(_line(folder, out)) == 0
    good = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".jaguar"}
    capsys.readouterr()
    _broken(monkeypatch, lambda call: True)
    error = refused(capsys, *_line(folder, out, "--overwrite_output_dir", *more), code=1)
    assert "jaguar finetune: error: no step was taken: " in error
    left = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".jaguar"}
    assert left == good

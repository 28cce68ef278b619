"""Savings claimed for lean scoring, on OPT-1.3B's shape, and the allocation trace that shows them."""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from helpers import tiny
from jaguar.scoring import naive

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from scoring import scoring
from scoring.allocations import Allocations
from scoring.scoring import LEAN, NAIVE, SENTENCES, allocated, opt_1_3b, prompts, scorer_of, tokens, trained

N = 1000


@pytest.fixture(params=["real", "fake"])
def mode(request):
    return nullcontext() if request.param == "real" else FakeTensorMode()


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_two_tensors_at_once_and_one_after_another(mode):
    with mode, Allocations() as trace:
        x = torch.empty(N, dtype=torch.uint8)
        assert (trace.live, trace.peak) == (N, N)
        y = x + 1
        del x
        assert (trace.live, trace.peak) == (N, 2 * N)
        for _ in range(5):
            y = y + 1
        assert (trace.live, trace.peak, trace.at) == (N, 2 * N, "aten.add.Tensor")
        del y
    assert trace.live == 0


def test_bytes_are_those_of_the_dtype_and_the_whole_storage(mode):
    with mode, Allocations() as trace:
        half = torch.ones(N, dtype=torch.float16)
        wide = half.double()
        assert trace.live == 10 * N
        del wide
        row = half[3]
        del half
        assert trace.live == 2 * N  # a single element keeps all of it
        del row
    assert trace.live == 0


def test_views_and_in_place_operators_allocate_nothing(mode):
    with mode, Allocations() as trace:
        x = torch.zeros(N, 4, dtype=torch.uint8)
        views = [x.t(), x.view(-1), x[3:], x.expand(7, N, 4), *x.split(N // 2)]
        x.add_(1).mul_(2)
        views[2].zero_()
        torch.add(x, x, out=x)
        del views
    assert trace.peak == trace.live == 4 * N


def test_what_was_there_before_is_not_counted(mode):
    with mode:
        weight = torch.zeros(N, dtype=torch.uint8)
        with Allocations() as trace:
            view = weight.view(10, -1)[2:]
            view.add_(1)
            weight.detach()
            assert trace.peak == 0
            more = view + weight[0]
            assert trace.peak == more.numel() == N - N // 5


def test_a_result_that_grows_its_storage():
    with Allocations() as trace:
        x = torch.empty(0, dtype=torch.uint8)
        torch.add(torch.ones((), dtype=torch.uint8), torch.ones(N, dtype=torch.uint8), out=x)
        assert trace.live == N
        del x
    assert trace.live == 0


@torch.no_grad()
def test_the_trace_has_the_bytes_that_the_allocator_records():
    shape = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "vocab_size": 2000}
    model = tiny.architecture("opt", **shape)
    mode = FakeTensorMode()
    with mode:
        fake = type(model)(model.config).eval()
    batch = prompts(SENTENCES, trained(SENTENCES))
    for method in (NAIVE, *LEAN):
        scorer = scorer_of(model, LEAN[0] if method == NAIVE else method)
        inputs = scorer.collate(batch)
        score = partial(naive.scores, model, batch, "causal", 1) if method == NAIVE else partial(scorer.scores, inputs)
        with Allocations() as real:
            score()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            score()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        held = 0 if method == NAIVE else sum(value.nbytes for value in inputs.values())
        assert live == 0 and peak > 1e6
        # Attention's own workspace and tensors made of lists are all that the trace does not see.
        assert 0.95 * peak <= real.peak <= peak
        assert 0.95 * (peak + held) <= allocated(fake, mode, method, batch).peak <= 1.05 * (peak + held)


# -- the claim ---------------------------------------------------------------------------------------------------------

# Padded, lean scoring has half of the rows and no more columns: at most 1/2 for any prompts of one-token options.
# Packed, 16 prompts of mean length m are 16 m tokens of 32 L, L the multiple of eight above the longest: at most 1/4
# wherever m <= L / 2. GLUE's training rows are phrases of one to fifty words and satisfy it nearly always; batches of
# whole sentences alone, as in its validation file, do so about every second time (bench/results/scoring.md).


@pytest.fixture(scope="module")
def batch():
    return prompts(SENTENCES, trained(SENTENCES))


@pytest.fixture(scope="module")
def half():
    return opt_1_3b(torch.float16)


def test_the_sentences_are_as_long_as_those_of_sst2():
    words = [len(sentence.split()) for sentence in SENTENCES]
    assert words == [7, 7, 12, 8, 10, 10, 25, 2, 6, 12, 4, 17, 7, 6, 7, 3]  # of the first rows of GLUE's train.tsv
    assert len(set(SENTENCES)) == 16 and round(statistics.mean(words), 1) == 8.9


def test_the_prompts_are_those_of_the_benchmark(batch):
    tokenizer = trained(SENTENCES)
    for sentence, example in zip(SENTENCES, batch, strict=True):
        ids = [[*c.ids, c.targets[-1]] for c in example.choices]
        assert [tokenizer.decode(i) for i in ids] == [f"<s>{sentence} It was {w}" for w in ("terrible", "great")]
        assert [len(c.targets) for c in example.choices] == [1, 1]  # as with OPT's tokenizer


def test_lean_scoring_processes_half_of_the_tokens_and_packed_a_quarter(half, batch):
    model, _ = half
    lengths = [len(c.ids) + 1 for example in batch for c in example.choices]
    whole = tokens(model, NAIVE, batch)
    assert whole == 32 * 8 * -(-max(lengths) // 8)
    assert tokens(model, "lean, padded", batch) == 16 * (max(lengths) - 1) <= whole / 2
    # Every prompt once; what all of them begin with is there once, too.
    assert tokens(model, "lean, packed", batch) <= sum(len(e.choices[0].ids) for e in batch) <= whole / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lean_scoring_needs_a_fifth_of_the_memory(half, batch, dtype):
    model, mode = half if dtype == torch.float16 else opt_1_3b(dtype)
    whole = allocated(model, mode, NAIVE, batch)
    # At the least the cache of all layers, and the logits of all tokens.
    assert whole.peak >= tokens(model, NAIVE, batch) * (2 * 24 * 2048 + 50272) * dtype.itemsize
    for method in LEAN:
        lean = allocated(model, mode, method, batch)
        assert 0 < lean.peak <= whole.peak / 5, f"{method}: {lean.peak / whole.peak:.3f} at {lean.at}"


@pytest.mark.parametrize("method", LEAN)
def test_lean_scoring_keeps_nothing_of_a_layer_and_no_logits_but_the_last(half, batch, method):
    wide = allocated(*half, method, batch).peak
    assert allocated(*opt_1_3b(torch.float16, num_hidden_layers=2), method, batch).peak == wide
    assert allocated(*opt_1_3b(torch.float16, num_hidden_layers=2, vocab_size=5000), method, batch).peak == wide


# -- the program -------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_where_nothing_was_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "CACHE", tmp_path)
    monkeypatch.setitem(scoring.SHAPE, "num_hidden_layers", 1)
    assert scoring.main(["--batches", "2", "--repeats", "0", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scoring.json").read_text())
    assert [row["within"] for row in found["tokens"]] == [1.0, 1.0]
    assert len(found["memory"]) == 16 and not found["time"]
    assert "the sixteen of `python bench scoring`" in capsys.readouterr().out
    text = (tmp_path / "scoring.md").read_text()
    assert text.count("\n## ") == 2 and all(f"| {method} |" in text for method in (NAIVE, *LEAN))


def test_equal_scores_are_asserted_before_anything_is_timed(batch, monkeypatch):
    model = tiny.architecture("opt", vocab_size=4000)
    rows = scoring.timed("tiny", model, batch, 1)
    assert [(row["method"], row["tokens"]) for row in rows] == [(m, tokens(model, m, batch)) for m in (NAIVE, *LEAN)]
    assert all(row["difference"] < 1e-5 and row["median_s"] > 0 for row in rows) and rows[0]["ratio"] == 1
    right, calls = scoring.Scorer.scores, []

    def wrong(self, inputs):
        calls.append(1)
        return right(self, inputs) + 2e-4

    monkeypatch.setattr(scoring.Scorer, "scores", wrong)
    with pytest.raises(AssertionError, match=r"lean, padded differs from naive by 0\.0002"):
        scoring.timed("tiny", model, batch, 1)
    assert len(calls) == 1


def test_unusable_sentences_are_named(tmp_path, capsys):
    short = tmp_path / "short.csv"
    short.write_text("text\none\n")
    assert scoring.main(["--sentences", str(short)]) == 2
    assert scoring.main(["--sentences", str(short), "--column", "sentence"]) == 2
    said = capsys.readouterr().err
    assert "short.csv has less than 16 rows" in said and "no column 'sentence'" in said

"""Lean scoring equals naive scoring: on every architecture, task, batch size and layout."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BloomConfig, BloomForCausalLM

from helpers import tiny
from helpers.scorers import CLOSE, TASKS, examples, kind_of, scorer_of
from jaguar.scoring import Scorer, Scores, evaluate, naive, paired_se, roc_auc
from jaguar.scoring.layout import chains, masked, packed_masked, packed_trees, trees
from jaguar.tasks import Choice, Encoder, Example, Question

MODELS = list(tiny.ARCHITECTURES)


def odd_options(name):
    """Options of one, two and many tokens, different numbers of them, one the beginning of another."""
    options = [" film", " film music", " the very old railway station"]
    asked = [Question("the road leads to", tuple(options[: 2 + i % 2]), i % 2, f"row {i}") for i in range(5)]
    return Encoder(tiny.tokenizer_of(name), kind_of(name), 128)(asked)


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_lean_equals_naive(name, task, side):
    model, pad = tiny.architecture(name), tiny.tokenizer_of(name).pad_token_id
    data = examples(task, name)
    lengths = {len(c.targets) for e in data for c in e.choices}
    assert task == "sst2" or len(lengths) > 1  # options of unequal length are among them
    with torch.no_grad():
        for size in (1, 3, 16):
            batch = data[:size]
            expected = torch.stack(naive.scores(model, batch, kind_of(name), pad, side))
            loss = naive.loss(model, batch, kind_of(name), pad, TASKS[task].objective, side)
            for layout in ("padded", "packed", "auto"):
                scorer = scorer_of(model, name, task, layout=layout)
                found = scorer.scores(scorer.collate(batch))
                torch.testing.assert_close(found, expected, **CLOSE)
                assert torch.equal(found.argmax(1), expected.argmax(1))
                total, weight = scorer.loss(scorer.collate(batch, answers_only=scorer.objective == "answer"))
                torch.testing.assert_close(total / weight, loss, **CLOSE)


@pytest.mark.parametrize("own_masks", [True, False], ids=["trees", "chains"])
@pytest.mark.parametrize("name", MODELS)
def test_options_of_any_length_and_number(name, own_masks):
    model, data = tiny.architecture(name), odd_options(name)
    scorer = scorer_of(model, name)
    scorer.readings = [reading for reading in scorer.readings if own_masks or not reading.own_masks]
    with torch.no_grad():
        expected = naive.scores(model, data, kind_of(name), 1)
        found = scorer.scores(scorer.collate(data))
    for one, other, example in zip(found, expected, data, strict=True):
        torch.testing.assert_close(one[: len(other)], other, **CLOSE)
        assert (one[len(example.choices) :] == -math.inf).all()


@pytest.mark.parametrize("name", ["opt", "roberta"])
def test_eager_attention_takes_the_same_masks(name):
    model = tiny.architecture(name, attn_implementation="eager")
    data = odd_options(name)
    scorer = scorer_of(model, name, layout="packed")
    assert scorer.reading.own_masks
    with torch.no_grad():
        found = scorer.scores(scorer.collate(data))
        for one, other in zip(found, naive.scores(model, data, kind_of(name), 1), strict=True):
            torch.testing.assert_close(one[: len(other)], other, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_fp32_unless_the_model_is_fp64(dtype):
    model = tiny.architecture("opt").to(dtype)  # (rotary positions are fp32 in any model)
    data = examples("copa", "opt", 4)
    scorer = scorer_of(model, "opt", "copa")
    with torch.no_grad():
        found = scorer.scores(scorer.collate(data))
        exact = torch.stack(naive.scores(tiny.architecture("opt").double(), data, "causal", 1))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # bf16: 8 bits in 2 layers of scaled weights.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.1)


def test_evaluation_is_that_of_one_row_at_a_time():
    model = tiny.architecture("opt")
    data = examples("copa", "opt")
    scorer = scorer_of(model, "opt", "copa")
    alone = torch.stack([naive.scores(model, [e], "causal", 1, multiple=1)[0] for e in data]).detach()
    seen = []
    for batch_size in (1, 5, 16):
        scores = evaluate(scorer, data, batch_size, seen.append)
        torch.testing.assert_close(scores.logits, alone, **CLOSE)
        assert scores.labels.tolist() == [e.label for e in data]
        right = -alone.gather(1, scores.labels[:, None])[:, 0]
        torch.testing.assert_close(scores.losses, right, **CLOSE)
    assert sum(seen) == 48 and scorer.forward_passes == 16 + 4 + 1


def test_evaluation_leaves_the_models_mode():
    model = tiny.architecture("opt").train()
    evaluate(scorer_of(model, "opt"), examples("sst2", "opt", 2), 2)
    assert model.training


# -- what is not computed ----------------------------------------------------------------------------------------------


def test_only_option_positions_reach_the_head_and_no_cache_is_kept():
    model, data = tiny.architecture("llama"), examples("sst2", "llama")
    scorer = scorer_of(model, "llama")
    scorer.verify(data)
    seen, outputs = [], []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.register_forward_hook(lambda module, args, out: outputs.append(out))
    scorer.scores(scorer.collate(data))
    assert seen == [(1, 16, 400)] and outputs[0].past_key_values is None
    assert not model.lm_head._forward_pre_hooks  # the model is as it was


def test_single_token_options_share_a_row_and_long_ones_their_prompt():
    scorer = scorer_of(tiny.architecture("opt"), "opt", layout="padded")
    data = examples("sst2", "opt")
    assert scorer.collate(data)["input_ids"].shape == (16, max(len(c.ids) for e in data for c in e.choices))
    (example,) = examples("copa", "opt", 1)
    one, two = example.choices
    shared = next(i for i, (a, b) in enumerate(zip(one.ids, two.ids, strict=False)) if a != b)
    assert shared >= one.positions[0]  # the prompt, at least
    assert scorer.collate([example])["input_ids"].shape == (1, len(one.ids) + len(two.ids) - shared)


def choice(ids, count):
    """The last `count` + 1 tokens ask for `count` others."""
    return Choice(tuple(ids[:-1]), tuple(range(len(ids) - 1 - count, len(ids) - 1)), tuple(ids[-count:]))


def test_layouts_count_what_they_promise():
    # Two prompts of 3 and 5 tokens that begin alike, each with options of 1 and 3 tokens.
    groups = [
        [choice([9, 1, 2, 7], 1), choice([9, 1, 2, 7, 5, 6], 3)],
        [choice([9, 1, 3, 4, 5, 8], 1), choice([9, 1, 3, 4, 5, 6, 2, 2], 3)],
    ]
    assert [line.ids for line in trees(groups).lines] == [[9, 1, 2, 7, 5], [9, 1, 3, 4, 5, 6, 2]]
    assert [line.ids for line in chains(groups).lines] == [[9, 1, 2, 7, 5], [9, 1, 3, 4, 5, 6, 2]]
    (line,) = packed_trees(groups).lines
    assert line.ids == [9, 1, 2, 7, 5, 3, 4, 5, 6, 2] and line.depths == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert packed_trees(groups).places[2] == [(0, 7)]  # the second prompt's last token
    seen = line.visible(causal=True)
    assert seen[5].nonzero().flatten().tolist() == [0, 1, 5]  # not the first prompt's own tokens
    forked = [[choice([1, 2, 3, 4], 2), choice([1, 2, 5, 6], 2)]]
    assert trees(forked).lines[0].ids == [1, 2, 3, 5] and trees(forked).lines[0].branches
    assert [line.ids for line in chains(forked).lines] == [[1, 2, 3], [1, 2, 5]]
    holes = [[Choice((1, 0, 2), (1,), (5,)), Choice((1, 0, 2), (1,), (6,)), Choice((1, 0, 0, 2), (1, 2), (7, 8))]]
    assert len(masked(holes).lines) == 2 and masked(holes).places == [[(0, 1)], [(0, 1)], [(1, 1), (1, 2)]]
    (line,) = packed_masked(holes).lines
    assert line.links == [0, 0, 0, 1, 1, 1, 1] and line.visible(causal=False)[0].tolist() == [True] * 3 + [False] * 4


def test_auto_takes_the_cheaper_layout():
    scorer = scorer_of(tiny.architecture("opt"), "opt")
    short, long = [Example((choice(range(2, 2 + n), 1),), 0) for n in (5, 120)]
    assert scorer.collate([short] * 15 + [long])["input_ids"].shape[0] == 1
    different = [Example((choice(range(2 + i, 62 + i), 1),), 0) for i in range(8)]
    assert scorer.collate(different)["input_ids"].shape == (8, 59)  # no padding to save, and attention to lose


# -- what a model may not take -----------------------------------------------------------------------------------------


def test_a_model_that_caps_its_logits_is_scored_right():
    """The model's own forward runs, so what comes after its head comes here too."""
    model = tiny.architecture("llama")

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = torch.tanh(out.logits)
            return out

    model.__class__ = Capped
    data = examples("copa", "llama", 4)
    scorer = scorer_of(model, "llama", "copa")
    with torch.no_grad():
        expected = torch.stack(naive.scores(model, data, "causal", 1))
        torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)


def test_a_model_without_positions_of_ones_own_is_scored_in_chains():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)).eval()
    data = examples("copa", "opt", 4)
    scorer = Scorer(model, 1, "causal", "answer")
    assert not scorer.reading.own_masks
    scorer.verify(data)
    with torch.no_grad():
        expected = torch.stack(naive.scores(model, data, "causal", 1, "right"))
        torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)


def test_verify_finds_a_model_that_ignores_masks_and_one_that_cannot_be_scored():
    model = tiny.architecture("llama")

    class Deaf(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model.__class__ = Deaf
    data = examples("copa", "llama", 4)
    scorer = scorer_of(model, "llama", "copa")
    assert scorer.reading.own_masks
    scorer.verify(data)
    assert (
        not scorer.reading.own_masks
        and scorer.reading.together == "padded"
        and scorer.forward_passes == 0
        and scorer.layout == "auto"
    )
    # Also from questions that would need no mask in padded rows: what training packs later is tried too.
    other = scorer_of(model, "llama")
    other.verify([Example((choice([i, 6, 7, 8], 1), choice([i, 6, 7, 20], 1)), 0) for i in range(9, 13)])
    assert not other.reading.own_masks
    with torch.no_grad():
        expected = torch.stack(naive.scores(tiny.architecture("llama"), data, "causal", 1))
        torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)
    # A bidirectional model under the name of a causal one sees the padding.
    from transformers import RobertaForCausalLM

    torch.manual_seed(0)
    both_ways = RobertaForCausalLM(tiny.architecture("roberta").config).eval()
    with torch.no_grad():
        for parameter in both_ways.parameters():
            parameter.mul_(4.0)
    with pytest.raises(ValueError, match="RobertaForCausalLM differs from its whole forward by"):
        Scorer(both_ways, 1, "causal", "answer").verify(examples("copa", "opt", 4))


def test_a_head_that_is_not_called_as_a_module_is_noticed():
    model = tiny.architecture("llama")

    class Inline(type(model)):
        def forward(self, *args, **kwargs):
            out = self.model(*args, **kwargs)
            out.logits = out.last_hidden_state @ self.lm_head.weight.T
            return out

    model.__class__ = Inline
    scorer = scorer_of(model, "llama", "copa")
    with pytest.raises(ValueError, match="scoring a Inline fails: its output head is not called as a module"):
        scorer.collate(examples("copa", "llama", 4))
    with pytest.raises(ValueError, match="not called as a module"):
        scorer.verify(examples("copa", "llama", 4))


def test_a_sliding_window_shorter_than_the_prompt_rules_out_trees():
    model = tiny.architecture("mistral", sliding_window=4)
    data = examples("copa", "mistral", 4)
    scorer = scorer_of(model, "mistral", "copa", layout="packed")
    with torch.no_grad():
        expected = torch.stack(naive.scores(model, data, "causal", 1, "right"))
        torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_adapters_are_scored_by_their_own_forward(adapter):
    import peft

    from jaguar.models.adapters import Adapter

    data = examples("copa", "opt", 4)
    model = Adapter(adapter, num_virtual_tokens=3).applied(tiny.architecture("opt"), "causal")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    assert isinstance(model, peft.PeftModel)
    scorer = scorer_of(model, "opt", "copa")
    scorer.verify(data)
    with torch.no_grad():
        found = scorer.scores(scorer.collate(data))
        plain = torch.stack(naive.scores(tiny.architecture("opt"), data, "causal", 1))
        alone = []
        for e in data:
            for c in e.choices:
                ids = torch.tensor([c.ids])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(c.ids) :]
                alone.append(
                    logits[list(c.positions)].log_softmax(1).gather(1, torch.tensor(c.targets)[:, None]).mean()
                )
    torch.testing.assert_close(found, torch.stack(alone).view(-1, 2), **CLOSE)
    assert (found - plain).abs().max() > 1e-3  # the adapter acts


def test_a_model_without_a_head_for_tokens_is_refused():
    from transformers import OPTModel

    with pytest.raises(ValueError, match="OPTModel has no output head for tokens"):
        Scorer(OPTModel(tiny.architecture("opt").config), 1)
    with pytest.raises(ValueError, match="classes, not answers"):
        Scorer(tiny.architecture("opt"), 1, "classifier", "answer")
    with pytest.raises(ValueError, match=r"layout='rows': choose one of 'auto', 'packed', 'padded'"):
        Scorer(tiny.architecture("opt"), 1, layout="rows")


def test_classifier_logits_are_the_models_own(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny.classifier(tmp_path)).eval()
    asked = [Question(text, (), int(label == "positive"), "row") for text, label in tiny.sentences(8, 3)]
    data = Encoder(tiny.tokenizer(), "classifier", 64)(asked)
    scores = evaluate(Scorer(model, 1, "classifier"), data, 8)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([e.choices[0].ids])).logits for e in data])
    torch.testing.assert_close(scores.logits, alone, **CLOSE)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_values", [3, 1000])
def test_auc_is_the_share_of_ordered_pairs(n_values):
    generator = torch.Generator().manual_seed(1)
    score = torch.randint(n_values, (200,), generator=generator).float()
    label = torch.randint(2, (200,), generator=generator)
    wins = [float(a > b) + 0.5 * float(a == b) for a in score[label == 1] for b in score[label == 0]]
    assert roc_auc(score, label) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert math.isnan(roc_auc(score, torch.zeros(200, dtype=torch.int64)))


def test_figures_and_paired_error():
    labels, losses = torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 6.0])
    before = Scores(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), labels, losses)
    after = Scores(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), labels, losses)
    assert before.figures()["accuracy"] == 0.5 and after.figures()["accuracy"] == 0.75
    assert after.figures()["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert paired_se(before, after) == pytest.approx(torch.tensor([0.0, 1.0, 0.0, 0.0]).std().item() / 2)
    assert after.figures()["loss"] == pytest.approx(3.0)


def test_a_row_with_nan_scores_is_wrong_not_option_zero():
    broken = Scores(torch.tensor([[math.nan, math.nan], [2.0, 1.0]]), torch.tensor([0, 0]), torch.zeros(2))
    assert broken.figures()["accuracy"] == 0.5

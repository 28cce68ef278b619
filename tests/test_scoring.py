"""Scoring: option logits equal the model's own, one prompt at a time; figures equal their definitions."""

import itertools
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jaguar.scoring import OptionScorer, Scores, batches, evaluate, paired_se, roc_auc
from jaguar.tasks.text_classification import Example, Row, Task

TASK = Task("Review: {text}\nSentiment:", ("negative", "positive"), (" negative", " positive"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny.causal_lm(tmp_path_factory.mktemp("causal"))).eval()


def examples(count, task=TASK):
    rows = [Row(text, label, i + 2) for i, (text, label) in enumerate(tiny.sentences(count, seed=3))]
    return task.examples(rows, tiny.tokenizer(), 64)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_option_logits_are_the_models_own(causal, batch_size):
    options = TASK.option_ids(tiny.tokenizer())
    scorer = OptionScorer(causal, pad_id=1, option_ids=options)
    data = examples(16)
    scores = evaluate(scorer, data, batch_size)
    with torch.no_grad():
        alone = torch.stack([causal(torch.tensor([e.ids])).logits[0, -1, options] for e in data])
    torch.testing.assert_close(scores.logits, alone, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    assert scorer.forward_passes == math.ceil(16 / batch_size)


def test_classifier_logits_are_the_models_own(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny.classifier(tmp_path)).eval()
    data = examples(8, Task("{text}", ("negative", "positive")))
    scores = evaluate(OptionScorer(model, pad_id=1, option_ids=None), data, 8)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([e.ids])).logits for e in data])
    torch.testing.assert_close(scores.logits, alone, rtol=1e-5, atol=1e-5)


def test_a_model_that_caps_its_logits_is_scored_by_its_own_forward(causal):
    class Capped(type(causal)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.01 * torch.tanh(out.logits / 0.01)
            return out

    model = Capped(causal.config).eval()
    model.load_state_dict(causal.state_dict())
    data = examples(4)
    options = TASK.option_ids(tiny.tokenizer())
    scorer = OptionScorer(model, pad_id=1, option_ids=options)
    naive = evaluate(scorer, data, 4).logits
    scorer.check_head(data[0])
    checked = evaluate(scorer, data, 4).logits
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([e.ids])).logits[0, -1, options] for e in data])
    torch.testing.assert_close(checked, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(naive, alone, atol=1e-3)  # what the check is there for


def test_evaluation_leaves_the_models_mode(causal):
    causal.train()
    try:
        evaluate(OptionScorer(causal, 1, [2, 3]), examples(2), 2)
        assert causal.training
    finally:
        causal.eval()


@pytest.mark.parametrize("n_values", [3, 1000])
def test_auc_is_the_share_of_ordered_pairs(n_values):
    generator = torch.Generator().manual_seed(1)
    score = torch.randint(n_values, (200,), generator=generator).float()
    label = torch.randint(2, (200,), generator=generator)
    wins = [float(a > b) + 0.5 * float(a == b) for a in score[label == 1] for b in score[label == 0]]
    assert roc_auc(score, label) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert math.isnan(roc_auc(score, torch.zeros(200, dtype=torch.int64)))


def test_figures_and_paired_error():
    labels = torch.tensor([0, 1, 1, 0])
    before = Scores(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), labels)
    after = Scores(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), labels)
    assert before.figures()["accuracy"] == 0.5 and after.figures()["accuracy"] == 0.75
    assert after.figures()["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert paired_se(before, after) == pytest.approx(torch.tensor([0.0, 1.0, 0.0, 0.0]).std().item() / 2)
    expected = -math.log(math.exp(1) / (math.exp(1) + 1)) * 0.75 - math.log(1 / (math.exp(1) + 1)) * 0.25
    assert after.figures()["loss"] == pytest.approx(expected)


def data(count):
    return [Example(tuple(range(2 + i % 17)), i % 2) for i in range(count)]


def test_batches_visit_an_epoch_once_and_resume_anywhere():
    rows = data(100)
    first = list(itertools.islice(batches(rows, 16, seed=5), 20))
    seen = [id(e) for batch in first[:6] for e in batch]
    assert len(set(seen)) == len(seen) == 96
    for start in (0, 1, 5, 6, 13):
        again = list(itertools.islice(batches(rows, 16, seed=5, first=start), 20 - start))
        assert [[id(e) for e in b] for b in again] == [[id(e) for e in b] for b in first[start:]]
    other = next(batches(rows, 16, seed=6))
    assert [id(e) for e in other] != [id(e) for e in first[0]]


def test_batches_have_rows_of_similar_length():
    spread = [
        max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in itertools.islice(batches(data(800), 16, 0), 50)
    ]
    assert sum(spread) / len(spread) <= 1.0  # 17 lengths over 50 batches: a batch spans at most two of them

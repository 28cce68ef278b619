"""Nothing is scored before batches were compared with rows alone: every entry point, every kind of data set."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from helpers import tiny
from helpers.scorers import CLOSE, examples, scorer_of
from helpers.tiny import recurrent, scaled
from jaguar import Scorer, ZOTrainer, ZOTrainingArguments
from jaguar.scoring import evaluate
from jaguar.scoring.verification import picked
from jaguar.tasks import Choice, Example


def ids(*lengths, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(5, vocab, (n,), generator=generator).tolist()) for n in lengths]


def rows_to_classify(*lengths):
    return [Example((Choice(row),), i % 2, f"row {i}") for i, row in enumerate(ids(*lengths))]


SMALL = {"vocab_size": 64, "num_labels": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 48, "max_position_embeddings": 64}
CLASSIFIERS = {  # name, configuration, how it is read
    "Llama": (SMALL | {"pad_token_id": 0}, "padded"),
    "Mistral": (SMALL | {"pad_token_id": 0, "num_key_value_heads": 1}, "padded"),
    "GPT2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 2}, "padded"),
    "Bert": (SMALL | {"pad_token_id": 0}, "padded"),
    "ModernBert": (SMALL | {"pad_token_id": 0, "classifier_pooling": "mean"}, "padded"),
    "Qwen2": (SMALL | {"pad_token_id": None, "num_key_value_heads": 1}, "one"),  # has no pad token at all
    "XLNet": ({"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}, "equal"),  # takes the last
    "FNet": (SMALL | {"pad_token_id": 0}, "equal"),  # mixes all tokens, padding too
}


def classifier(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(bos_token_id=None, eos_token_id=None, **CLASSIFIERS[name][0])
    return scaled(getattr(transformers, f"{name}ForSequenceClassification")(config))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_a_row_the_same_logits_in_every_batch(name):
    model, data = classifier(name), rows_to_classify(3, 20, 6, 30, 9, 12, 6)
    scorer = Scorer(model, 1, "classifier")
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([e.choices[0].ids])).logits for e in data])
    found = evaluate(scorer, data, 7)
    torch.testing.assert_close(found.logits, alone, rtol=1e-4, atol=1e-4)
    assert alone.std() > 0.02 and scorer.reading.together == CLASSIFIERS[name][1]
    passes = {"padded": 1, "equal": 6, "one": 7}[scorer.reading.together]
    assert scorer.forward_passes == passes  # the comparison is not counted


def alone(model, data):
    """Mean log-probability of each option by the model's own forward; (rows, 2)."""
    found = []
    with torch.no_grad():
        for choice in (c for e in data for c in e.choices):
            logits = model(torch.tensor([choice.ids]), use_cache=False).logits[0, list(choice.positions)]
            found.append(logits.log_softmax(1).gather(1, torch.tensor(choice.targets)[:, None]).mean())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("name", ["Mamba", "Qwen3_5", "RecurrentGemma"])
def test_a_recurrence_is_not_packed_though_nobody_called_verify(name):
    model, data = recurrent(name), examples("copa", "qwen", 6)
    expected = alone(model, data)
    torch.testing.assert_close(evaluate(scorer_of(model, "qwen", "copa"), data, 6).logits, expected, **CLOSE)
    scorer = scorer_of(model, "qwen", "copa", layout="packed")
    torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)


# -- the trainer -------------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """Map-style, and never says that it has ended."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i % len(self.rows)]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


DATA_SETS = {
    "list": list,
    "tuple": tuple,
    "Subset": lambda rows: Subset(rows, range(len(rows))),
    "ConcatDataset": lambda rows: ConcatDataset([rows[:3], rows[3:]]),
    "map-style": Rows,
    "stream": Stream,
}


def trainer_of(tmp_path, scorer, rows, **options):
    args = {"max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 0.0}
    args |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    args |= {"logging_strategy": "no"}
    return ZOTrainer(
        scorer.model,
        ZOTrainingArguments(tmp_path, **(args | options)),
        scorer=scorer,
        train_dataset=rows,
        eval_dataset=rows,
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", DATA_SETS)
def test_the_trainer_scores_right_from_every_kind_of_data_set(tmp_path, kind, workers):
    if workers and kind not in ("list", "stream"):
        pytest.skip("workers get the same rows from each")
    model, data = recurrent(), examples("copa", "qwen", 8)
    expected = alone(model, data)
    right = -expected.gather(1, torch.tensor([e.label for e in data])[:, None])[:, 0]
    new = lambda: scorer_of(model, "qwen", "copa")  # noqa: E731
    rows, options = DATA_SETS[kind](data), {"dataloader_num_workers": workers}
    before = trainer_of(tmp_path, new(), rows, **options).evaluate()
    assert before["eval_loss"] == pytest.approx(right.mean().item(), rel=1e-5)
    predicted = trainer_of(tmp_path, new(), rows, **options).predict(rows)
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected, **CLOSE)
    trainer = trainer_of(tmp_path, new(), rows, **options)
    trainer.train()
    tokens = torch.tensor([len(e.choices[e.label].targets) for e in data])
    first = trainer.zeroth_order.last_record.losses
    # At x + tau e and x - tau e, whose mean is the loss at x but for curvature.
    assert sum(first) / 2 == pytest.approx((right * tokens).sum().item() / tokens.sum().item(), rel=1e-3)


def test_accelerate_is_not_to_cut_collated_batches(tmp_path):
    data = examples("sst2", "gpt2", 16)
    scorer = scorer_of(tiny.architecture("gpt2"), "gpt2")
    with pytest.raises(ValueError, match="dispatch_batches=True cuts collated batches by rows"):
        trainer_of(tmp_path, scorer, data, accelerator_config={"dispatch_batches": True})
    trainer = trainer_of(tmp_path, scorer, Stream(data), max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_stream_whose_rows_get_more_options_is_not_evaluated(tmp_path):
    (long,) = examples("sst2", "gpt2", 1)
    data = [Example(long.choices[:1], 0)] * 8 + [long] * 8
    trainer = trainer_of(tmp_path, scorer_of(tiny.architecture("gpt2"), "gpt2"), data)
    with pytest.raises(ValueError, match="a row of a streaming data set has 2 options, the first ones had 1 at most"):
        trainer.evaluate(Stream(data))
    assert trainer.evaluate(data)["eval_accuracy"] >= 0.5


# -- what is looked at -------------------------------------------------------------------------------------------------


def test_a_batch_that_came_from_elsewhere_is_not_scored_before_a_comparison():
    model, data = tiny.architecture("opt"), examples("sst2", "opt", 4)
    batch = scorer_of(model, "opt").collate(data)
    other = scorer_of(model, "opt")
    for call in (other.scores, other.loss):
        with pytest.raises(RuntimeError, match=r"scores a OPTForCausalLM right was not .* verify\(examples\)"):
            call(batch)
    other.verify(data)
    assert other.verified and torch.equal(other.scores(batch), other.scores(other.collate(data)))


def test_longer_rows_are_compared_when_they_come():
    """A model whose attention looks 24 tokens back and whose configuration does not say so."""
    model = tiny.architecture("llama")

    class Nearsighted(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if input_ids.shape[1] > 24 and attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = attention_mask.tril(0).triu(-24)
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)

    model.__class__ = Nearsighted
    data = sorted(examples("copa", "llama", 32), key=lambda e: e.length)
    short, long = [e for e in data if e.length <= 12][:2], data[-2:]
    if not short:
        short = [Example(tuple(Choice(c.ids[-6:], (5,), c.targets[-1:]) for c in e.choices), 0) for e in data[:2]]
    scorer = scorer_of(model, "llama", "copa", layout="padded")
    scorer.collate(short)
    compared = scorer.verified_length
    assert compared == max(e.length for e in short)
    scorer.collate(short[:1])
    assert scorer.verified_length == compared
    batch = scorer.collate(long)
    assert scorer.verified_length == long[-1].length > compared
    plain = torch.stack([torch.stack(list(row)) for row in alone(model, long)])
    with torch.no_grad():
        torch.testing.assert_close(scorer.scores(batch), plain, **CLOSE)


def test_short_and_long_rows_are_looked_at():
    data = [Example((Choice((1,) * n),), 0) for n in (5, 2, 9, 3, 7, 4)]
    assert [e.length for e in picked(data)] == [2, 3, 7, 9] and len(picked(data[:3])) == 3


class Fickle(nn.Module):
    """A head whose outputs differ from call to call, or with the rows of the batch."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how, self.calls = inner, how, 0
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = self.inner(input_ids, attention_mask=attention_mask)
        self.calls += 1
        if self.how == "dropout":
            out.logits = nn.functional.dropout(out.logits, 0.5, training=True)
        if self.how == "counter":
            out.logits = out.logits * (1 + 0.1 * self.calls)
        if self.how == "capacity":  # rows past the first are dropped, as by an expert that is full
            out.logits = torch.cat([out.logits[:1], torch.zeros_like(out.logits[1:])])
        if self.how == "mean":  # of the batch
            out.logits = out.logits + out.logits.mean(0)
        return out


@pytest.mark.parametrize("how", ["dropout", "counter"])
def test_a_model_that_does_not_repeat_itself_is_refused(how):
    scorer = Scorer(Fickle(classifier("Bert"), how), 1, "classifier")
    with pytest.raises(ValueError, match="a Fickle scores the same rows otherwise the second time, by"):
        scorer.collate(rows_to_classify(3, 20, 6, 30))
    assert not scorer.verified


@pytest.mark.parametrize("how", ["capacity", "mean"])
def test_a_model_whose_rows_change_each_other_is_scored_one_by_one(how):
    model, data = Fickle(classifier("Bert"), how), rows_to_classify(3, 4, 6, 6, 9)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([e.choices[0].ids])).logits for e in data])
    scorer = Scorer(model, 1, "classifier")
    torch.testing.assert_close(evaluate(scorer, data, 5).logits, expected, **CLOSE)
    assert scorer.reading.together == "one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_fault_behind_its_rounding(dtype):
    """Of a model with small logits, where an absolute bound would pass everything."""
    model = tiny.architecture("llama", scale=2.0).to(dtype)
    data = examples("copa", "llama", 6)
    right = scorer_of(model, "llama", "copa")
    right.verify(data)
    assert right.reading.own_masks

    class Deaf(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model.__class__ = Deaf
    deaf = scorer_of(model, "llama", "copa")
    deaf.verify(data)
    assert not deaf.reading.own_masks
    few = picked(data)
    scorer = scorer_of(model, "llama", "copa")
    scorer.verified_length = math.inf
    with torch.no_grad():
        assert (scorer.scores(scorer.collate(few)) - alone(model, few)).abs().max() < 0.15  # a bound of 0.15 would not


def test_the_form_of_equal_lengths_reads_the_right_places():
    for name in ("opt", "bert"):
        model, data = tiny.architecture(name), examples("copa", name, 5)
        scorer = scorer_of(model, name, "copa")
        expected = scorer.scores(scorer.collate(data)).detach()
        for reading in scorer.readings[-2:]:
            scorer.readings = [reading]
            with torch.no_grad():
                torch.testing.assert_close(scorer.scores(scorer.collate(data)), expected, **CLOSE)


def test_a_row_that_the_model_cannot_read_is_named():
    scorer = Scorer(classifier("Bert"), 1, "classifier")
    with pytest.raises(ValueError, match="row 1: a BertForSequenceClassification cannot read its 70 tokens"):
        scorer.collate(rows_to_classify(3, 70))

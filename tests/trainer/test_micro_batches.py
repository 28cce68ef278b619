"""The step over micro-batches is that of the one large batch, whatever a model's loss is a mean of."""

import warnings

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from helpers.heads import (
    BART,
    CHOICES,
    CLASSES,
    GPT,
    HEADS,
    IDS,
    OPT,
    PLACES,
    PROMPTED,
    QUIET,
    SMALL,
    TAGS,
    UNEVEN,
    Shifting,
    model_of,
    rows,
    trained,
    without,
)
from jaguar import ZOTrainer, ZOTrainingArguments
from jaguar.trainer.micro_batches import Grain, MicroBatches

SPLITS = [(8, 1), (2, 4), (1, 8), (3, 3)]  # rows, micro-batches; the last ends with a short one

ROUTED = SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}


class Contrastive(Shifting):
    """The other rows of the batch are the wrong answers."""

    def forward(self, input_ids, labels=None):
        x = self.logits(input_ids).mean(1)
        return {"loss": F.cross_entropy(x @ x.T / 10, torch.arange(len(x)))}


class Weighted(Shifting):
    """Classes have weights, so that a row of a rare class counts more in the mean."""

    def forward(self, input_ids, labels=None):
        x = self.logits(input_ids).mean(1)[:, :2]
        return {"loss": F.cross_entropy(x, labels, weight=torch.tensor([1.0, 9.0]))}


class Counting(Shifting):
    """Takes the number of items, and adds something of its own."""

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def forward(self, input_ids, labels=None, num_items_in_batch=None):
        logits = self.logits(input_ids)
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return {"loss": total / num_items_in_batch + logits.pow(2).mean()}


@pytest.mark.parametrize("head", HEADS)
def test_micro_batches_are_the_large_batch(tmp_path, head):
    *made, data = HEADS[head]
    model = model_of(*made)
    found = {split: trained(tmp_path, model, data, *split) for split in SPLITS}
    for split, losses in found.items():
        assert losses == pytest.approx(found[8, 1], rel=2e-6), split


@pytest.mark.parametrize("head", ["classes", "masked", "causal", "drops the number of items"])
def test_also_with_label_smoothing_and_losses_of_ones_own(tmp_path, head):
    *made, data = HEADS[head]
    model = model_of(*made)

    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch

    def mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten())

    for more in ({"label_smoothing_factor": 0.2}, {"compute_loss_func": summed}, {"compute_loss_func": mean}):
        found = [trained(tmp_path, model, data, *split, **more) for split in SPLITS]
        assert found[1:] == [pytest.approx(found[0], rel=2e-6)] * 3, more


@pytest.mark.filterwarnings("ignore:.*was skipped, because a loss was nan")
def test_every_window_counts_what_it_holds(tmp_path):
    """A short window at the end of an epoch; and one that has no labels at all is skipped, as its large batch is."""
    model = model_of(tf.BartForCausalLM, tf.BartConfig, BART)
    for steps in (2, 3, 4):
        found = [trained(tmp_path, model, UNEVEN[:7], *split, steps=steps) for split in ((4, 1), (2, 2), (1, 4))]
        assert found[1:] == [pytest.approx(found[0], rel=2e-6)] * 2
    data = rows(labels=without(IDS, 0, 1, 2, 3))
    losses = trained(tmp_path, model, data, 2, 2, steps=2)
    assert losses == pytest.approx(trained(tmp_path, model, data, 4, 1, steps=2), rel=2e-6)


@pytest.mark.parametrize(
    ("cls", "config", "options", "message"),
    [
        (tf.MixtralForCausalLM, tf.MixtralConfig, ROUTED, "MixtralForCausalLM .* router"),
        (tf.OlmoeForCausalLM, tf.OlmoeConfig, SMALL | {"num_experts": 8, "output_router_logits": True}, "router"),
        (Counting, None, {}, "Counting .* router"),
        (Contrastive, None, {}, "Contrastive .* contrastive"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("split", [(2, 4), (1, 8)], ids=str)
def test_what_depends_on_the_batch_is_said_once(tmp_path, cls, config, options, message, split):
    model = model_of(cls, config, options)
    data = rows(labels=IDS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = trained(tmp_path, model, data, *split, steps=2)
    told = [str(w.message) for w in told if "depends on how its rows are batched" in str(w.message)]
    assert len(told) == 1
    with pytest.warns(UserWarning, match=message):
        warnings.warn(told[0], stacklevel=1)
    if cls is not Contrastive:  # an auxiliary loss has its weight, not that times the number of micro-batches
        assert losses == pytest.approx(trained(tmp_path, model, data, 8, 1, steps=2), rel=5e-3)


@pytest.mark.parametrize(
    ("split", "labels"),
    [((1, 2), [0, 1, 1, 0]), ((1, 2), [1, 1, 0, 0, 1, 0]), ((2, 2), [0, 0, 1, 1, 0, 1, 1, 1])],
    ids=["first window", "third window", "two rows"],
)
def test_weights_of_classes_are_said_where_the_classes_differ(tmp_path, split, labels):
    model = model_of(Weighted, None, {})
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, labels, strict=False)]
    with pytest.warns(UserWarning, match="loss of a Weighted depends on how its rows are batched"):
        trained(tmp_path, model, data, *split, steps=3)


def test_nothing_is_asked_where_one_batch_makes_the_step(tmp_path):
    model = model_of(tf.MixtralForCausalLM, tf.MixtralConfig, ROUTED)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    trained(tmp_path, model, rows(labels=IDS), 8, 1, steps=2)
    assert len(calls) == 4


def test_what_is_asked_moves_no_random_numbers_and_is_asked_once():
    drawn = []

    def loss(batch, n_items):
        drawn.append(torch.rand(()).item())
        return batch["labels"].float().sum() / n_items

    window = [{"labels": torch.tensor([1, 2])}, {"labels": torch.tensor([3, 5])}]
    torch.manual_seed(7)
    expected = torch.rand(4).tolist()
    micro = MicroBatches("Model")
    torch.manual_seed(7)
    for _ in range(2):
        totals, weights = zip(*micro.parts(window, torch.tensor(4), loss), strict=True)
        assert (sum(totals) / sum(weights)).item() == 11 / 4
    assert drawn[-4:] == expected and len(drawn) == 4 + 2 + 3


def test_what_the_user_says_of_the_loss_counts(tmp_path):
    class Declared(ZOTrainer):
        loss_is_scaled_for_ga = True

    model = model_of(Shifting, None, {})
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.0, **QUIET}
    args |= {"train_sampling_strategy": "sequential", "max_steps": 1, "coordinates": 0.5, "tau": 1e-2}
    trainer = Declared(model, ZOTrainingArguments(str(tmp_path), **args), train_dataset=rows(labels=IDS))
    trainer.train()
    mean = trained(tmp_path, model, rows(labels=IDS), 8, 1)
    assert trainer.zeroth_order.last_record.losses == pytest.approx([4 * loss for loss in mean], rel=2e-6)


class Columns(Shifting):
    """A loss for each row, or their mean in a tensor of one element."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, input_ids, labels=None):
        losses = F.cross_entropy(self.logits(input_ids).mean(1), labels, reduction="none")
        return {"loss": losses.mean()[None] if self.mean else losses}


@pytest.mark.parametrize("split", [(8, 1), (2, 4)], ids=str)
def test_losses_of_other_shapes(tmp_path, split):
    with pytest.raises(ValueError, match=r"the loss must be one number, got a tensor of shape \(.,\); take its mean"):
        trained(tmp_path, Columns(mean=False), CLASSES, *split)
    with pytest.warns(UserWarning, match=r"the closure's loss has shape \(1,\)"):
        trained(tmp_path, Columns(mean=True), CLASSES, *split)


# -- half precision ----------------------------------------------------------------------------------------------------


class Widened(Shifting):
    """Computes its loss in half precision and hides it."""

    half = torch.bfloat16

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids).to(self.half)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten()).float()
        return {"loss": loss, "logits": logits}


class Fine(Widened):
    half = torch.float32


class WidenedToFloat16(Widened):
    half = torch.float16


@pytest.mark.parametrize(
    ("cls", "config", "options", "data", "dtype", "said"),
    [
        (tf.BertForSequenceClassification, tf.BertConfig, SMALL, CLASSES, "bfloat16", "bfloat16"),
        (tf.RobertaForSequenceClassification, tf.RobertaConfig, SMALL, CLASSES, "float16", "float16"),
        (tf.BertForQuestionAnswering, tf.BertConfig, SMALL, PLACES, "bfloat16", "bfloat16"),
        (tf.BertForMultipleChoice, tf.BertConfig, SMALL, CHOICES, "bfloat16", "bfloat16"),
        (tf.GPT2ForSequenceClassification, tf.GPT2Config, GPT, CLASSES, "bfloat16", "bfloat16"),
        (tf.LlamaForCausalLM, tf.LlamaConfig, SMALL, UNEVEN, "bfloat16", None),  # widens its logits
        (tf.BertForTokenClassification, tf.BertConfig, SMALL | {"num_labels": 4}, TAGS, "bfloat16", "bfloat16"),
        (tf.OPTForCausalLM, tf.OPTConfig, OPT, PROMPTED, "bfloat16", None),
        (Widened, None, {}, UNEVEN, "float32", "bfloat16"),
        (WidenedToFloat16, None, {}, UNEVEN, "float32", "float16"),
        (Fine, None, {}, UNEVEN, "float32", None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("micro", [1, 4])
def test_a_loss_of_half_precision_is_told(tmp_path, cls, config, options, data, dtype, said, micro):
    model = model_of(cls, config, options).to(getattr(torch, dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, model, data, 2, micro, steps=8, learning_rate=1e-2)
    told = [str(w.message) for w in caught if "the closure's loss is" in str(w.message)]
    assert len(told) == (said is not None) and all(f"torch.{said}" in message for message in told)


def test_autocast_and_losses_of_ones_own(tmp_path):
    model = model_of(Fine, None, {})

    def half(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"].to(torch.bfloat16)
        return -logits.log_softmax(-1).flatten(0, 1)[torch.arange(labels.numel()), labels.flatten()].mean().float()

    data = rows(labels=IDS)
    trained(tmp_path, model, data, 8, 1, steps=6, bf16=True)  # cross_entropy is in float32 there
    with pytest.warns(UserWarning, match=r"the closure's loss is torch\.bfloat16"):
        trained(tmp_path, model, data, 2, 1, steps=8, learning_rate=1e-2, compute_loss_func=half, bf16=True)


def test_a_few_round_numbers_are_no_half_precision():
    assert Grain().dtype(torch.tensor(1 / 3, dtype=torch.float16)) == torch.float16
    whole = list(range(1, 40))
    for values in ([1.0] * 50, [0.0] * 50, [0.5, 0.25, 3.0, float("nan"), 1 / 3, *whole], [1 / 3, *whole]):
        grain = Grain()
        assert {grain.dtype(torch.tensor(float(value))) for value in values} == {torch.float32}

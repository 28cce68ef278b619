"""Checks of one architecture of transformers: what is saved comes back, scores are its own; or it is refused."""

import random
import shutil

import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from helpers import architectures
from jaguar import Scorer, ZOTrainer, ZOTrainingArguments
from jaguar.scoring import evaluate, naive
from jaguar.tasks import Choice, Example

# Of scores, logits and losses, as a share of the largest score if that is above one: fp32 sums in another order.
TOLERANCE = 1e-4
QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
}


class Unequal(Exception):
    """What came out is not what it should be."""


def outcome(check, name, folder):
    """ "equal", "refused: why" or "differs: where"; and what else the check tells."""
    model = type(architectures.model_of(name)).__name__
    try:
        return "equal", check(name, folder) or {}
    except Unequal as error:
        return f"differs: {error}", {}
    except Exception as error:
        words = " ".join(str(error).split())
        if isinstance(error, (ValueError, RuntimeError)) and model in words:
            return f"refused: {words}", {}
        return f"differs: {type(error).__name__}: {words}", {}


class Watched(TrainerCallback):
    """The weights after every step; the evaluation after the second step is called the best."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **others):
        self.after[state.global_step] = values(model)

    def on_evaluate(self, args, state, control, metrics=None, **others):
        metrics["eval_planned"] = float(state.global_step == 2)


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found, expected, where):
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if wrong or found.keys() != expected.keys():
        names = ", ".join(wrong[:3] or sorted(found.keys() ^ expected.keys())[:3])
        raise Unequal(f"{where}: {len(wrong)} of {len(expected)} tensors, {names}")


def rows_of(name, model, count=8, length=12):
    """Rows for the model's own loss."""
    kind = name.split("-")[0]
    found = []
    for example in questions(name, model, [length] * count):
        ids = torch.tensor(example.choices[0].ids)
        found.append({"input_ids": ids, "labels": torch.tensor(example.label) if kind == "classifier" else ids})
    return found


def trainer_of(name, folder, seed, **more):
    """Every parameter moves in every step, visibly."""
    model, watched = architectures.model_of(name, seed), Watched()
    args = ZOTrainingArguments(
        str(folder),
        **QUIET,
        **more,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        tau=1e-2,
        coordinates=1.0,
        save_strategy="steps",
        save_steps=2,
        remove_unused_columns=False,  # some take their labels without naming them
    )
    rows = rows_of(name, model)
    return ZOTrainer(model, args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[watched]), watched


def check_best(name, folder):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "planned", "greater_is_better": True}
    trainer, watched = trainer_of(name, folder, 0, eval_strategy="steps", eval_steps=2, **best)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for parameter, before in start.items():
        assert not torch.equal(before, watched.after[2][parameter]), parameter
        assert not torch.equal(watched.after[2][parameter], watched.after[4][parameter]), parameter
    same(values(trainer.model), watched.after[2], "the best model")


def check_resume(name, folder):
    whole, watched = trainer_of(name, folder, 0)
    whole.train()
    again, _ = trainer_of(name, folder / "again", 1)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    same(values(again.model), watched.after[4], "the resumed run")


def check_saved(name, folder):
    model = architectures.model_of(name)
    model.save_pretrained(folder)
    auto, _ = architectures.AUTO[name.split("-")[0]]
    known = auto if type(model.config) in auto._model_mapping else type(model)
    loaded = known.from_pretrained(folder)
    same(values(loaded), values(model), "save_pretrained")


def questions(name, model, lengths):
    """Examples of random tokens, prompts of these lengths; a language model gets options of one and of three tokens."""
    kind, made, rng = name.split("-")[0], [], random.Random(0)
    config = model.config.get_text_config()
    end = config.eos_token_id if config.is_encoder_decoder or model.config.is_encoder_decoder else None
    close = () if end is None else (end,)

    def draw(count):
        return tuple(rng.randrange(10, 90) for _ in range(count))

    for i, length in enumerate(lengths):
        prompt, options = draw(length), (draw(1), draw(3 if i % 2 else 1))
        if kind == "classifier":
            choices = (Choice((*prompt, *close)),)
        elif kind == "masked":
            mask = getattr(config, "mask_token_id", None) or 9
            places = [tuple(range(length - 2, length - 2 + len(o))) for o in options]
            ids = [(*prompt[:-2], *[mask] * len(o), *prompt[-2:], *close) for o in options]
            choices = tuple(Choice(*it) for it in zip(ids, places, options, strict=True))
        else:
            choices = tuple(
                Choice((*prompt, *o[:-1]), tuple(range(length - 1, length - 1 + len(o))), o) for o in options
            )
        made.append(Example(choices, i % 2, f"row {i}"))
    return made


LENGTHS = (5, 38, 7, 25, 12, 6)  # past windows of 8 tokens, and far below


def entry_points(name, folder, model, examples, pad):
    """What each way to a score makes of the examples: logits, or a loss; each with a scorer that is new."""
    kind = name.split("-")[0]

    def trainer(size):
        args = ZOTrainingArguments(
            str(folder),
            **QUIET,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(examples) // size,
            per_device_eval_batch_size=size,
            learning_rate=0.0,
            tau=1e-6,
            coordinates=1,
            save_strategy="no",
        )
        scorer = Scorer(model, pad, kind)
        return ZOTrainer(model, args, scorer=scorer, train_dataset=examples, eval_dataset=examples)

    def first_loss(size):
        made = trainer(size)
        made.train()
        return torch.tensor(made.zeroth_order.last_record.losses[0])

    for size in (1, 6):
        yield f"evaluate, {size}", lambda: evaluate(Scorer(model, pad, kind), examples, size).logits  # noqa: B023
        yield f"ZOTrainer.evaluate, {size}", lambda: torch.tensor(trainer(size).evaluate()["eval_loss"])  # noqa: B023
        yield f"ZOTrainer.train, {size}", lambda: first_loss(size)  # noqa: B023
        yield f"ZOTrainer.predict, {size}", lambda: torch.tensor(trainer(size).predict(examples).predictions)  # noqa: B023


def pads_of(name, model):
    """What fills short rows: the configuration's padding, and for classifiers, which look for that, also another."""
    own = model.config.get_text_config().pad_token_id
    return (own, 5) if name.startswith("classifier") else (own,)


def check_scores(name, folder):
    kind, model = name.split("-")[0], architectures.model_of(name)
    examples = questions(name, model, LENGTHS)
    with torch.no_grad():
        expected = naive.alone(model, examples, kind)
    assert expected.isfinite().all() and expected.std(0).max() > 20 * TOLERANCE, expected
    loss = F.cross_entropy(expected, torch.tensor([e.label for e in examples]))
    pads = pads_of(name, model)
    wrong, refusal, farthest = [], None, 0.0
    for pad in pads:
        for where, reach in entry_points(name, folder, model, examples, pad):
            try:
                found = reach()
            except ValueError as error:
                if type(model).__name__ not in str(error):
                    raise
                refusal = error
                continue
            far = (found - (loss if found.dim() == 0 else expected)).abs().max().item()
            farthest = max(farthest, far)
            if not far <= TOLERANCE * max(1.0, expected.abs().max().item()):
                wrong.append(f"{where} by {far:.2g}")
    if wrong:
        raise Unequal(f"{len(wrong)} ways: " + "; ".join(wrong))
    if refusal is not None:
        raise refusal
    scorer = Scorer(model, pads[0], kind)
    scorer.verify(examples)
    return {"farthest": farthest, "reading": scorer.reading}


CHECKS = {"saved": check_saved, "resume": check_resume, "best": check_best, "scores": check_scores}


def every_check(name, folder):
    """What is checked, its outcome, and what else there is to tell."""
    for what, check in CHECKS.items():
        yield what, *outcome(check, name, folder / what)
        shutil.rmtree(folder / what, ignore_errors=True)

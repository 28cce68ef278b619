"""The two trainers: their arguments are Trainer's, and which of them a scorer makes."""

import inspect
import pydoc

import pytest
from transformers import Trainer

from helpers import tiny
from jaguar import Scorer, ScoringTrainer, ZOTrainer, ZOTrainingArguments


@pytest.fixture
def args(tmp_path):
    return ZOTrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True)


@pytest.fixture
def scorer():
    return Scorer(tiny.architecture("opt"), 1)


@pytest.mark.parametrize("kind", [ZOTrainer, ScoringTrainer])
def test_the_arguments_are_those_of_the_installed_trainer(kind):
    stock = list(inspect.signature(Trainer).parameters.values())
    for shown in (inspect.signature(kind), inspect.signature(kind.__init__)):
        own = [parameter for parameter in shown.parameters.values() if parameter.name != "self"]
        assert own.pop().name == "scorer"
        found, wanted = ([(p.name, p.kind, p.default) for p in parameters] for parameters in (own, stock))
        assert found == wanted
    text = pydoc.plain(pydoc.render_doc(kind))
    assert f"{kind.__name__}(model: " in text and "*given" not in text.partition("Methods defined here")[0]


def test_every_argument_reaches_trainer(args, monkeypatch):
    names = list(inspect.signature(Trainer).parameters)
    given = {name: object() for name in names} | {"args": args, "optimizers": (None, None)}
    given["optimizer_cls_and_kwargs"] = None
    seen = {}

    def looked_at(self, *positional, **named):
        seen.update(dict(zip(names, positional, strict=False)) | named)
        raise InterruptedError

    monkeypatch.setattr(Trainer, "__init__", looked_at)
    for positional in (0, 3, len(names)):
        seen.clear()
        values = list(given.values())
        with pytest.raises(InterruptedError):
            ZOTrainer(*values[:positional], **dict(list(given.items())[positional:]))
        assert seen == given


def test_a_scorer_makes_a_scoring_trainer(args, scorer):
    class Mine(ScoringTrainer):
        pass

    for kind, made in ((ZOTrainer, ScoringTrainer), (ScoringTrainer, ScoringTrainer), (Mine, Mine)):
        trainer = kind(scorer.model, args, scorer=scorer)
        assert type(trainer) is made and trainer.scorer is scorer and trainer.data_collator == scorer.collate
    assert type(ZOTrainer(scorer.model, args)) is type(ZOTrainer(scorer.model, args, scorer=None)) is ZOTrainer


def test_what_a_user_gives_stands_before_what_the_scorer_has(args, scorer):
    def collate(rows):
        return scorer.collate(rows)

    def metrics(found):
        return {}

    trainer = ScoringTrainer(scorer.model, args, collate, scorer=scorer, compute_metrics=metrics)
    assert trainer.data_collator is collate and trainer.compute_metrics is metrics


def test_a_scorer_where_it_would_not_be_used_is_refused(args, scorer):
    class Mine(ZOTrainer):
        pass

    with pytest.raises(TypeError, match=r"Mine takes no scorer: derive it from jaguar\.ScoringTrainer"):
        Mine(scorer.model, args, scorer=scorer)
    with pytest.raises(TypeError, match=r"ScoringTrainer needs scorer=; .* there is jaguar\.ZOTrainer"):
        ScoringTrainer(scorer.model, args)

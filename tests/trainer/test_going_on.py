"""Going on from a checkpoint: of another program, with other options, or where nothing is left to be done."""

import json
import shutil
import warnings

import pytest
import torch
import transformers

from helpers.checkpoints import bits, equal, make, resumed, rows, trainer
from jaguar.trainer import checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, make("tied"), steps=2).train()
    return folder / "checkpoint-2"


def of_another_program(folder, to):
    copied = shutil.copytree(folder, to)
    (copied / checkpoints.RECORD).unlink()
    return copied


def test_a_checkpoint_without_our_record_goes_on_alike(saved, tmp_path):
    foreign = of_another_program(saved, tmp_path / "checkpoint-2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = resumed(saved, tmp_path), resumed(foreign, tmp_path)
    assert equal(bits(one.model), bits(other.model)) and other.state.global_step == 4


def test_the_baseline_goes_on_from_a_checkpoint_of_trainer(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path / "theirs"), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", optim="sgd", learning_rate=1e-2, per_device_train_batch_size=8,
        dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(make("tied"), args, train_dataset=rows()).train()
    run = trainer(tmp_path, make("tied", seed=1), optim_zo="fo-sgd", weight_decay=1.0, coordinates=None, tau=None)
    with pytest.warns(UserWarning, match=r"with what its optimizer had: weight_decay=0\.0, not 1\.0"):
        run.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-2"))
    assert run.state.global_step == 4


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"epoch": 1'])
def test_a_damaged_trainer_state_is_named_and_passed_over(saved, tmp_path, text, recorded):
    folder = shutil.copytree(saved, tmp_path / "checkpoint-2")
    if not recorded:
        (folder / checkpoints.RECORD).unlink()
    (folder / "trainer_state.json").write_text(text)
    model = make("tied", seed=1)
    before = bits(model)
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
        resumed(folder, tmp_path, model)
    assert equal(before, bits(model))
    with pytest.raises(ValueError, match=r"No valid checkpoint .*trainer_state\.json is damaged"):
        checkpoints.newest(tmp_path, 1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"learning_rate": 3e-2}, r"lr=0\.01, not 0\.03;"),
        ({"tau": 3e-2}, r"tau=0\.01, not 0\.03;"),
        ({"beta": 0.25}, r"beta=0\.\d+, not 0\.25;"),
    ],
    ids=["lr", "tau", "beta"],
)
def test_options_that_the_checkpoint_overrules_are_said(saved, tmp_path, more, said):
    with pytest.warns(UserWarning, match=said) as record:
        other = resumed(saved, tmp_path, **more)
    assert len([w for w in record if "going on" in str(w.message)]) == 1
    assert equal(bits(other.model), bits(resumed(saved, tmp_path).model))


@pytest.mark.parametrize("kind", ["zeroth-order", "AdamW"])
def test_a_checkpoint_of_another_optimizer_is_refused_by_the_baseline(saved, tmp_path, kind):
    if kind == "AdamW":
        state = json.loads((saved / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        saved = of_another_program(saved, tmp_path / "checkpoint-2")
        model = make("tied")
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.save(torch.optim.AdamW(parameters).state_dict(), saved / "optimizer.pt")
    with pytest.raises(ValueError, match=r"of a run with another optimizer: what it saved has no .*momentum"):
        resumed(saved, tmp_path, optim_zo="fo-sgd", coordinates=None, tau=None)


@pytest.mark.parametrize("more", [{}, {"steps": 1}, {"optim_zo": "fo-sgd"}], ids=["all", "more than all", "baseline"])
def test_a_finished_run_takes_no_further_step(tmp_path, more):
    options = {"lr_scheduler_type": "constant"} | more
    if "optim_zo" in more:
        options |= {"coordinates": None, "tau": None}
    first = trainer(tmp_path, make("tied"), **options | {"steps": 2})
    first.train()
    with pytest.warns(UserWarning, match="is of step 2, and the run has .: no step is taken"):
        run = resumed(tmp_path / "checkpoint-2", tmp_path, **{"steps": 2} | options)
    assert run.state.global_step == 2 and equal(bits(first.model), bits(run.model))

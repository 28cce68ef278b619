"""Checkpoints of ZOTrainer: resumed runs, failed writes, adapters, arguments as plain values."""

import json
import logging

import pytest
import torch

from helpers import tiny
from helpers.trainers import arguments, bits, equal, examples, scored
from jaguar import Scorer
from jaguar.models.adapters import Adapter
from jaguar.scoring import evaluate
from jaguar.tasks import SST2


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


# -- checkpoints -------------------------------------------------------------------------------------------------------


RESUMED = {
    "micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5},
    "muon": {"optim_zo": "jaguar-muon", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "zo-sgd": {"optim_zo": "zo-sgd", "momentum": 0.9, "coordinates": None, "learning_rate": 1e-3},
    "fo-sgd": {"optim_zo": "fo-sgd", "momentum": 0.9, "coordinates": None, "tau": None},
    "bf16": {},
    "lora": {},
    "prefix": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, case):
    def make(folder):
        model = tiny.architecture("opt")
        model = model.to(torch.bfloat16) if case == "bf16" else model
        torch.manual_seed(5)  # of LoRA's factors
        model = Adapter(case).applied(model, "causal") if case in ("lora", "prefix") else model
        more = {"save_strategy": "steps", "save_steps": 4, "tau": 5e-2 if case == "bf16" else 1e-2} | RESUMED[case]
        return scored(tmp_path / folder, model=model, steps=8, **more)

    whole = make("whole")
    whole.train()
    again = make("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(bits(whole.model), bits(again.model)) and again.state.global_step == 8
    if case != "fo-sgd":
        one, other = (t.zeroth_order.state_dict() for t in (whole, again))
        assert one["jaguar"] == other["jaguar"] and one["jaguar"]["step"] == 8
        for key, state in one["state"].items():
            assert all(torch.equal(value, other["state"][key][name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:.*holds checkpoints of another run")
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = scored(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    trainer = scored(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trainer.on_checkpoint = full
    with pytest.raises(OSError, match=r"checkpoint-2.*: no space left on the disk; the checkpoint of step 2 is whole"):
        trainer.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["checkpoint-2", "journal-before.jaguar", "journal.jaguar"]


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_adapters_train_and_are_saved_and_loaded_by_peft(tmp_path, kind):
    from peft import PeftModel

    base = tiny.architecture("opt")
    before = bits(base)
    torch.manual_seed(0)
    model = Adapter(kind).applied(base, "causal")
    trainer = scored(tmp_path, model=model, steps=4, tau=5e-2)
    start = bits(model)
    trainer.train()
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, start[name])}
    assert moved and all("lora_" in name or "prompt_encoder" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved and "model.safetensors" not in saved
    fresh = tiny.architecture("opt")
    assert equal(before, bits(fresh))
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    data = examples(SST2, 6, 3)
    scores = [evaluate(Scorer(m, 1), data, 3).logits for m in (model, loaded)]
    assert torch.equal(*scores)


def test_arguments_are_saved_as_plain_values(tmp_path):
    args = arguments(tmp_path, momentum_dtype="bfloat16", optim_zo="jaguar-muon")
    saved = json.loads(args.to_json_string())
    assert saved["optim_zo"] == "jaguar-muon" and saved["momentum_dtype"] == "bfloat16" and saved["tau"] == 1e-2
    assert args.optimizer_options()["momentum_dtype"] is torch.bfloat16

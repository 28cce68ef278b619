"""Models that accelerate dispatched by a device map: its hooks move inputs, and what was offloaded, while modules run.

There is one device here. That launches are grouped by device is seen on a GPU only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

from helpers.tensors import all_bits
from helpers.trainers import arguments, classifier, labelled
from jaguar import JaguarSignSGD, ZOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")  # transformers'


def hooked() -> nn.Module:
    model: nn.Module = dispatch_model(classifier(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model.bert.embeddings, "_hf_hook")
    return model


def said_to_be_spread() -> nn.Module:
    """What Trainer sees of a model on two GPUs."""
    model = classifier()
    model.hf_device_map = {"bert": 0, "classifier": 1}
    return model


def trained(model: nn.Module, folder: Path, resume: str | None = None) -> tuple[Any, list[bytes]]:
    args = arguments(folder, 4, save_strategy="steps", save_steps=2)
    trainer = ZOTrainer(model, args, train_dataset=labelled())
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_model_parallel == (getattr(model, "hf_device_map", None) == {"bert": 0, "classifier": 1})
    return trainer.zeroth_order.last_record, all_bits(list(model.parameters()))


@pytest.mark.parametrize("made", [hooked, said_to_be_spread])
def test_a_dispatched_model_takes_the_steps_of_a_plain_one(made: Any, tmp_path: Path) -> None:
    plain = trained(classifier(), tmp_path / "plain")
    assert trained(made(), tmp_path / "dispatched") == plain
    (tmp_path / "dispatched" / "journal.jaguar").unlink()  # so that the steps are measured again
    assert trained(made(), tmp_path / "dispatched", str(tmp_path / "dispatched" / "checkpoint-2")) == plain


def with_frozen_base(offloaded: bool, folder: Path) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """A classifier whose head trains; the rest may lie on the disk, and comes when it runs."""
    model = classifier()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    if offloaded:
        where = {"bert": "disk", "classifier": "cpu", "dropout": "cpu"}
        model = dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)
        assert model.bert.pooler.dense.weight.is_meta
    return model, list(model.named_parameters())


def test_frozen_weights_may_be_offloaded(tmp_path: Path) -> None:
    batch = labelled()[:4]
    given = {key: torch.as_tensor([row[key].tolist() for row in batch]) for key in ("input_ids", "attention_mask")}
    labels = torch.tensor([row["labels"] for row in batch])
    found = []
    for offloaded in (False, True):
        model, named = with_frozen_base(offloaded, tmp_path)
        optimizer = JaguarSignSGD(named, coordinates=0.5, lr=1e-2, backend="reference")

        def closure(model: nn.Module = model) -> Tensor:
            loss: Tensor = model(**given, labels=labels).loss
            return loss

        for _ in range(3):
            optimizer.step(closure)
        found.append((optimizer.last_record, all_bits([p for _, p in named if p.requires_grad])))
    assert found[0] == found[1]


def test_trained_weights_may_not(tmp_path: Path) -> None:
    model, named = with_frozen_base(True, tmp_path)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"bert\.\S+' is on the meta device.* cannot be trained, only frozen"):
        JaguarSignSGD(named)
    with pytest.raises(ValueError, match="cannot be trained"):
        trained(model, tmp_path / "run")

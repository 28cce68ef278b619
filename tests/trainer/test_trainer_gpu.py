"""ZOTrainer on an NVIDIA GPU: an interrupted run ends with the bits of an uninterrupted one. `make gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from jaguar import ZOTrainer, ZOTrainingArguments
from jaguar.backends import availability

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or availability.interpreted(), reason="needs a GPU, compiled kernels"
    ),
]


def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=256, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    return OPTForCausalLM(config).to(torch.bfloat16)


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 250, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, method: str, **more: object) -> ZOTrainer:
    arguments = ZOTrainingArguments(
        str(folder),
        optim_zo=method,
        learning_rate=1e-3,
        tau=0.05,
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=8,
        logging_steps=2,
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    return ZOTrainer(model(), arguments, train_dataset=rows())


@pytest.mark.parametrize("method", ["jaguar-signsgd", "jaguar-muon", "zo-sgd"])
def test_a_resumed_run_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "run", method)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    assert next(whole.model.parameters()).device.type == "cuda"
    assert "backend: triton" in repr(whole.optimizer.optimizer)
    again = trainer(tmp_path / "run", method)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.state.global_step == 8
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p.cpu(), before[name].cpu()) for name, p in whole.model.named_parameters())

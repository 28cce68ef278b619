"""A byte-level Llama of 0.12 M parameters, pretrained on the source of Python's standard library, and what it learns.

Everything comes with Python: nothing is downloaded.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

LENGTH, BATCH = 128, 16  # bytes of a row, rows of a step
CONSOLE = Console(stderr=True)


def documents() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's source, and of the documentation that lies beside it."""
    from pydoc_data import topics

    library = Path(sysconfig.get_path("stdlib"))
    code = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    prose = "\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    first, second = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in (code, prose))
    return first, second


def model() -> Any:
    """The network, as it is before it has learned anything."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def rows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text that begin anywhere."""
    starts = torch.randint(0, text.numel() - LENGTH, (count,), generator=generator)
    return torch.stack([text[i : i + LENGTH] for i in starts.tolist()])


def pretrained(code: Tensor, steps: int) -> Any:
    """The network after some steps of AdamW on the source."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in track(range(steps), "pretraining on code", console=CONSOLE):
        ids = rows(code, BATCH, generator)
        loss = net(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net

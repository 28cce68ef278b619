"""What is learned: a network, rows to learn from, rows to choose settings by, and rows that are reported."""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

CONSOLE = Console(stderr=True)


class Work(Protocol):
    """A task for all contenders.

    Attributes:
        name: in the results.
        variants: what can be trained: "full", "norms", "lora".
    """

    name: str
    variants: tuple[str, ...]

    def network(self, variant: str) -> Any:
        """A copy of the network in evaluation mode, whose trained parameters have requires_grad."""

    def losses(self, net: Any, seed: int) -> Iterator[Callable[[], Tensor]]:
        """For every step a closure that evaluates its rows; the seed decides their order."""

    def held_out(self, net: Any, dev: bool) -> float:
        """Loss on the rows by which settings are chosen (`dev`), or on those that are reported."""


class Bytes:
    """A byte-level Llama of 0.12 M parameters, pretrained on the source of Python's standard library with AdamW.

    It learns the text of Python's documentation (`pydoc_data.topics`), 16 rows of 128 bytes a step. Nothing is
    downloaded.

    Args:
        folder: keeps the pretrained weights.
        pretraining: steps of AdamW.
    """

    name = "bytes"
    variants = ("full", "lora")
    length, batch, rows = 128, 16, 64

    def __init__(self, folder: Path, pretraining: int = 1000) -> None:
        code, prose = self._documents()
        held, dev = prose.numel() // 10, prose.numel() // 5
        generator = torch.Generator().manual_seed(2)
        self._held = self._rows(prose[:held], self.rows, generator)
        self._dev = self._rows(prose[held:dev], self.rows, generator)
        self._train = prose[dev:]
        self._net = self._model()
        path = folder / f"bytes-{pretraining}.pt"
        if path.exists():
            self._net.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._pretrain(code, pretraining)
            torch.save(self._net.state_dict(), path)
        self._net.eval()

    def network(self, variant: str) -> Any:
        """All weights, or LoRA of rank 8 beside queries and values."""
        net = copy.deepcopy(self._net)
        if variant == "full":
            return net
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return get_peft_model(net, config).eval()

    def losses(self, net: Any, seed: int) -> Iterator[Callable[[], Tensor]]:
        """Rows of a step are drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = self._rows(self._train, self.batch, generator)
            yield lambda ids=ids: net(input_ids=ids, labels=ids).loss

    def held_out(self, net: Any, dev: bool) -> float:
        """Mean loss per byte."""
        ids = self._dev if dev else self._held
        with torch.no_grad():
            return float(net(input_ids=ids, labels=ids).loss)

    @staticmethod
    def _documents() -> tuple[Tensor, Tensor]:
        from pydoc_data import topics

        library = Path(sysconfig.get_path("stdlib"))
        code = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
        prose = "\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
        first, second = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in (code, prose))
        return first, second

    @classmethod
    def _rows(cls, text: Tensor, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(0, text.numel() - cls.length, (count,), generator=generator)
        return torch.stack([text[i : i + cls.length] for i in starts.tolist()])

    @classmethod
    def _model(cls) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=cls.length,
                tie_word_embeddings=True,
            )
        )

    def _pretrain(self, code: Tensor, steps: int) -> None:
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in track(range(steps), "pretraining on code", console=CONSOLE):
            ids = self._rows(code, self.batch, generator)
            loss = self._net(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

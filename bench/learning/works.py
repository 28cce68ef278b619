"""Works to be learned: a network, rows to learn from, rows to choose settings by, and rows that are reported."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learning import byte_model
from learning.contenders import GRID


class Work(ABC):
    """A task for all contenders.

    Attributes:
        name: in the results.
        variants: what can be trained: "full", "norms", "lora".
        passes: of a run, if no other number is asked for.
        grid: learning rates that are tried first, as multiples of a contender's own.
        points: of a curve.
        watched: dev rows are looked at with every point, and a run that is hopeless on them is given up; else they are
            looked at once, at the end, and the reported ones in runs of all passes only.
    """

    name: str
    variants: tuple[str, ...]
    passes: int
    grid: tuple[float, ...]
    points: int
    watched: bool

    device = torch.device("cpu")
    precision = "fp32"  # of the matrix products

    def __init__(self) -> None:
        self._before = dict[tuple[str, bool], float]()

    def seeds(self, variant: str) -> int:
        """Runs of the best setting, if no other number is asked for."""
        return 3

    @abstractmethod
    def network(self, variant: str) -> Any:
        """A copy of the network in evaluation mode, whose trained parameters have requires_grad."""

    @abstractmethod
    def losses(self, net: Any, seed: int, by_row: bool = False) -> Iterator[Callable[[], Tensor]]:
        """For every step a closure that evaluates its rows; the seed decides their order.

        Args:
            by_row: the closure returns the loss of each row, and not their mean.
        """

    @abstractmethod
    def held_out(self, net: Any, dev: bool) -> float:
        """Loss on the rows by which settings are chosen (`dev`), or on those that are reported."""

    def before(self, variant: str, dev: bool) -> float:
        """The same before any step."""
        key = (variant, dev)
        if key not in self._before:
            self._before[key] = self.held_out(self.network(variant), dev)
        return self._before[key]


class Bytes(Work):
    """The network of `byte_model`.

    It learns the text of Python's documentation (`pydoc_data.topics`), 16 rows of 128 bytes a step. Nothing is
    downloaded.

    Args:
        folder: keeps the pretrained weights.
        pretraining: steps of AdamW.
        batch: rows of a step.
        dtype: of the weights that are trained.
    """

    name = "bytes"
    variants = ("full", "lora")
    passes, grid, points, watched = 2000, GRID, 20, True
    batch, rows = byte_model.BATCH, 64

    def __init__(
        self, folder: Path, pretraining: int = 1000, batch: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.batch, self.dtype = batch or self.batch, dtype
        code, prose = byte_model.documents()
        held, dev = prose.numel() // 10, prose.numel() // 5
        generator = torch.Generator().manual_seed(2)
        self._held = byte_model.rows(prose[:held], self.rows, generator)
        self._dev = byte_model.rows(prose[held:dev], self.rows, generator)
        self._train = prose[dev:]
        path = folder / f"bytes-{pretraining}.pt"
        if path.exists():
            self._net = byte_model.model()
            self._net.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._net = byte_model.pretrained(code, pretraining)
            torch.save(self._net.state_dict(), path)
        self._net.eval()

    def network(self, variant: str) -> Any:
        """All weights, those of normalisation layers, or LoRA of rank 8 beside queries and values."""
        net = copy.deepcopy(self._net).to(self.dtype)
        if variant == "full":
            return net
        if variant == "norms":
            for name, parameter in net.named_parameters():
                parameter.requires_grad_("norm" in name)
            return net
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return get_peft_model(net, config).eval()

    def losses(self, net: Any, seed: int, by_row: bool = False) -> Iterator[Callable[[], Tensor]]:
        """Rows of a step are drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = byte_model.rows(self._train, self.batch, generator)
            yield lambda ids=ids: losses_of_rows(net, ids) if by_row else net(input_ids=ids, labels=ids).loss

    def held_out(self, net: Any, dev: bool) -> float:
        """Mean loss per byte."""
        ids = self._dev if dev else self._held
        with torch.no_grad():
            return float(net(input_ids=ids, labels=ids).loss)


def losses_of_rows(net: Any, ids: Tensor) -> Tensor:
    """Mean loss of every row's bytes, in fp32."""
    logits = net(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)

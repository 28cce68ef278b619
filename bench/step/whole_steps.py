"""Whole training steps of a transformer on a GPU: time beside its forward passes, peak memory beside inference.

Models have the shapes of their configurations and random weights: neither time nor memory depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jaguar
from gpu.clock import CpuClock
from gpu.memory import no_room, release
from step.peers import MezoLoop

Row = dict[str, Any]
LIST = "models"
FORWARD = "forward passes, two"
# Seconds without which nothing more is begun.
_LEAST = 6.0


@dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        name: what it is called in tables.
        config: (of transformers) class of the configuration, and its values.
        rows, tokens: of a batch.
    """

    name: str
    config: tuple[str, dict[str, Any]]
    rows: int = 16
    tokens: int = 32

    def made(self, device: torch.device) -> nn.Module:
        """The model in bf16, as for inference."""
        import transformers

        kind, values = self.config
        config = getattr(transformers, kind)(**values)
        auto = transformers.AutoModelForCausalLM if kind == "OPTConfig" else transformers.AutoModelForMaskedLM
        with torch.device(device):
            return auto.from_config(config, dtype=torch.bfloat16).to(device).eval()


_ROBERTA = {
    "vocab_size": 50265,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_OPT = {
    "hidden_size": 2048,
    "ffn_dim": 8192,
    "word_embed_proj_dim": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
}
MODELS = (Model("OPT-1.3B", ("OPTConfig", _OPT)), Model("RoBERTa-large", ("RobertaConfig", _ROBERTA)))


def _adamw(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """First-order fine-tuning, for its memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(make: Callable[..., Any]) -> Callable[[nn.Module, Callable[[], Tensor]], Callable[[], object]]:
    def made(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
        return partial(make(model).step, torch.no_grad()(loss))

    return made


def _of(kind: Any, **options: Any) -> Callable[..., Any]:
    return _ours(lambda model: kind(model.named_parameters(), **options))


def _muon(model: nn.Module, **options: Any) -> jaguar.JaguarMuon:
    return jaguar.JaguarMuon(jaguar.param_groups(model), lr=1e-5, coordinates=0.01, **options)


def _mezo(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    return MezoLoop(list(model.named_parameters()), torch.no_grad()(loss))


_SIGNS = {"lr": 1e-6, "coordinates": 0.01, "momentum_dtype": torch.bfloat16}
# Name and (model, () -> loss) -> () -> one step.
JOBS: tuple[tuple[str, Callable[..., Callable[[], object]]], ...] = (
    ("JAGUAR SignSGD, sampled", _of(jaguar.JaguarSignSGD, update="sampled", **_SIGNS)),
    ("JAGUAR SignSGD, all", _of(jaguar.JaguarSignSGD, update="all", **_SIGNS)),
    ("JAGUAR Muon", _ours(_muon)),
    ("JAGUAR Muon, ns_period=8", _ours(partial(_muon, ns_period=8))),
    ("ZO-SGD rademacher, walk", _of(jaguar.ZOSGD, lr=1e-7, distribution="rademacher", restore="walk")),
    ("ZO-SGD gaussian, walk", _of(jaguar.ZOSGD, lr=1e-7, restore="walk")),
    ("ZO-SGD gaussian, restore='module'", _of(jaguar.ZOSGD, lr=1e-7, restore="module")),
    ("MeZO's loop", _mezo),
    ("AdamW, first order", _adamw),
)


def run(clock: CpuClock, left: Callable[[], float], models: Sequence[Model] = MODELS) -> Iterator[Row]:
    """The rows as they come: "model" for what was measured, "failure", "dropped".

    Args:
        left: () -> seconds that may still be spent.
    """
    for spec in models:
        if reason := no_room(2**34, clock.device) if left() > _LEAST else "no time was left":
            yield _row("dropped", spec, "all", reason=reason)
            continue
        base = _allocated(clock)
        model = spec.made(clock.device)
        ids = torch.randint(5, 50000, (spec.rows, spec.tokens), device=clock.device) % model.config.vocab_size

        def loss(model: nn.Module = model, ids: Tensor = ids) -> Tensor:
            found: Tensor = model(input_ids=ids, labels=ids).loss
            return found

        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        forward = torch.no_grad()(loss)
        release(clock.device)
        inference = _peak(clock, forward) - base
        ms = clock.wall_ms(lambda forward=forward: (forward(), forward()))
        common = {"weights": weights, "inference": inference, "rows": spec.rows, "tokens": spec.tokens}
        two = ms["median"]
        yield _row("model", spec, FORWARD, ms=ms, peak=inference, **common)
        for name, make in JOBS:
            if left() < _LEAST:
                yield _row("dropped", spec, name, reason="no time was left")
                continue
            try:
                step = make(model, loss)
                peak = _peak(clock, step, 3) - base
                yield _row("model", spec, name, ms=(ms := clock.wall_ms(step)), peak=peak, of_two=ms["median"] / two,
                           **common)  # fmt: skip
            except Exception as error:  # the others are still worth measuring
                text = " ".join(str(error).split())[:200]
                yield _row("failure", spec, name, reason=f"{type(error).__name__}: {text}")
            step = None
            model.zero_grad(set_to_none=True)
            release(clock.device)
        del model, loss, forward
        release(clock.device)


def _allocated(clock: CpuClock) -> int:
    """Bytes that belong to nothing here: the clock's."""
    return torch.cuda.memory_allocated() if clock.device.type == "cuda" else 0


def _peak(clock: CpuClock, call: Callable[[], object], n: int = 1) -> int:
    """The most bytes that were allocated in n calls; 0 where there is no GPU to ask."""
    if clock.device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _row(kind: str, spec: Model, method: str, **more: Any) -> Row:
    return {"kind": kind, "list": LIST, "model": spec.name, "method": f"{spec.name}: {method}", "what": method} | more


def said(row: Row) -> str:
    """A row as a line of text."""
    if row["kind"] != "model":
        return f"{row['method']}: {row['kind'].upper()}, not measured: {row['reason']}"
    return (
        f"{row['method']}: {row['ms']['median']:.4g} ms, peak {row['peak'] / 2**30:.2f} GiB, "
        f"{(row['peak'] - row['inference']) / row['weights']:+.3f} of the weights above inference"
    )

"""Forward-Grad (Baydin et al., arXiv 2202.08587)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from jaguar.backends.launches import StepInputs
from jaguar.method.directions import Gaussian
from jaguar.method.estimators import ForwardMode
from jaguar.method.method import Method
from jaguar.method.params import Slot, identity
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw, Elements
from jaguar.method.rules import SGD
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts
from jaguar.optimizers.measuring import Evaluate
from jaguar.optimizers.tangents import Tangents, say_once
from jaguar.optimizers.trials import Trials


class ForwardGrad(ZerothOrder):
    """Forward-Grad: SGD along a random direction with its exact directional derivative, from dual numbers.

        rho = d/dh f(x + h z) at h = 0,   z ~ N(0, I);   g = rho z;   x <- (1 - lr wd) x - lr g

    One forward pass of dual numbers a step (n with n directions), two to three times as long as a forward pass, and no
    finite difference. Activations in flight and the parameters of the modules in flight are held twice; no state: 0
    bytes per parameter. Records have f(x) and the n derivatives.

    Works with unmodified models. Attention runs in its plain form: the fused kernels have no forward-mode formulas. A
    parameter that is used outside its module (tied by hand, or in the closure) is noticed, and all tangents of the
    model then stay in memory: one number per parameter, in its dtype. z of parameters of half precision is rounded to
    their dtype in rho, and not in the step.

    Args:
        params: tensors (fp32, bf16, fp16, fp64), dicts with their own lr, weight_decay, or model.named_parameters(),
            whose names make the random numbers independent of the order.
        lr: learning rate; a parameter moves lr rho z_i.
        model: the module whose parameters they are; None: parameters are found in whatever modules the closure runs,
            and may be used by their owners only.
        weight_decay: decoupled, multiplied by lr.
        common: seed, backend, n_directions, rho_clip, rounding, maximize and shards, as `ZOSGD`; tau has no effect.

    Raises:
        ValueError: an argument is out of range; the message names what would be right.
        RuntimeError: (from a step) an operation of the model has no forward-mode formula; the message names it.

    Source: arXiv 2202.08587, Algorithm 1; compared in arXiv 2402.11592 (ZO-Bench).
    Equivalent to: `f, rho = torch.func.jvp(loss, (x,), (z,)); x -= lr * rho * z`.
    """

    _model: nn.Module | None = None
    _hold = False  # all tangents of the model are held

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        *,
        model: nn.Module | None = None,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        if common.get("restore") is not None:
            raise ValueError(f"restore={common['restore']!r}: forward mode perturbs nothing; leave it out")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be the module whose parameters are trained, got {type(model).__name__}")
        if common.get("momentum_dtype") is not None:
            raise ValueError(f"momentum_dtype={common['momentum_dtype']!r}: this method keeps no state; leave it out")
        decides, runs = parts(common, ForwardMode)
        self._model = model
        method = Method(Gaussian(), SGD(momentum=False), **decides)
        # No copies of parameters are needed: nothing moves them before the step.
        super().__init__(params, method, lr=lr, weight_decay=weight_decay, **runs | {"restore": "module"})
        if spread := [slot.name for slot in self.slots if slot.spread is not None]:
            raise ValueError(
                f"{spread[0]} is sharded, and Forward-Grad needs whole parameters, as dual numbers in their modules: "
                "use a method with finite differences (jaguar.ZOSGD)"
            )
        own = set() if model is None else {identity(p) for p in model.parameters()}
        if (
            strange := [slot.name for slot in self.slots if identity(slot.tensor) not in own]
            if model is not None
            else []
        ):
            raise ValueError(
                f"{', '.join(strange[:3])}{' and others' if len(strange) > 3 else ''} is no parameter of model=: give "
                "the module that has all of them"
            )

    def _losses(
        self, evaluate: Evaluate, inputs: StepInputs, hold: bool, places: Trials
    ) -> tuple[tuple[float, ...], Probe | None]:
        say_once("Forward-Grad: attention runs in its plain form, whose operations have forward-mode formulas")
        losses: list[float] = []
        for draw in inputs.draws:
            loss, rho = self._dual(evaluate, draw)
            losses += [rho] if losses else [loss, rho]
        return tuple(losses), None

    def _dual(self, evaluate: Evaluate, draw: Draw) -> tuple[float, float]:
        """f and its derivative along z."""
        found: list[float] = []

        def read(tangents: Tangents, loss: Tensor) -> None:
            found.append(tangents.read(loss))

        tangent = partial(_tangent, draw)
        with Tangents(self._roster.slots, tangent, self._model, self._hold) as tangents:
            loss = _explained(evaluate, partial(read, tangents))
        if tangents.plain or tangents.elsewhere:
            plain = sorted(tangents.plain)
            names = (
                ", ".join(plain[:3]) + " and others" * (len(plain) > 3) if plain else "a parameter of another process"
            )
            if self._hold or self._model is None:
                how = (
                    "fetch it from its module in the closure"
                    if self._hold
                    else "pass model=, and all tangents are held"
                )
                raise RuntimeError(
                    f"{names} was used outside the forward of the module that owns it, so its derivative would be "
                    f"missing: {how}, or freeze it"
                )
            say_once(f"Forward-Grad: {names} is used outside its module; all tangents are held")
            self._hold = True
            return self._dual(evaluate, draw)
        return loss, found[-1]


def _tangent(draw: Draw, slot: Slot) -> Tensor:
    x = slot.tensor
    z = Gaussian().values_of(draw, Elements(list(slot.spans(0, slot.count)), x.device))
    # With the same strides: a tangent that has others is copied.
    tangent = torch.empty_like(x).copy_(z.view(x.shape))
    if slot.kept is not None:
        tangent[slot.kept] = 0.0
    return tangent


def _explained(evaluate: Evaluate, read: Callable[[Tensor], None]) -> float:
    try:
        return evaluate(read)
    except (RuntimeError, NotImplementedError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        text = str(error).split("This might be")[0].strip()
        raise RuntimeError(
            f"this model cannot be differentiated in forward mode: {text} Use another implementation of that operation "
            "(attn_implementation='eager', say), or a method with finite differences (jaguar.ZOSGD)"
        ) from error

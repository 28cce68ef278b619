"""Other packages' optimizers in the same search, each from its own PyPI package and used as its documentation says.

    pip install --target FOLDER --no-deps mezo torchzero scipy cma typing_extensions

and `PYTHONPATH=FOLDER`. A package that is not there says so in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from learning.contenders import ZO_SGD, Contender


class _Mezo(torch.optim.Optimizer):
    """`mezo.update`, its step of Algorithm 1; it asks for a seed with every step."""

    passes = 2

    def __init__(self, module: Any, net: Any, seed: int, lr: float, tau: float) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], {"lr": lr})
        self._module, self._net, self._tau = module, net, tau
        self._seeds = torch.Generator().manual_seed(seed)

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """A step with a seed of its own."""
        seed = int(torch.randint(2**31, (), generator=self._seeds))
        lr = self.param_groups[0]["lr"]
        self._module.update(self._net, None, lambda net, inputs: closure(), self._tau, lr, seed)


class _Torchzero(torch.optim.Optimizer):
    """`torchzero.Optimizer` of a gradient approximation and a learning rate.

    `return_approx_loss` spares the third evaluation of a step, which would only say what the loss is.
    """

    passes = 2

    def __init__(self, module: Any, net: Any, seed: int, lr: float, tau: float, name: str) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], {"lr": lr})
        options = {"seed": seed} if name == "SPSA" else {}  # MeZO's seeds are the numbers of the steps
        estimate = getattr(module.m, name)(h=tau, return_approx_loss=True, **options)
        self._inner = module.Optimizer(self.param_groups[0]["params"], estimate, module.m.LR(lr))

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """A step at the learning rate of the schedule."""
        for group in self._inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self._inner.step(lambda backward=True: closure())


class _SeparableCMA(torch.optim.Optimizer):
    """`cma.CMAEvolutionStrategy` with a diagonal covariance: a step is a population, all on the same rows.

    `lr` is the standard deviation it begins with (its own sigma adapts, so a schedule changes nothing); the network is
    left at the mean, which its documentation recommends where there is noise.
    """

    def __init__(self, module: Any, net: Any, seed: int, lr: float) -> None:
        super().__init__([p for p in net.parameters() if p.requires_grad], {"lr": lr})
        start = torch.nn.utils.parameters_to_vector(self._parameters).detach().double().cpu().numpy()
        options = {"CMA_diagonal": True, "seed": seed + 1, "verbose": -9}  # seed 0 would be the clock
        self._strategy = module.CMAEvolutionStrategy(start, lr, options)
        self.passes = self._strategy.popsize

    @property
    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def _go_to(self, vector: Any) -> None:
        like = self._parameters[0]
        torch.nn.utils.vector_to_parameters(torch.as_tensor(vector).to(like), self._parameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """A population."""
        vectors = self._strategy.ask()
        losses = []
        for vector in vectors:
            self._go_to(vector)
            losses.append(float(closure()))
        self._strategy.tell(vectors, losses)
        self._go_to(self._strategy.result.xfavorite)


@dataclass(frozen=True)
class Peer(Contender):
    """A contender from another package; `method` is the package's name.

    Attributes:
        made_by: its optimizer, from the module, the network, a seed and the setting.
    """

    made_by: Callable[..., Any] = _Mezo

    def refusal(self, where: str) -> str:
        """Why it cannot run: it does not fit, or cannot be imported."""
        if reason := super().refusal(where):
            return reason
        try:
            import_module(self.method)
        except ImportError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def settings(self, where: str, grid: Sequence[float]) -> list[dict[str, float]]:
        """As others; sep-CMA has no length of a perturbation."""
        found = super().settings(where, grid)
        return [{"lr": each["lr"]} for each in found] if self.made_by is _SeparableCMA else found

    def passes(self, optimizer: Any) -> float:
        """Evaluations of a step."""
        return float(getattr(optimizer, "passes", 2))

    def optimizer(self, net: Any, steps: int, seed: int, setting: Mapping[str, float]) -> Any:
        """A new one over the trained parameters of a network."""
        return self.made_by(import_module(self.method), net, seed, **setting, **self.options)


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in sorted({peer.method for peer in PEERS}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# MeZO's settings for OPT (its README): eps 1e-3 for all weights, 1e-2 for what is trained instead of them.
_MEZO = {"": 1e-2, "reviews full": 1e-3}
_LARGE = {"reviews full": "a population of 60 vectors of 134.5 M numbers in fp64 takes 65 GB"}

PEERS = [
    Peer("mezo", "mezo", ZO_SGD, tau=_MEZO, runs=("reviews norms", "reviews lora")),
    Peer("torchzero MeZO", "torchzero", ZO_SGD, {"name": "MeZO"}, _MEZO, runs=("reviews norms",), made_by=_Torchzero),
    Peer("torchzero SPSA", "torchzero", ZO_SGD, {"name": "SPSA"}, _MEZO, runs=(), made_by=_Torchzero),
    Peer("sep-CMA (cma)", "cma", {"": 1e-2}, unfit=_LARGE, runs=("reviews norms",), made_by=_SeparableCMA),
]

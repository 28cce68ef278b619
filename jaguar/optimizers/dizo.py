"""DiZO (arXiv 2502.03304)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Unpack

from jaguar.backends.launches import StepInputs
from jaguar.method.directions import dense
from jaguar.method.method import Method
from jaguar.method.probe import Probe
from jaguar.method.rng import Draw
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.common import Common, parts
from jaguar.optimizers.measuring import Evaluate
from jaguar.optimizers.search import Projected, Search
from jaguar.optimizers.trials import Trials
from jaguar.record import Record

# Path components of query and value projections, in the architectures that have them apart.
_QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin")


class DiZO(ZerothOrder):
    """DiZO: ZO-SGD, and every few steps a zeroth-order search for how far each layer should be from where it began.

        every step       g = mean over directions of rho z;   m <- momentum m + g;   x <- (1 - lr wd) x - lr m
        before step t    t = every, 2 every, ...:   x_l <- x0_l + s_l (x_l - x0_l)   for the projected tensors l
        its search       s_l = 1;   search_steps times:   n_l ~ N(0, 1),   c = search_scale
                         r = (f(s + c n) - f(s - c n)) / (2 c);   s_l <- clip(s_l - search_lr r n_l, bounds)

    s_l is the paper's gamma_l over ||x_l - x0_l||. Two evaluations a step, and 2 search_steps more in one of `every`.
    State: x0 of the projected tensors in their dtype (4 bytes per fp32 parameter of them), m where there is momentum. A
    search takes a copy of the projected tensors for its time. The paper projects query and value projections, its
    released code keys and values of OPT, and undoes trial projections by division, which drifts; here they are taken
    back bit for bit.

    Args:
        params: model.named_parameters(), or dicts of such with their own lr, tau, momentum, weight_decay.
        lr: learning rate; a parameter moves lr rho z_i.
        momentum: heavy-ball factor in [0, 1); 0 keeps no state.
        weight_decay: decoupled, multiplied by lr.
        every: steps from one search to the next.
        search_steps: estimates of a search, of two evaluations each.
        search_scale, search_lr: tau and lr of the search, in multiples of the way from x0.
        bounds: limits of s_l; what is evaluated may lie outside, what is left never does.
        project: path components or whole names of the projected tensors; None: query and value projections.
        distribution: law of z: "gaussian" or "rademacher".
        common: tau, seed, backend, restore ("copy" or "module"), estimator, n_directions, rho_clip, rounding,
            momentum_dtype, maximize and shards, as `ZOSGD`.

    Raises:
        ValueError: an argument is out of range, or no tensor is projected; the message names what would be right.

    Source: arXiv 2502.03304, Algorithm 1; search settings of the released code (Skilteee/Divergence-driven-ZO).
    Equivalent to: `x -= lr * rho * z`, and now and then `x = x0 + s * (x - x0)`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        every: int = 50,
        search_steps: int = 10,
        search_scale: float = 0.2,
        search_lr: float = 10.0,
        bounds: tuple[float, float] = (0.8, 1.2),
        project: Collection[str] | None = None,
        distribution: str = "gaussian",
        **common: Unpack[Common],
    ) -> None:
        decides, runs = parts(common)
        if decides["walk"]:
            raise ValueError("restore='walk' leaves x, and a search starts from it: choose 'copy' or 'module'")
        if common.get("direction_group") is not None:
            raise ValueError(
                "direction_group measures the directions of a step apart, and each evaluation of a search follows from "
                "those before it: leave it out"
            )
        names = _QUERY_AND_VALUE if project is None else project
        rule = Projected(True, every, search_steps, search_scale, search_lr, bounds, names)  # type: ignore[arg-type]
        method = Method(dense(distribution), rule, **decides)
        super().__init__(params, method, lr=lr, momentum=momentum, weight_decay=weight_decay, **runs)
        if not any(self._rule.projects(slot) for slot in self.slots):
            first = ", ".join(repr(slot.name) for slot in self.slots[:3])
            raise ValueError(
                f"project={project!r}: none of {', '.join(self._rule.project)} is a part of the names {first}, ...: "
                "pass model.named_parameters(), and with project= the names of the tensors to project"
            )

    @property
    def _rule(self) -> Projected:
        assert isinstance(self.method.rule, Projected)
        return self.method.rule

    @property
    def _most_losses(self) -> int:
        return super()._most_losses + 2 * self._rule.search_steps

    def _n_losses(self, step: int) -> int:
        return super()._n_losses(step) + 2 * self._rule.search_steps * self._rule.searches(step)

    def _losses(
        self, evaluate: Evaluate, inputs: StepInputs, hold: bool, places: Trials
    ) -> tuple[tuple[float, ...], Probe | None]:
        if not self._rule.searches(self._step):
            return super()._losses(evaluate, inputs, hold, places)
        search = self._search()
        found = search.measured(evaluate)
        with search.found(found):
            losses, _ = super()._losses(evaluate, inputs, False, places)
        return found + losses, None

    def _lead(self, record: Record, inputs: StepInputs) -> bool:
        if not self._rule.searches(record.step):
            return super()._lead(record, inputs)
        self._search().project_(record.losses[: 2 * self._rule.search_steps])
        return True

    def _search(self) -> Search:
        """The search of this step; of no tensor where none has begun yet."""
        starts = dict(self._roster.copies("start"))
        slots = [slot for slot in self._roster.slots if slot.tensor in starts]
        tensors = [starts[slot.tensor] for slot in slots]
        return Search(
            self._rule, Draw(self._seed, self._step, 0), slots, tensors, self.method.stochastic, self.method.maximize
        )

"""What JAGUAR SignSGD and JAGUAR Muon share: sampled coordinates, and momentum that is entered only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaguar import ops
from jaguar.directions import Coordinates, ReleasedBlock
from jaguar.launches import Launches
from jaguar.optimizers.base import ZerothOrder
from jaguar.params import Slot


class CoordinateMomentum(ZerothOrder):
    """m_i <- beta m_i + (1 - beta) rho s_i for the sampled coordinates; subclasses say what moves then.

    Args:
        params: as torch's optimizers.
        values: what a parameter group may set, and its default.
        options: of the subclass, for the checkpoint.
        coordinates, layout, signs: how S is drawn.
        update: "sampled" or "all": what the sign rule moves.
        released: draw what the authors' released code draws; momentum starts at 0 in every step.
        fixed: arguments that `released` decides, by name: (what was given, the default).
        common: keyword arguments of `ZerothOrder`.
    """

    momentum_key = "beta"
    _fate_of_lost = "are not trained"
    _direction: Coordinates | ReleasedBlock

    def __init__(
        self,
        params: Any,
        values: dict[str, Any],
        *,
        options: dict[str, Any],
        coordinates: int | float,
        layout: str,
        signs: str,
        update: str,
        released: bool,
        fixed: Mapping[str, tuple[Any, Any]],
        **common: Any,
    ) -> None:
        if update not in ("sampled", "all"):
            raise ValueError(f"update={update!r}: choose 'sampled' or 'all'")
        self._update = update
        sampling = Coordinates(coordinates, layout, signs)
        self._direction = sampling
        if released:
            for name, (value, default) in fixed.items():
                if value != default:
                    raise ValueError(
                        f"released=True fixes {', '.join(fixed)}, so {name}={value!r} cannot be given with it"
                    )
            self._direction = ReleasedBlock()
            self.group_keys = tuple(key for key in self.group_keys if key in ("lr", "tau", "weight_decay"))
        options = {
            "optimizer": type(self).__name__,
            "coordinates": sampling.coordinates,
            "layout": layout,
            "signs": signs,
            "update": update,
            "released": bool(released),
        } | options
        defaults = {key: values[key] for key in (*self.group_keys, *self.group_flags) if key in values}
        super().__init__(params, defaults, options=options, **common)
        self._check_enough(self._slots)

    def _check_enough(self, slots: Sequence[Slot]) -> None:
        count, total = self._options["coordinates"], sum(slot.total for slot in slots)
        if slots and isinstance(count, int) and count > total:
            raise ValueError(f"coordinates={count} is more than the {total} there are; a float in (0, 1] is a fraction")

    @property
    def fraction(self) -> float:
        """p: the probability that a coordinate is sampled in a step (of a matrix, with a block layout)."""
        return self._direction.fraction(sum(slot.total for slot in self._slots if slot.tensor.requires_grad))

    def _make_steps(self, slots: Sequence[Slot]) -> Launches:
        self._check_enough(slots)
        return ops.coordinate_steps(self._backend, slots, self._direction, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        """What all launches of this optimizer are made with."""
        return {
            "update": self._update,
            "stochastic": self._stochastic,
            "two_sided": self._estimator.name == "two-sided",
            "n_directions": self._n_directions,
        }

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return True

    def _describe(self) -> list[str]:
        p = self.fraction
        what = (
            "released code's joint block"
            if self._options["released"]
            else (f"{self._options['coordinates']!r}, layout {self._options['layout']}, signs {self._options['signs']}")
        )
        betas = sorted({group.get("beta", 0.0) for group in self.param_groups})
        memory = " / ".join(f"{1.0 / (p * (1.0 - beta)):,.0f}" for beta in betas)
        return [
            f"coordinates: {what} (fraction {p:.6g}), update {self._update}",
            f"momentum: {self._options['momentum_dtype'] or 'parameter precision'}, remembers {memory} steps",
            f"estimator: {self._estimator.name}, {self._n_directions} direction(s), rounding "
            f"{self._options['rounding']}",
        ]

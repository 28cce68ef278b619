"""The tensors that an optimizer trains: which take part, the launches for them, and what a step gives these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from jaguar.backends.bind import Bound, bind
from jaguar.backends.launches import Lost, StepInputs
from jaguar.backends.uploads import refuse_capture
from jaguar.method.method import Method
from jaguar.method.params import Kind, Slot
from jaguar.method.probe import Derivatives, Probe, choose_restore
from jaguar.method.rng import Draw
from jaguar.method.rule import Scalars
from jaguar.optimizers.freezing import Frozen
from jaguar.optimizers.fully_sharded import FullySharded, all_lost
from jaguar.optimizers.state import Roster, buffers_of, copies_of
from jaguar.record import Record

Groups = Sequence[Mapping[str, Any]]


class Sizes(NamedTuple):
    """Lengths of a step, by parameter group.

    Attributes:
        lrs: learning rates.
        taus: lengths of the perturbation.
    """

    lrs: tuple[float, ...]
    taus: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """A step that was measured and not applied.

    Attributes:
        record: what was measured.
        probe: the last probe, if the parameters are not back yet.
        scalars: what the launches of the step will read.
    """

    record: Record
    probe: Probe | None
    scalars: Mapping[Kind, Scalars]


class Trained:
    """Slots and their launches, made when a step needs them and kept until something changes.

    Args:
        method: what is computed.
        backend: which `availability.choose` returned.
        restore: how dense directions get back: "copy", "module" or None.

    Attributes:
        slots: all tensors of the optimizer, in canonical order.
        frozen: those that have requires_grad=False by now.
        roster: those that take part.
        sharded: the FSDP2 modules of those.
    """

    def __init__(self, method: Method, backend: str, restore: str | None) -> None:
        self._method, self._backend, self._restore = method, backend, restore
        self.slots: list[Slot] = []
        self.frozen = Frozen()
        self.roster = Roster([], {}, [])
        self.sharded = FullySharded([])
        self._bound: Bound | None = None
        # A length, and the direction and the slots that it is of.
        self._known: tuple[float, Draw | None, Sequence[Slot]] = (1.0, None, ())

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own launches: compiled functions cannot be pickled.
        return vars(self) | {"_bound": None, "sharded": FullySharded([])}

    def take(self, slots: list[Slot]) -> None:
        """Other slots from now on.

        Raises:
            ValueError: they cannot be moved as it was asked for.
        """
        spread = [slot.name for slot in slots if slot.spread is not None]
        if spread and self._restore == "module" and self._method.estimator.points:
            raise ValueError(
                f"restore='module' moves a tensor when its module runs, and {spread[0]} is sharded: FSDP2 gathers it "
                "before that. Choose 'copy', or None"
            )
        self.slots, self._bound = slots, None

    def read_frozen(self) -> None:
        """Looks which tensors have requires_grad=False."""
        if self.frozen.read(self.slots):
            self._bound = None

    @property
    def bound(self) -> Bound:
        """The launches, over tensors that `launches` looked at."""
        assert self._bound is not None
        return self._bound

    def launches(self, groups: Groups, state: dict[Tensor, dict[str, Any]]) -> Bound:
        """The launches, over tensors that are seen to be in their places.

        Args:
            groups, state: the optimizer's.

        Raises:
            RuntimeError: a tensor is not where it should be, or a CUDA graph is being captured, for which the numbers
                of this one step would be those of every replay.
        """
        if self._bound is None:
            self.slots = self._method.in_roles(self.slots, groups)
            taking_part = [slot for slot in self.slots if slot.parameter.requires_grad]
            self._method.direction.check(taking_part)
            restore = "walk" if self._method.walk else self._restore or choose_restore(taking_part)
            self.sharded = FullySharded(taking_part)
            self._bound = bind(self._method, taking_part, groups, self._backend, restore)
            self.roster = self._roster(taking_part, groups, state)
        elif self.roster.entries is not state:
            self.roster = self._roster(self.roster.slots, groups, state)
        for device in self.roster.devices:
            refuse_capture(device)
        if self.roster.moved():
            self._bound.check(self.roster.state)
        return self._bound

    def lost(self, inputs: StepInputs) -> list[Lost]:
        """The perturbations that rounding swallows, per tensor, of all processes that hold parts of it."""
        return all_lost(self.bound.lost(inputs), self.roster.slots)

    def n_perturbed(self, inputs: StepInputs) -> int:
        """Number of coordinates that a direction moves; where only parts of them are here, the expected number."""
        if not self.roster.spread:
            return self.bound.n_perturbed(inputs)
        total = sum(slot.total for slot in self.roster.slots)
        return round(self._method.direction.fraction(total) * total)

    def _roster(self, slots: Sequence[Slot], groups: Groups, state: dict[Tensor, dict[str, Any]]) -> Roster:
        return Roster(slots, state, buffers_of(self._method, slots, groups), copies_of(self._method, slots, groups))

    def forget(self) -> None:
        """A step is over: nothing that was drawn or saved for it lasts."""
        if self._bound is not None:
            self._bound.forget()

    @contextmanager
    def forgets_failures(self) -> Iterator[None]:
        """Nothing lasts where what is inside fails: a step that is tried again begins anew."""
        try:
            yield
        except BaseException:
            self.forget()
            self.drop_state()
            raise

    def make_state(self) -> None:
        """Makes the state buffers that are missing."""
        if self.roster.make(self._method):
            self.bound.check(self.roster.state)

    def drop_state(self) -> None:
        """Drops the state that lasts for a step only; nothing else may keep it alive."""
        if self.roster.drop():
            self.bound.check(self.roster.state)

    def inputs(self, draws: tuple[Draw, ...], scalars: Mapping[Kind, Scalars]) -> StepInputs:
        """Inputs of the launches of a step."""
        active = self._method.direction.active(draws[0], self.roster.slots)
        return StepInputs(draws, scalars, self.roster.state, active)

    def scalars(
        self, draw: Draw, groups: Groups, sizes: Sizes, t: int, derivatives: Derivatives | None = None
    ) -> dict[Kind, Scalars]:
        """The scalars of every kind of tensor; without weights where there are no derivatives.

        Args:
            draw: the step's first direction.
            t: number of the step among those that moved something, from 1.
        """
        made: dict[Kind, Scalars] = {}
        length = self._length(draw)
        for kind in self.roster.kinds:
            group, (lr, tau) = groups[kind.group], (by_group[kind.group] for by_group in sizes)
            rho = derivatives(tau, kind.double) if derivatives is not None else ()
            made[kind] = self._method.scalars(kind, group, lr, tau, rho, t, length)
        return made

    def _length(self, draw: Draw) -> float:
        """The length of the step's direction, which takes a pass over all of it: found once a step."""
        if not self._method.direction.alone:
            return 1.0
        found, of, slots = self._known
        if of != draw or slots is not self.roster.slots:
            found = self._method.direction.length(draw, self.roster.slots)
            self._known = found, draw, self.roster.slots
        return found

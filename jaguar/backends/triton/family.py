"""The base of the launches of coordinate and of dense directions: when tables and buffers are made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jaguar.backends.launches import State, StepInputs
from jaguar.backends.triton.device_scalars import DeviceScalars
from jaguar.backends.triton.plan import Launch, Plan, Pool
from jaguar.backends.uploads import for_replays
from jaguar.method.method import Method
from jaguar.method.params import Slot


class Family:
    """Launches over a list of slots; `numbers` are filled by the caller, before `prepare`."""

    def __init__(self, method: Method, slots: Sequence[Slot], plan: Plan, numbers: DeviceScalars) -> None:
        self._method, self._slots, self._plan, self._numbers = method, slots, plan, numbers
        self._state: State = [()] * len(slots)
        self._moving: Launch | None = None
        self._updating: Launch | None = None
        self._buffers: dict[Pool, Tensor] = {}
        self.wrote = False

    def check(self, state: State) -> None:
        """Looks at all tensors again and makes the tables for them.

        Raises:
            RuntimeError: one cannot be given to a kernel; nothing was launched.
        """
        self._state, self._moving, self._updating = state, None, None
        self._plan.check(state)
        self._moving, self._updating = self._tables(state)

    def prepare(self, inputs: StepInputs) -> None:
        """Makes what is missing, tables and buffers: before a step's probes, and again when the weights are known.

        Who captures launches in a CUDA graph captures this too: buffers that were made outside are gone after a step.
        """
        if self._moving is None or (inputs.known and self._updating is None):
            self.check(inputs.state)
        self._allocate(inputs, inputs.known)

    def forget(self) -> None:
        """The buffers."""
        self._release()

    def _now(self) -> Launch:
        """The tables of launches that move parameters, for tensors as they are."""
        if self._moving is None:  # they could not be made, and the reason is told again
            self.check(self._state)
        assert self._moving is not None
        return self._launched(self._moving)

    def _launched(self, work: Launch) -> Launch:
        """`work`; its tables and numbers are those of every replay, where a CUDA graph is captured."""
        for table in work.tables:
            for_replays(table.device, table, self._numbers)
        return work

    def _tables(self, state: State) -> tuple[Launch, Launch | None]:
        """Those of launches that move parameters, and of those that move state as well, where there is state."""
        raise NotImplementedError

    def _saved(self, pool: Pool) -> Tensor:
        """The buffer of the values that a probe saves; those of one step share it."""
        if pool not in self._buffers:
            self._buffers[pool] = self._plan.saved(pool)
        return self._buffers[pool]

    def _allocate(self, inputs: StepInputs, known: bool) -> None:
        """Buffers of the probes, or of the update where weights are `known`."""
        raise NotImplementedError

    def _release(self) -> None:
        self._buffers.clear()

"""torch.optim.Optimizer's hooks, around more than torch's own state: same calls, same order, same arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from jaguar.record import Record

# Runs the step hooks around a method, as torch does around `step`.
with_step_hooks: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step

_AROUND_STATE = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Contract(torch.optim.Optimizer):
    """An optimizer whose state_dict has more than torch's; hooks on saving and loading see all of it.

    Subclasses say what `_packed` adds, and how `_unpack` takes it.
    """

    _record_hooks: dict[int, Callable[[Any, Record], None]]

    def register_record_hook(self, hook: Callable[[Any, Record], None]) -> RemovableHandle:
        """Calls `hook(optimizer, record)` after every step that was applied, by `step` or by `apply_`.

        Parameters and state are those after the step. What the hook raises reaches the caller, and the step stays.

        Returns:
            A handle whose `remove()` takes the hook away.
        """
        handle = RemovableHandle(self._record_hooks)
        self._record_hooks[handle.id] = hook
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Torch's state_dict, with step counter, seed and options under "jaguar"; loads with weights_only=True."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        with self._without_hooks():
            state = self._packed(super().state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, in the dtypes that were saved; nothing changes if it does not fit.

        Parameters are matched by name where there are names, else by position.

        Raises:
            ValueError: it is of another optimizer, other options or other parameters; the first difference is named.
        """
        state_dict = state_dict.copy()
        for load_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = load_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        with self._without_hooks():
            self._unpack(state_dict, super().load_state_dict)
        for last_hook in self._optimizer_load_state_dict_post_hooks.values():
            last_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Hooks are of the optimizer that they were given to: a copy has none. A state that is loaded comes here, too.
        self.__dict__.setdefault("_record_hooks", OrderedDict())

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Torch's state_dict and the subclass's part."""
        raise NotImplementedError

    def _unpack(self, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """Takes what `_packed` gave; `load` takes torch's part."""
        raise NotImplementedError

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """Torch's own methods would run them too early, or too late."""
        hooks = {name: getattr(self, name) for name in _AROUND_STATE}
        self.__dict__.update({name: OrderedDict() for name in _AROUND_STATE})
        try:
            yield
        finally:
            self.__dict__.update(hooks)

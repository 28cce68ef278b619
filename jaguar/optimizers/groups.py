"""Parameter groups: what may stand in one, and that only the learning rate changes during a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from jaguar.method.params import canonical_name, check_tensor, identity, is_int, named_entries
from jaguar.method.rule import COMMON, Range


def split_groups(params: Any) -> list[dict[str, Any]]:
    """Torch's `params` argument (tensors, dicts or named tensors) as a list of group dicts."""
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (str, set, dict)) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be an ordered iterable of tensors, of dicts, or of (name, tensor), got "
            f"{type(params).__name__}"
        )
    entries = list(params)
    if not entries:
        raise ValueError("the list of parameters is empty: pass model.parameters() or model.named_parameters()")
    if any(isinstance(entry, dict) for entry in entries):
        if not all(isinstance(entry, dict) for entry in entries):
            raise TypeError("params mixes dicts and tensors: give every parameter in a dict, or none")
        return [dict(entry) for entry in entries]
    return [{"params": entries}]


def check_group(keys: Mapping[str, Range], group: Mapping[str, Any], where: str, flags: Sequence[str] = ()) -> None:
    """Raises ValueError for an option that a group cannot have, or a number (`keys`) outside its range."""
    for key in group:
        if key not in (*keys, *flags, "params", "param_names", "initial_lr"):
            raise ValueError(
                f"{where} has the option {key!r}; a parameter group may set {', '.join((*keys, *flags))}, and "
                "everything else is an argument of the optimizer"
            )
    for key in keys:
        if key not in group:
            continue
        try:
            value = float(group[key])
        except (TypeError, ValueError, RuntimeError):  # from a tensor with more than one element
            raise ValueError(f"{key}={group[key]!r} of {where} is not a number") from None
        if not keys[key].admits(value):
            raise ValueError(f"{key}={value} of {where}{keys[key].wanted}")


def check_any(n_trained: int, n_frozen: int) -> None:
    """Raises ValueError where there is nothing to train."""
    if not n_trained:
        raise ValueError(
            f"no parameter to train: all {n_frozen} tensors have requires_grad=False; call requires_grad_() on those "
            "that should train"
            if n_frozen
            else "the list of parameters is empty"
        )


def prepared_group(
    group: dict[str, Any], others: Sequence[dict[str, Any]], keys: Mapping[str, Range], flags: Sequence[str] = ()
) -> tuple[dict[str, Any], int]:
    """The group as torch takes it, and how many frozen tensors were left out.

    Tensors with requires_grad=False are left out; tied tensors are there once, under the alphabetically first of
    their names.

    Raises:
        ValueError: an unknown option, a value out of range, a tensor that cannot be trained, or one in two groups.
    """
    if not isinstance(group, dict) or "params" not in group or isinstance(group["params"], set):
        raise TypeError("a parameter group is a dict whose 'params' are tensors in a fixed order (a set has none)")
    check_group(keys, group, f"parameter group {len(others)}", flags)
    elsewhere = {identity(tensor) for other in others for tensor in other["params"]}
    kept: dict[Any, tuple[str | None, Tensor]] = {}
    n_frozen, has_names = 0, False
    for position, (name, tensor) in enumerate(named_entries(group["params"])):
        label = f"parameter {name!r}" if name is not None else f"parameter #{position}"
        # A frozen Parameter may be anything (a quantised weight under an adapter); a bare tensor was meant to train.
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
            check_tensor(label, tensor)
        has_names = name is not None
        if not tensor.requires_grad:
            n_frozen += 1
            continue
        key = identity(tensor)
        if key in elsewhere:
            raise ValueError(f"{label} (or the tensor it is tied to) is already in another parameter group")
        if key not in kept or _before(name, kept[key][0]):
            kept[key] = (name, tensor)
    named = [name is not None for name, _ in kept.values()]
    if any(named) and not all(named):
        raise ValueError("some parameters have names and some do not: pass model.named_parameters(), or tensors only")
    entries = list(kept.values()) if all(named) else [tensor for _, tensor in kept.values()]
    numbers = {key: float(group[key]) for key in keys if key in group and not isinstance(group[key], Tensor)}
    nameless: dict[str, Any] = (
        {"param_names": []} if has_names and not kept else {}
    )  # torch asks for names in all groups or in none
    return group | numbers | nameless | {"params": entries}, n_frozen


def _before(name: str | None, other: str | None) -> bool:
    return name is not None and other is not None and canonical_name(name) < canonical_name(other)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, bool)) else float(value)


class FrozenGroups:
    """Parameter groups of the first measure: everything but the learning rate stays as it was then."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key for key in keys if key != "lr"]
        self._first: list[dict[str, Any]] | None = None

    @property
    def started(self) -> bool:
        """Tells whether a step was measured."""
        return self._first is not None

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raises RuntimeError where a group is not what it was at the first call, ValueError for a bad lr."""
        now = [{key: _plain(group.get(key)) for key in self._keys} for group in groups]
        if self._first is None:
            self._first = now
        for i, (old, new, group) in enumerate(zip(self._first, now, groups, strict=True)):
            for key in self._keys:
                if old[key] != new[key]:
                    raise RuntimeError(
                        f"{key} of parameter group {i} changed from {old[key]} to {new[key]} during the run; only lr "
                        "may be scheduled (with OneCycleLR: cycle_momentum=False)"
                    )
            check_group(COMMON, {"lr": group["lr"]}, f"parameter group {i}")

    def restart(self, groups: Sequence[dict[str, Any]] | None) -> None:
        """Takes these groups as the first ones (None: the next ones that are checked)."""
        self._first = None
        if groups is not None:
            self.check(groups)


def validate_seed(seed: Any) -> int:
    """`seed`, if it is a uint64.

    Raises:
        ValueError: it is not.
    """
    if not is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: give an int in [0, 2**64)")
    return int(seed)

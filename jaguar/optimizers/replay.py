"""Replay: from a base model and a journal to the weights and state of any step, without data or forward passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from jaguar import optimizers
from jaguar.backends.availability import Unavailable
from jaguar.method.described import KINDS, rebuilt
from jaguar.method.method import Method
from jaguar.method.params import canonical_name
from jaguar.optimizers.base import ZerothOrder
from jaguar.optimizers.identity import deciding, environment, fingerprint_of, fingerprint_of_rest
from jaguar.optimizers.names import METHODS
from jaguar.optimizers.search import Projected
from jaguar.record import DamagedJournal, Journal, Mark
from jaguar.record import header as headers

# Classes that a journal can name.
_NAMES = {row.cls for row in METHODS.values() if row.cls} | {"ZerothOrder"}
_OWN_KINDS = KINDS | {"Projected": Projected}


def optimizer_of(model: nn.Module, journal: Journal, backend: str = "auto") -> ZerothOrder:
    """The optimizer that wrote a journal, on a model as it was when the journal began.

    Args:
        model: has the tensors of the journal by name; they are set to require gradients, which marks what trains.
        backend: as of `ZerothOrder`.

    Raises:
        ValueError: the model, or this version of the package, does not fit; the message names what.
    """
    header, path = journal.header, str(journal.path)
    named = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        entries, groups = header["parameters"], [dict(values) for values in header["groups"]]
        lacking = [entry["name"] for entry in entries if entry["name"] not in named]
        if lacking:
            raise ValueError(
                f"{path!r} trains {lacking[0]!r}{' and others' * (len(lacking) > 1)}, which the model does not have: "
                "give the same base model, with the same adapter"
            )
        members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
        for entry in entries:
            named[entry["name"]].requires_grad_()
            members[entry["group"]].append((entry["name"], named[entry["name"]]))
        # With lr = 1 a rate that is kept as its ratio to lr stays what it was.
        groups = [values | {"lr": 1.0, "params": own} for values, own in zip(groups, members, strict=True)]
        method, kind = rebuilt(header["method"], _OWN_KINDS), str(header["optimizer"])
        rates = [float(lr) for lr in header["initial_lr"]]
        if not isinstance(method, Method) or kind not in _NAMES:
            raise ValueError(
                f"{path!r} was written by {kind!r}, which is no class of jaguar: make it, and "
                "replay(optimizer, journal)"
            )
        if len(rates) != len(groups):
            raise ValueError(f"{path!r} has {len(groups)} parameter groups, and {len(rates)} learning rates")
        optimizer: ZerothOrder = getattr(optimizers, kind).of(
            groups, method, seed=header["seed"], backend=backend, lr=1.0
        )
    except (torch.OutOfMemoryError, Unavailable):
        raise
    # Values of wrong kinds, which no journal of jaguar has, fail somewhere.
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise DamagedJournal(f"{path!r} does not say what a replay needs: {type(error).__name__}: {error}") from error
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    return optimizer


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Sets requires_grad of all parameters back where something fails."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for p, required in before:
            p.requires_grad_(required)
        raise


def replay(
    model: nn.Module | ZerothOrder,
    journal: Journal | str | os.PathLike[str],
    steps: int | None = None,
    *,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> ZerothOrder:
    """Moves a model by the records of a journal, and compares its weights with every fingerprint on the way.

        for each record of the journal, from that of step optimizer.steps_done on: optimizer.apply_(record)

    Args:
        model: the base model as the run had it (dtype, adapter), or an optimizer at any step of the journal.
        journal: or its path.
        steps: number of finished steps to stop at; None: those of the run's model.
        backend: as of `ZerothOrder`; the bits of sign rules depend on none, those of others on theirs.
        progress: is called after every step with the number of finished steps.

    Returns:
        The optimizer, with its state after `steps` steps: it can go on.

    Raises:
        ValueError: model or optimizer do not fit the journal, or have other weights than the run had; the message says
            which step and what differs.

    Source: MeZO (arXiv 2305.17333), section 2: a run is its seed and its scalars.
    Equivalent to: `for record in journal: optimizer.apply_(record)`.
    """
    opened = journal if isinstance(journal, Journal) else Journal.read(journal)
    with ExitStack() as stack:
        if opened is not journal:
            stack.enter_context(opened)
        if isinstance(model, ZerothOrder):
            optimizer = model
        else:
            stack.enter_context(_flags_kept(model))
            optimizer = optimizer_of(model, opened, backend)
        check_same(optimizer, opened)
        if isinstance(model, nn.Module):
            check_frozen(optimizer, model, opened)
        last = opened.chosen if steps is None else steps
        first = optimizer.steps_done
        if not opened.first <= first <= last <= opened.next_step:
            raise ValueError(
                f"{str(opened.path)!r} leads from {opened.first} finished steps to {opened.next_step}: there is no way "
                f"from {first} to {last}"
            )
        check_weights(optimizer, opened)
        marked = {mark.step for mark in opened.marks}
        records = opened.since(first)
        while optimizer.steps_done < last:
            try:
                optimizer.apply_(next(records))
            except ArithmeticError as error:  # of numbers that no run measured
                raise DamagedJournal(
                    f"{str(opened.path)!r} is damaged: the record of step {optimizer.steps_done}: {error}"
                ) from error
            if optimizer.steps_done in marked:
                check_weights(optimizer, opened)
            if progress is not None:
                progress(optimizer.steps_done)
        return optimizer


def check_same(optimizer: ZerothOrder, journal: Journal) -> None:
    """Raises ValueError, with what differs, unless an optimizer is the one that a journal is of."""
    headers.compare(journal.path, journal.header, deciding(optimizer))


def check_frozen(optimizer: ZerothOrder, model: nn.Module, journal: Journal) -> None:
    """Raises ValueError where the parameters that do not train are others than in the run of a journal."""
    wanted = journal.header.get("base", {}).get("frozen")
    if wanted is not None and (found := fingerprint_of_rest(model, optimizer)) not in (None, wanted):
        raise ValueError(
            f"the model's frozen parameters are not those that the run of {str(journal.path)!r} had: fingerprint "
            f"{found}, not {wanted}; load the same base model, in the same precision"
        )


def check_weights(optimizer: ZerothOrder, journal: Journal) -> None:
    """Raises ValueError where the weights are not those that a journal notes of this step; without a note it passes."""
    step = optimizer.steps_done
    wanted = journal.noted(step)
    if wanted is None or (found := fingerprint_of(optimizer)) is None or found == wanted:
        return
    when = "when it began" if step == journal.first else f"after {step} steps"
    raise ValueError(
        f"the trained tensors are not those that the run of {str(journal.path)!r} had {when}: fingerprint {found}, not "
        f"{wanted}{ran_elsewhere(optimizer, journal)}"
    )


def mark_of(optimizer: ZerothOrder, chosen: bool = False, back: int = 0) -> Mark | None:
    """The mark of an optimizer's weights as they are now; None where a part of one is elsewhere.

    Args:
        chosen: the run ends with them.
        back: number of steps by which they are older than the optimizer's state, where older ones were loaded.
    """
    found = fingerprint_of(optimizer)
    return None if found is None else Mark(optimizer.steps_done - back, found, chosen)


def ran_elsewhere(optimizer: ZerothOrder, journal: Journal) -> str:
    """The differences between where a journal was written and here, which may be the reason for other bits."""
    then, now = journal.header.get("environment", {}), environment(optimizer)
    other = [f"{key} {then[key]}, here {now[key]}" for key in now if then.get(key, now[key]) != now[key]]
    return f"; it ran with {'; '.join(other)}" if other else ""

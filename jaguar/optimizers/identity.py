"""Identity of an optimizer as plain values, for the header of a journal: what decides its bits, and where it runs."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn

from jaguar.method import rng
from jaguar.method.described import described
from jaguar.method.params import canonical_name, identity
from jaguar.optimizers.fingerprint import fingerprint
from jaguar.optimizers.measuring import Measuring
from jaguar.record import header as headers
from jaguar.record.journal import entry_size


def deciding(optimizer: Measuring) -> dict[str, Any]:
    """The part of a header that decides the bits of every step, given its record."""
    method = optimizer.method
    kept = [key for key in (*method.keys, *method.rule.flags) if key != "lr"]
    parameters = [
        {
            "name": slot.name,
            "shape": list(slot.shape),
            "dtype": str(slot.tensor.dtype).removeprefix("torch."),
            "group": slot.group,
            "kept": slot.kept,
        }
        for slot in optimizer.slots
    ]
    return {
        "format": headers.FORMAT,
        "entry": entry_size(optimizer.record_size),
        # A class that somebody derived computes what the public one does, or its fingerprints tell.
        "optimizer": next(cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith("jaguar.")),
        "method": described(method),
        "rng": rng.TAG,
        "seed": optimizer.seed,
        "groups": [{key: _plain(group[key]) for key in kept if key in group} for group in optimizer.param_groups],
        "parameters": parameters,
    }


def fingerprint_of(optimizer: Measuring) -> str | None:
    """The fingerprint of the trained tensors; None where a part of one is elsewhere."""
    slots = optimizer.slots
    if any(slot.count != slot.total for slot in slots):
        return None
    return fingerprint((slot.name, slot.tensor) for slot in slots)


def fingerprint_of_rest(model: nn.Module, optimizer: Measuring) -> str | None:
    """The fingerprint of a model's parameters that an optimizer does not train; None where one is not here."""
    trained = {identity(slot.tensor) for slot in optimizer.slots}
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    if any(p.is_meta or type(p.data) is not torch.Tensor for p in named.values()):
        return None
    return fingerprint((name, p) for name, p in named.items() if identity(p) not in trained)


def environment(optimizer: Measuring) -> dict[str, Any]:
    """Versions and devices, on which bits of matrix products may depend."""
    device = optimizer.slots[0].tensor.device if optimizer.slots else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "jaguar": sys.modules["jaguar"].__version__,  # an import from up here would be a circle
        "torch": torch.__version__,
        "device": f"{device.type}, {name}",
        "threads": torch.get_num_threads(),
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, str)) else float(value)

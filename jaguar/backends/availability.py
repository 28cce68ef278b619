"""The backends, each one value, in order of preference: whether it can run here, what it refuses, and how it binds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jaguar.backends import reference
from jaguar.backends.launches import Launches
from jaguar.backends.polar import cuda
from jaguar.backends.polar.schedule import Products
from jaguar.method.directions import Mixed, Sparse
from jaguar.method.method import Method
from jaguar.method.params import Slot

if TYPE_CHECKING:  # kernels are imported where there are some
    from jaguar.backends.triton import DeviceScalars

Groups = Sequence[Mapping[str, Any]]


class Unavailable(RuntimeError):
    """A backend was named that cannot run here."""


Bind = Callable[[Method, Sequence[Slot], Sequence[Slot], str, "DeviceScalars | None"], Launches]


@dataclass(frozen=True)
class Backend:
    """A way to run launches.

    Attributes:
        name: which users choose it by.
        missing: the reason why it cannot run here; None: it can.
        bind: launches of a method over some of its slots, given all slots, the way back, and the numbers that kernels
            read; None: it has none, but products of Newton-Schulz.
        refuses: the reason why it cannot run a method, as the end of "cannot draw this: "; None: it can.
        unfit: the reason why it cannot take a tensor, as the end of "cannot take NAME: it "; None: it can.
        emulated: whether it runs on CPU tensors, slowly: then it is taken where it is named, and not by "auto".
        products: of Newton-Schulz in 16 bits, on tensors of GPUs; None: the reference's iteration is taken.
    """

    name: str
    missing: Callable[[], str | None]
    bind: Bind | None
    refuses: Callable[[Method, Groups], str | None] = lambda *_: None
    unfit: Callable[[Slot], str | None] = lambda _: None
    emulated: Callable[[], bool] = lambda: False
    products: Callable[[], Products] | None = None

    @property
    def device(self) -> str:
        """Type of the devices whose matrices its products take."""
        return "cpu" if self.emulated() else "cuda"


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not interpreted() and not torch.cuda.is_available():
        return (
            "there is no NVIDIA GPU (with TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the "
            "kernels on CPU tensors, slowly)"
        )
    if not interpreted() and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "Triton needs a C compiler to launch kernels, and there is no gcc or clang on the PATH"
    return None


def interpreted() -> bool:
    """Tells whether Triton's interpreter runs the kernels; decided when they are imported."""
    loaded = sys.modules.get("jaguar.triton_kernels.launch")
    if loaded is not None:
        return bool(loaded.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def undrawable(method: Method, groups: Groups) -> str | None:
    """The reason why kernels, where there are any, cannot run a method; None: they can."""
    from jaguar.backends.triton.supported import unsupported

    return unsupported(method, groups)


def unfit(slot: Slot) -> str | None:
    """The reason why kernels cannot take a tensor, of which they see an address and a length; None: they can."""
    x = slot.tensor
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        where = "only CPU tensors, because TRITON_INTERPRET=1 is set" if interpreted() else "only on NVIDIA GPUs"
        return f"is on {x.device}, and the kernels run {where}"
    if not x.is_contiguous():
        return f"is not contiguous (shape {tuple(x.shape)}, strides {x.stride()})"
    if slot.width is not None:
        return f"holds rows of {slot.width} elements of a tensor, and the kernels run over one run of elements"
    return None


def _kinds(method: Method) -> tuple[bool, bool]:
    return isinstance(method.direction, Sparse), isinstance(method.direction, Mixed)


def _bind_triton(
    method: Method, slots: Sequence[Slot], everything: Sequence[Slot], restore: str, numbers: DeviceScalars | None
) -> Launches:
    from jaguar.backends import triton

    assert numbers is not None
    sparse, mixed = _kinds(method)
    if sparse:
        return triton.CoordinateLaunches(method, slots, everything, numbers)
    return (triton.MixedLaunches if mixed else triton.DenseLaunches)(method, slots, restore, numbers)


def _bind_reference(
    method: Method, slots: Sequence[Slot], everything: Sequence[Slot], restore: str, numbers: DeviceScalars | None
) -> Launches:
    sparse, mixed = _kinds(method)
    if sparse:
        return reference.CoordinateLaunches(method, slots)
    return (reference.MixedLaunches if mixed else reference.DenseLaunches)(method, slots, restore)


def _triton_products() -> Products:
    from jaguar.backends.polar.triton import TritonProducts

    return TritonProducts()


BACKENDS = (
    Backend("cuda", cuda.missing, None, products=cuda.CudaProducts),
    Backend(
        "triton",
        _missing_triton,
        _bind_triton,
        lambda *of: undrawable(*of),
        lambda slot: unfit(slot),
        lambda: interpreted(),
        _triton_products,
    ),
    Backend("reference", lambda: None, _bind_reference),
)
# As users choose, the one that needs nothing first.
NAMES = ("auto", *reversed([backend.name for backend in BACKENDS]))


def named(name: str) -> Backend:
    """The backend of a name."""
    return next(backend for backend in BACKENDS if backend.name == name)


def unavailable() -> dict[str, str]:
    """Reasons of the backends that cannot run here, by name; what is not listed is available."""
    reasons = {backend.name: backend.missing() for backend in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason}


def available() -> list[str]:
    """The backends that can be named here."""
    return [name for name in NAMES[1:] if name not in unavailable()]


def choose(backend: str) -> str:
    """`backend` itself: a named one runs or raises, and only "auto" chooses, tensor by tensor (`assign`).

    Raises:
        ValueError: there is no backend of this name.
        Unavailable: there is, but not here; the message has the reason and what is available.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, NAMES))}")
    if backend in unavailable():
        raise Unavailable(
            f"backend={backend!r} is not available: {unavailable()[backend]}; available: {', '.join(available())}"
        )
    return backend

"""Changes that an evaluation makes in modules, parameters aside, and the way back.

Running statistics, counters, caches that grow with the longest row: be they buffers or plain attributes, be they there
before or made on the way, f(x + tau e) and f(x - tau e) must meet the same ones, and so must the next step.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from jaguar.method.distributed import local
from jaguar.optimizers.reached import reached
from jaguar.optimizers.saved_values import Saved, SavedTensor, copies, saved

# A look at everything costs a copy of all buffers: at the powers of two, and at every 64th step.
_EVERY = 64
# The form of a module, not its state. `training` is state: an evaluation that ends in train() would change the next.
_FORM = frozenset(nn.Module().__dict__) - {"training"} | {"_compiled_call_impl"}
_MISSING = object()
# A name in one of a module's dicts.
Place: TypeAlias = tuple[dict[str, Any], str]


class ModuleState:
    """Remembers the state of the modules that an evaluation calls, and puts it back.

    Names that were set, deleted or made anew are noticed after every evaluation, by identity: a third of a microsecond
    for a module. What changes in place is found by comparing values in steps that look at everything (or, a step late,
    by tensors' version counters); between these, only what was seen to change is copied and compared. Frozen parameters
    may be most of the memory, so of these only the counters are looked at: their first change in a run stays.

    A step that looks sees the models that have trained tensors and are reached from the closure, by whatever method
    they are entered, and through a global hook all others that are called; where torch.compile is in use, which would
    compile everything once more for the sake of a hook, it looks among all modules alive.
    """

    def __init__(self) -> None:
        self._n_looks = 0
        self._inside = self._stale = False
        self._roots: list[weakref.ref[nn.Module]] = []
        self._known: set[int] = set()  # numbers of dicts that `_names` keeps alive
        self._names: list[Names] = []
        self._values: list[Any] = []
        self._contents: list[tuple[Place, Saved]] = []
        self._tensors: list[tuple[Place, Tensor]] = []  # whose versions are looked at after every step
        self._versions: list[int] = []
        self._moving: dict[tuple[int, str], Place] = {}

    def __reduce__(self) -> tuple[type[ModuleState], tuple[()]]:
        return ModuleState, ()  # a copied optimizer looks for itself

    def begin(self, closure: Callable[..., Any], step: int, perturbed: Iterable[Tensor]) -> None:
        """Remembers the state before a step.

        Args:
            closure: what will be evaluated.
            step: its number, which decides whether it looks at everything; it also does if something is not as it was.
            perturbed: the trained tensors; what shares their memory changes with them and stays out of this.
        """
        scheduled = self._n_looks < 2 or step & (step - 1) == 0 or step % _EVERY == 0
        self._looking = scheduled or self._stale or not self._unchanged()
        self._inside, self._hook = True, None
        self._seed: int | None = None  # the seed of the last evaluation
        self._memo: dict[int, Saved | None] = {}
        if self._looking or self._moving:
            self._perturbed = frozenset(tensor.untyped_storage().data_ptr() for tensor in perturbed)
        if not self._looking:
            self._versions = [tensor._version for _, tensor in self._tensors]
            self._copy(self._moving.values())
            return
        self._n_looks += 1
        self._stale = False
        self._forget()
        roots = [root for ref in self._roots if (root := ref()) is not None]
        self._roots = []
        if scheduled and _compiles():
            alive = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
            roots += [m for m in alive if {"_modules", "_buffers"} <= m.__dict__.keys()]  # the others are being made
        elif scheduled:
            self._hook = register_module_forward_pre_hook(self._called)
            roots += filter(self._trains, reached(closure))
        for root in roots:
            self._see(root)
        self._copy(place for place in self._moving.values() if isinstance(place[0].get(place[1]), nn.Parameter))

    def rewind(self, seed: int) -> None:
        """Everything is as at `begin`, for another evaluation.

        Generators that modules keep begin as the global ones do: equal within a step, different between steps.
        """
        if self._seed is not None:
            self._put_back()
        self._seed = seed
        for content in self._memo.values():
            if content is not None:
                content.reseed(seed)

    def end(self) -> None:
        """Puts everything back, and rests until the next `begin`."""
        if self._hook is not None:
            self._hook.remove()
        self._put_back()
        versions = [tensor._version for _, tensor in self._tensors]
        if versions != self._versions:
            for (place, _), before, now in zip(self._tensors, self._versions, versions, strict=True):
                if now != before:
                    self._moving[id(place[0]), place[1]] = place
        self._contents, self._memo, self._inside = [], {}, False
        if self._stale:
            self._forget()

    def _put_back(self) -> None:
        """Everything becomes what it was at `begin`; modules seen since, what they were at their first call."""
        for (holder, name), content in self._contents:
            if content.put_back() and self._looking:
                self._moving[id(holder), name] = holder, name
        if not self._unchanged():
            for names in self._names:
                names.put_back()
            self._values = [value for names in self._names for value in names.kept.values()]

    def _called(self, module: nn.Module, _inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._see(module)

    def _trains(self, module: nn.Module) -> bool:
        """Tells whether it has trained tensors; what else a closure reaches, say metrics, may keep what it is told."""
        return any(
            p.untyped_storage().data_ptr() in self._perturbed for p in map(local, module.parameters()) if copies(p)
        )

    def _see(self, root: nn.Module) -> None:
        """Remembers a module and all inside it, unless they are known."""
        if id(root.__dict__) in self._known:
            return
        self._roots.append(weakref.ref(root, self._died))
        for module in root.modules():
            if id(module.__dict__) in self._known:
                continue
            self._known.add(id(module.__dict__))
            own = [Names(holder, module) for holder in (module.__dict__, module._buffers, module._modules)]
            self._names += own
            self._values += chain.from_iterable(names.kept.values() for names in own)
            self._copy((names.holder, name) for names in own for name in names.kept if name not in _FORM)
            if isinstance(frozen := module._parameters, dict):
                self._note(((frozen, name), p) for name, p in frozen.items() if p is not None)

    def _note(self, tensors: Iterable[tuple[Place, Tensor]]) -> None:
        """Tensors whose version counters will tell of writing."""
        for place, tensor in tensors:
            if copies(tensor) and tensor.untyped_storage().data_ptr() not in self._perturbed:
                self._tensors.append((place, tensor))
                self._versions.append(tensor._version)

    def _copy(self, places: Iterable[Place]) -> None:
        n_known = len(self._memo)
        content: Saved | None
        for holder, name in places:
            value, content = holder.get(name), None
            if isinstance(value, nn.Parameter):  # frozen, and written to before
                if copies(value) and value.untyped_storage().data_ptr() not in self._perturbed:
                    content = SavedTensor(value)
            else:
                content = saved(value, self._perturbed, self._memo)
            if content is not None:
                self._contents.append(((holder, name), content))
                if self._looking and isinstance(content, SavedTensor):
                    self._note([((holder, name), content.tensor)])
        for content in islice(self._memo.values(), n_known, None):
            if content is not None and self._seed is not None:
                content.reseed(self._seed)

    def _unchanged(self) -> bool:
        """Tells whether every name means what it meant: lists compare by identity first; equal objects may pass too."""
        now = list(chain.from_iterable(names.holder.values() for names in self._names))
        try:
            return now == self._values
        except Exception:  # whatever a comparison of these objects raises, say of two tensors
            return False

    def _forget(self) -> None:
        self._known, self._names, self._values, self._contents = set(), [], [], []
        self._tensors, self._versions = [], []

    def _died(self, _ref: weakref.ref[nn.Module]) -> None:
        """A model is gone: nothing of it is kept."""
        self._moving = {}
        if not self._inside:
            self._forget()
        self._stale = True


class Names:
    """Meanings of the names in one of a module's dicts.

    Attributes:
        holder: the dict: plain attributes, buffers or submodules.
        kept: a copy of it.
    """

    def __init__(self, holder: Any, module: nn.Module) -> None:
        # A scripted module has no dict of buffers, but their values can be put back.
        self.holder: dict[str, Any] = holder if isinstance(holder, dict) else dict(holder.items())
        self.kept = dict(self.holder)
        self._passing = module.__dict__.get("_non_persistent_buffers_set", set())

    def put_back(self) -> None:
        """Names mean what they meant, and new ones are gone; functions, which are no state, stay."""
        for name in [name for name in self.holder if name not in self.kept]:
            if name not in _FORM and not _is_function(self.holder[name]):
                del self.holder[name]
                self._passing.discard(name)
        for name, value in self.kept.items():
            now = self.holder.get(name, _MISSING)
            if now is not value and name not in _FORM and not _is_function(now):
                self.holder[name] = value
        self.kept = dict(self.holder)


def _is_function(value: Any) -> bool:
    """Compiled, bound or loaded on the way: its making costs time and has no part in what it returns."""
    return callable(value) and not isinstance(value, nn.Module)


def _compiles() -> bool:
    """Tells whether anything was given to torch.compile in this process."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return False
    backends = getattr(dynamo, "cached_backends", None)  # by id; None stands for "do not compile"
    return backends is None or any(backend is not None for backend in backends.values())

"""Weights on disk and in memory: files of `save_pretrained` are read back bit for bit, by the model's own names.

`save_pretrained` stores some tensors under other names (GPT-NeoX's head), in pieces (the fused experts of MoE models)
or by their results (the virtual tokens of a prompt encoder). `write` finds every tensor of the model among the stored
ones and compares the bits; a tensor that does not come back goes into a file of its own. `read` undoes that.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jaguar.models.errors import Damaged, reading

# Tensors, by their names in memory, that do not come back from the files beside it.
EXACT_FILE = "jaguar_weights.safetensors"
# Entries of a frozen tensor that its fingerprint looks at.
_SAMPLE = 4096


class Part(NamedTuple):
    """A stored tensor, and the view of a tensor in memory (contiguous) that it fills."""

    file: str
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# -- what must come back -----------------------------------------------------------------------------------------------


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once; beside adapters frozen parameters are the base's."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


def has_adapter(model: nn.Module) -> bool:
    """True if PEFT's adapters are in the model; its base is not saved then."""
    return hasattr(model, "peft_config")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a module without `save_pretrained`, as safetensors takes it: tied tensors once, contiguous."""
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = _alone(tensor)
    return state


def _alone(tensor: Tensor) -> Tensor:
    """The values, contiguous, in a storage of their own."""
    values = tensor.detach().contiguous()
    return values.clone() if values.untyped_storage().nbytes() != values.nbytes else values


# -- where it is stored ------------------------------------------------------------------------------------------------


class _Files:
    """The stored tensors of a checkpoint."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._tensors: dict[str, Any] = {}  # file -> what gives its tensors
        self.keys: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> name of a tensor -> file
        for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
            file = path.relative_to(folder).as_posix()
            opened: Any
            with reading(path):
                if path.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(path, framework="pt"))
                elif path.suffix == ".bin" and path.name.startswith(("pytorch_model", "adapter_model")):
                    opened = torch.load(path, map_location="cpu", weights_only=True)
                    if not isinstance(opened, dict) or not all(isinstance(t, Tensor) for t in opened.values()):
                        raise Damaged(f"{path} is damaged: it holds something else than tensors by name")
                else:
                    continue
            self._tensors[file] = opened
            place = "" if path.parent == folder else path.parent.name
            self.keys[file if file == EXACT_FILE else place] |= dict.fromkeys(opened.keys(), file)

    def has(self, parts: Sequence[Part], like: Tensor) -> bool:
        """True if the parts make up a tensor like `like`, by the shapes and dtypes that the files declare."""
        for part in parts:
            opened = self._tensors.get(part.file)
            if opened is None or part.key not in opened.keys():  # noqa: SIM118
                return False
            if _kind(opened, part.key) != (like.dtype, part.shape) or not _lies_in(part, like.numel()):
                return False
        return sum(math.prod(part.shape) for part in parts) == like.numel()

    def whole(self, parts: Sequence[Part], like: Tensor) -> Tensor | None:
        """The tensor that the parts make up, in main memory; None: they do not make up one like `like`."""
        if not self.has(parts, like):
            return None
        made = torch.zeros(like.shape, dtype=like.dtype)  # parts may overlap, and what was in memory is nobody's
        for part in parts:
            opened = self._tensors[part.file]
            stored = opened[part.key] if isinstance(opened, dict) else opened.get_tensor(part.key)
            made.as_strided(part.shape, part.stride, part.offset).copy_(stored)
        return made


def _lies_in(part: Part, count: int) -> bool:
    """True if a part fills elements of a tensor of `count` only, each once; a record may say anything."""
    _, _, offset, shape, stride = part
    if len(stride) != len(shape) or not all(isinstance(number, int) for number in (offset, *stride)):
        return False
    steps = [(size - 1, step) for size, step in zip(shape, stride, strict=True)]
    inside = offset >= 0 and all(step > 0 for size, step in steps if size > 0)
    return 0 in shape or (inside and offset + sum(size * step for size, step in steps) < count)


def _kind(opened: Any, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of a stored tensor, without reading it."""
    if isinstance(opened, dict):
        return opened[key].dtype, tuple(opened[key].shape)
    stored = opened.get_slice(key)
    shape = tuple(stored.get_shape())
    return (stored[:0] if shape else opened.get_tensor(key)).dtype, shape


class _Views(TorchFunctionMode):
    """Conversions as views of what they convert: `contiguous()` copies nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.contiguous:
            return args[0]
        return function(*args, **(kwargs or {}))


def _layout(model: nn.Module, files: _Files) -> dict[str, list[Part]]:
    """Parts of the files that make up each tensor of the model, as the library that wrote them names and cuts it."""
    names = {id(tensor): name for name, tensor in kept(model).items()}
    stand_ins: dict[int, Tensor] = {}  # without memory, one for each tensor, tied ones once
    state, owners = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) in names:
            stand_in = stand_ins.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
            state[name], owners[id(stand_in)] = stand_in, names[id(tensor)]
    layout: dict[str, list[Part]] = defaultdict(list)
    for place, form in _forms(model, state):
        for key, view in form.items():
            base = view if view._base is None else view._base
            if id(base) in owners and key in files.keys[place]:
                part = Part(files.keys[place][key], key, int(view.storage_offset()), tuple(view.shape), view.stride())
                layout[owners[id(base)]].append(part)
    for key, file in files.keys[EXACT_FILE].items():
        if key in state:
            layout[owners[id(state[key])]] = [_all_of(state[key], file, key)]
    for name, parts in layout.items():  # tied tensors may be stored twice
        complete = [part for part in parts if math.prod(part.shape) == state[name].numel()]
        layout[name] = complete[:1] or parts
    return layout


def _all_of(tensor: Tensor, file: str, key: str) -> Part:
    return Part(file, key, 0, tuple(tensor.shape), torch.empty(tensor.shape, device="meta").stride())


def _forms(model: Any, state: dict[str, Tensor]) -> list[tuple[str, Mapping[str, Tensor]]]:
    """(folder, stored names -> views of the stand-ins), by the functions that `save_pretrained` calls."""
    plain: list[tuple[str, Mapping[str, Tensor]]] = [("", state)]
    with torch.no_grad(), _Views(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was saved
        try:
            if has_adapter(model) and hasattr(model, "get_base_model"):
                from peft import get_peft_model_state_dict

                return [
                    (
                        "" if name == "default" else name,
                        get_peft_model_state_dict(
                            model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
                        ),
                    )
                    for name in model.peft_config
                ]
            if has_adapter(model):
                form = model.get_adapter_state_dict(state_dict=dict(state))
                return [("", {f"base_model.model.{key}": view for key, view in form.items()})]
            from transformers.core_model_loading import revert_weight_conversion

            # By its plain name, too: not every conversion was applied when it was saved.
            return [("", dict(state) | revert_weight_conversion(model, dict(state)))]
        except Exception:  # of conversions that need values: what is not found by its plain name is stored anew
            return plain


# -- writing and reading -----------------------------------------------------------------------------------------------


def write(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Makes sure that all of the model comes back from `folder`, where it was just saved; returns what `read` needs.

    Raises:
        OSError: the files read back other than they were written.
    """
    tensors, adapted = kept(model), has_adapter(model)
    recorded: dict[str, list[Part]] = {}
    anew: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = _Files(folder, stack)
        layout = _layout(model, files)
        for name, tensor in tensors.items():
            found = files.whole(layout[name], tensor) if name in layout else None
            if found is not None and _same_bits(found, tensor):
                recorded[name] = layout[name]
            elif not adapted or tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                anew[name] = _alone(tensor.detach().cpu())
    if anew:
        save_file(anew, folder / EXACT_FILE, metadata={"format": "pt"})
        with safe_open(folder / EXACT_FILE, framework="pt") as file:
            for name, tensor in anew.items():
                if not _same_bits(file.get_tensor(name), tensor):
                    raise OSError(f"{folder / EXACT_FILE} does not hold {name} as it was written")
    recorded |= {name: [_all_of(tensor, EXACT_FILE, name)] for name, tensor in anew.items()}
    return {
        "tensors": {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in recorded},
        "parts": {name: parts for name, parts in recorded.items() if not _is_plain(name, parts, tensors[name])},
        "beside": fingerprint(tensors[name] for name in sorted(tensors.keys() - recorded.keys())),
    }


def _is_plain(name: str, parts: list[Part], tensor: Tensor) -> bool:
    """True if a part is all of the tensor under its own name in the one file where it would be looked for."""
    return parts == [_all_of(tensor, "model.safetensors", name)]


def check_readable(folder: Path) -> None:
    """Raises Damaged unless `folder` holds files of weights, and all of them can be opened."""
    with ExitStack() as stack:
        if not any(_Files(folder, stack).keys.values()):
            raise Damaged(f"{folder} has no weights")


def check(model: nn.Module, folder: Path, record: dict[str, Any] | None) -> None:
    """Checks that `read` will succeed.

    Raises:
        ValueError: a tensor is missing, or of another dtype or shape.
    """
    with ExitStack() as stack:
        _located(model, folder, record, _Files(folder, stack))


def read(model: nn.Module, folder: Path, record: dict[str, Any] | None) -> None:
    """Puts the weights of `folder` into the model, in place, bit for bit.

    Args:
        model: one of the kind that was saved.
        folder: a checkpoint.
        record: `write` returned it; None for other programs' checkpoints, which must hold all that such a model saves.

    Raises:
        ValueError: a tensor is missing, or of another dtype or shape; nothing has changed then.
    """
    tensors = kept(model)
    with ExitStack() as stack, torch.no_grad():
        files = _Files(folder, stack)
        for name, parts in _located(model, folder, record, files).items():
            whole = files.whole(parts, tensors[name])
            assert whole is not None
            tensors[name].copy_(whole)


def _located(model: nn.Module, folder: Path, record: dict[str, Any] | None, files: _Files) -> dict[str, list[Part]]:
    """The parts of the files that make up each tensor that must come back.

    Raises:
        ValueError: some lie nowhere.
    """
    tensors = kept(model)
    if record is None:
        layout = _layout(model, files)
        needed = [n for n, t in tensors.items() if n in layout or t.requires_grad or not has_adapter(model)]
    else:
        _compare(record, tensors, folder)
        needed = list(record["tensors"])
        layout = {name: [_all_of(tensors[name], "model.safetensors", name)] for name in needed}
        for name, parts in record["parts"].items():
            layout[name] = [Part(file, key, at, tuple(shape), tuple(stride)) for file, key, at, shape, stride in parts]
    lacking = [name for name in needed if not files.has(layout.get(name, []), tensors[name])]
    if lacking:
        raise ValueError(f"the weights in {str(folder)!r} lack {some(lacking)}, or hold them in another shape or dtype")
    return {name: layout[name] for name in needed}


def lost(model: Any, folder: Path) -> list[str]:
    """Names of tensors that other programs would read from `folder`, just saved, with other bits.

    They read with `from_pretrained`, or with PEFT's `load_peft_weights`.
    """
    if not has_adapter(model):
        read_back = type(model).from_pretrained(folder, dtype="auto", trust_remote_code=False)
        return _unlike(kept(model), kept(read_back))
    from peft import get_peft_model_state_dict, load_peft_weights

    bad = []
    for name in model.peft_config:
        place = folder if name == "default" else folder / name
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        bad += _unlike(own, load_peft_weights(str(place), device="cpu"))
    return bad


def _unlike(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in own.items() if name not in found or not _same_bits(found[name].cpu(), tensor)]


def _compare(record: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    saved = record["tensors"]
    if unknown := saved.keys() - tensors.keys():
        raise ValueError(f"{str(folder)!r} holds {some(unknown)}, which this model has not")
    if lacking := [name for name, tensor in tensors.items() if tensor.requires_grad and name not in saved]:
        raise ValueError(f"{str(folder)!r} lacks {some(lacking)}, which are trained here")
    for name, (dtype, shape) in saved.items():
        tensor = tensors[name]
        if (str(tensor.dtype), list(tensor.shape)) != (dtype, shape):
            raise ValueError(
                f"{str(folder)!r} holds {name} as {dtype} {tuple(shape)}, the model has {tensor.dtype} "
                f"{tuple(tensor.shape)}; load the model as it was"
            )
    if record["beside"] != fingerprint(tensors[name] for name in sorted(tensors.keys() - saved.keys())):
        raise ValueError(
            f"the frozen weights are not those beside which the adapter in {str(folder)!r} was trained; load the same "
            "base model in the same dtype"
        )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the shapes, dtypes and evenly spaced entries of tensors, to tell base models apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            digest.update(_bytes(flat[:: max(1, flat.numel() // _SAMPLE)].cpu()).numpy().tobytes())
    return digest.hexdigest()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other.cpu()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest

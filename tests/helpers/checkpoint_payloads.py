"""Malicious checkpoints of runs."""

import json
import shutil

import torch
import torch.jit.unsupported_tensor_ops

from helpers.payloads import OWN, PICKLED, WITH_CODE, both, code, entries, outside, pickled, text

RECORD, PROGRESS = "jaguar_checkpoint.json", "trainer_state.json"


def recorded(change):
    """Changes the record of a checkpoint."""

    def build(folder, canary):
        held = json.loads((folder / RECORD).read_text())
        change(held, folder, canary)
        (folder / RECORD).write_text(json.dumps(held))

    return build


def replaced(file, name):
    """Puts a pickle in the place of a file, and its size into the record, or that would be what is noticed."""
    size = recorded(lambda held, folder, canary: held["files"].update({file: (folder / file).stat().st_size}))
    return both(pickled(file, name), size)


def elsewhere(path):
    """Moves the weights beside the folder, where the record says that they are."""

    def change(held, folder, canary):
        (folder.parent / "outside").mkdir()
        shutil.move(folder / "model.safetensors", folder.parent / "outside")
        file = path.replace("<outside>", str(folder.parent / "outside"))
        held["files"][file] = held["files"].pop("model.safetensors")
        for name, (_, shape) in held["weights"]["tensors"].items():
            held["weights"]["parts"][name] = [[file, name, 0, shape, torch.empty(shape, device="meta").stride()]]

    return recorded(change)


def part(offset, *stride):
    """A tensor lies in memory as no tensor lies: behind its end, or on itself, with what was in memory in between."""
    name, shape = "model.layers.0.mlp.down_proj.weight", [32, 48]
    place = {name: [["model.safetensors", name, offset, shape, stride]]}
    return recorded(lambda held, folder, canary: held["weights"]["parts"].update(place))


CHECKPOINTS = {
    **{
        f"{file}: {name}": (replaced(file, name), rf"{file}.*{PICKLED}")
        for file, names in {
            "optimizer.pt": ("exec", "nested", "torch.hub"),
            "scheduler.pt": ("compile", "posix.system"),
            "rng_state.pth": ("exec", "numpy scalar"),
            "jaguar_run.pt": ("eval", "key", "getattr", "pickle in a pickle"),
        }.items()
        for name in names
    },
    "rng_state.pth: numpy array": (replaced("rng_state.pth", "numpy array"), "rng_state.pth.*holds no tensors"),
    "weights: pytorch_model.bin": (pickled("pytorch_model.bin", "exec"), rf"pytorch_model.bin.*{PICKLED}"),
    "weights: a folder": (both(text("a/b", ""), pickled("a/adapter_model.bin", "exec")), rf"adapter_model.*{PICKLED}"),
    "record: ..": (elsewhere("../outside/model.safetensors"), "names files of another folder"),
    "record: absolute": (elsewhere("<outside>/model.safetensors"), "names files of another folder"),
    "record: code": (
        recorded(lambda held, folder, canary: held["run"].update({"processes": code(canary)})),
        f"{RECORD} is damaged",
    ),
    "record: far": (part(10**12, 48, 1), "the weights in .* lack model.layers.0.mlp.down_proj.weight"),
    "record: before": (part(0, -48, 1), "the weights in .* lack model.layers.0.mlp.down_proj.weight"),
    "record: on itself": (part(0, 0, 1), "the weights in .* lack model.layers.0.mlp.down_proj.weight"),
    "state: an object": (entries(PROGRESS, **{"py/object": "os.system"}), f"{PROGRESS}.*py/object"),
    "what is not read, or read as text": (
        both(
            replaced("training_args.bin", "exec"),
            entries(PROGRESS, stateful_callbacks={"os.system": {"args": {"command": "<code>"}, "attributes": {}}}),
            outside(text("model.safetensors", "")),
            entries(PROGRESS, best_model_checkpoint="<outside>"),
            entries("jaguar_task.json", template="{text.__class__} {text}"),
            both(WITH_CODE, entries("config.json", auto_map=OWN, model_type="own")),
            text("metrics.json", '{"command": "<code>", "py/object": "os.system"}'),
        ),
        None,
    ),
}
# Others of their kind are tried each time.
SLOW = {"optimizer.pt: exec", "optimizer.pt: torch.hub", "scheduler.pt: compile", "rng_state.pth: exec"}

"""Malicious files: what writes a canary where it is executed, and names that lead out of a folder."""

import base64
import io
import json
import os
import pickle
import shutil
import subprocess
from collections import OrderedDict

import numpy as np
import torch
import torch.jit.unsupported_tensor_ops
from safetensors.torch import load_file, save_file


class Call:
    """An object that is a call when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def code(canary):
    return f"open({str(canary)!r}, 'w').close()"


def run(canary):
    return Call(exec, code(canary))


def imported(canary):
    """os.system, got by getattr from what __import__ gives: its name is not among those that the pickle asks for."""
    steps = f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch {canary}'\ntR."
    return steps.encode()


def hub(canary):
    folder = canary.parent / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text(f"{code(canary)}\ndef entry():\n    pass\n")
    return Call(torch.hub._load_local, str(folder), "entry")


# Name -> an object that is a call when it is unpickled, holds one, or is a whole pickle.
PICKLES = {
    "exec": run,
    "eval": lambda canary: Call(eval, code(canary)),
    "compile": lambda canary: Call(exec, Call(compile, code(canary), "x", "exec")),
    "posix.system": lambda canary: Call(os.system, f"touch {canary}"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "getattr": imported,
    "nested": lambda canary: OrderedDict(state=[{"a": (torch.zeros(2), {"b": run(canary)})}]),
    "key": lambda canary: {run(canary): torch.zeros(1)},
    "torch's exec": lambda canary: Call(torch.jit.unsupported_tensor_ops.execWrapper, code(canary), {}, {}),
    "torch.hub": hub,
    "pickle in a pickle": lambda canary: Call(pickle.loads, pickle.dumps(run(canary))),
    "torch's pickle": lambda canary: Call(torch.storage._load_from_bytes, _legacy(run(canary))),
    "numpy scalar": lambda canary: Call(np._core.multiarray.scalar, np.dtype([("a", object)]), run(canary)),
    "numpy array": lambda canary: np.array([run(canary)], dtype=object),
}


def _legacy(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def pickled(file, name, legacy=False):
    """Puts a pickle in the place of a file."""

    def build(folder, canary):
        made = PICKLES[name](canary)
        if isinstance(made, bytes):
            (folder / file).write_bytes(made)
        else:
            torch.save(made, folder / file, _use_new_zipfile_serialization=not legacy)

    return build


def changed(path, **values):
    """Changes entries of a JSON file."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | values))


def entries(file, **values):
    """Changes entries of a JSON file; `<folder>` is the file's, `<outside>` another one beside it."""

    def build(folder, canary):
        text = json.dumps(values).replace("<folder>", str(folder)).replace("<outside>", str(folder.parent / "outside"))
        changed(folder / file, **json.loads(filled(text, canary)))

    return build


def filled(content, canary):
    """The text with what writes the canary in the place of `<code>`, and its path in that of `<canary>`."""
    return content.replace("<code>", code(canary)).replace("<canary>", str(canary))


def text(file, content):
    """Writes a text file."""

    def build(folder, canary):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(filled(content, canary))

    return build


def both(*builders):
    def build(folder, canary):
        for builder in builders:
            builder(folder, canary)

    return build


def without(pattern):
    return lambda folder, canary: [path.unlink() for path in folder.glob(pattern)]


def instead(pattern, *builders):
    """Takes files away and puts others in their place."""
    return both(without(pattern), *builders)


# -- what comes with a model -------------------------------------------------------------------------------------------

OWN = {
    "AutoConfig": "own.Config",
    "AutoModel": "own.Model",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": [None, "own.Tokenizer"],
}
WITH_CODE = text("own.py", "<code>")


def metadata(folder, canary):
    path = folder / "model.safetensors"
    hidden = base64.b64encode(pickle.dumps(run(canary))).decode()
    save_file(load_file(path), path, {"format": "pt", "pickle": hidden, "__reduce__": code(canary), "../../x": "y"})


def pickle_as_safetensors(folder, canary):
    (folder / "model.safetensors").write_bytes(pickle.dumps(run(canary)))


def moved_out(index):
    """Weights that lie beside the folder, and an index that names them."""

    def build(folder, canary):
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / "model.safetensors", outside / "model.safetensors")
        keys = load_file(outside / "model.safetensors")
        target = str(outside / "model.safetensors") if index == "absolute" else "../outside/model.safetensors"
        if index == "config":
            changed(folder / "config.json", transformers_weights=target)
        else:
            listed = {"metadata": {}, "weight_map": dict.fromkeys(keys, target)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(listed))

    return build


def shard(folder, canary):
    without("*.safetensors")(folder, canary)
    pickled("pytorch_model-1.bin", "exec")(folder, canary)
    listed = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(listed))


PICKLED = r"it would call \S+, which was not run"
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch <canary>') }}"
TOKENIZER = "tokenizer_config.json"
INSIDE = {"auto_map": OWN, "name_or_path": "<folder>"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 2}
FUYU = {"model_type": "fuyu", "architectures": ["FuyuForCausalLM"], "text_config": SMALL | {"model_type": "persimmon"}}
MODELS = {
    **{
        f"pytorch_model.bin: {name}": (instead("*.safetensors", pickled("pytorch_model.bin", name)), PICKLED)
        for name in PICKLES
    },
    "pytorch_model.bin: legacy": (instead("*.safetensors", pickled("pytorch_model.bin", "exec", True)), PICKLED),
    "pytorch_model.bin: shard": (shard, PICKLED),
    "safetensors: metadata": (metadata, None),
    "safetensors: a pickle": (pickle_as_safetensors, "could not load the model"),
    "index: ..": (moved_out("relative"), "names weights outside its folder"),
    "index: absolute": (moved_out("absolute"), "names weights outside its folder"),
    "config: transformers_weights": (moved_out("config"), "names weights outside its folder"),
    "config: auto_map of a known type": (both(WITH_CODE, entries("config.json", auto_map=OWN)), None),
    "config: auto_map": (both(WITH_CODE, entries("config.json", auto_map=OWN, model_type="own")), "not run"),
    "config: auto_map of another folder": (
        both(
            text("../own.py", "<code>"), entries("config.json", auto_map={"AutoConfig": "../own.C"}, model_type="own")
        ),
        "not run",
    ),
    "config: auto_map of a repository": (
        entries("config.json", auto_map={"AutoConfig": "evil/repository--own.Config"}, model_type="own"),
        "own.py of evil/repository.* not run",
    ),
    "config: auto_map of nonsense": (
        entries("config.json", auto_map=["own.Config", 5], model_type="own"),
        "could not load the model",
    ),
    "config: trust_remote_code": (
        both(WITH_CODE, entries("config.json", auto_map=OWN, model_type="own", trust_remote_code=True)),
        "not run",
    ),
    "config: auto_map of a model inside": (
        both(
            WITH_CODE,
            entries("config.json", **FUYU | {"text_config": {"model_type": "clap_text_model", **INSIDE}}),
        ),
        "not run",
    ),
    "config: quantization": (
        both(WITH_CODE, entries("config.json", quantization_config={"quant_method": "own", "auto_map": OWN})),
        None,
    ),
    "config: quantizer": (
        entries("config.json", quantization_config={"quant_method": "torchao", "quant_type": {"default": "<code>"}}),
        "could not load the model",
    ),
    "config: bitsandbytes": (
        entries("config.json", quantization_config={"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "load"}),
        None,
    ),
    "config: attention of a repository": (
        entries("config.json", attn_implementation="evil/kernel"),
        r"its attn_implementation is code of the repository evil/kernel\S*, which was not run",
    ),
    "config: attention of a model inside": (
        entries("config.json", **FUYU, attn_implementation={"text_config": "evil/kernel@main:f"}),
        r"its attn_implementation is code of the repository evil/kernel\S*, which was not run",
    ),
    "config: attention": (entries("config.json", _attn_implementation_internal="evil/kernel"), None),
    "config: architecture": (entries("config.json", architectures=["os.system('<code>')ForCausalLM"]), None),
    "config: architectures": (entries("config.json", architectures=[5]), "is a 5, which has no head"),
    "config: dtype": (entries("config.json", dtype="os.system"), "could not load the model"),
    "config: activation": (entries("config.json", hidden_act="__import__('os').system"), "could not load the model"),
    "config: code in a number": (entries("config.json", hidden_size="<code>"), "could not load the model"),
    "tokenizer: auto_map": (both(WITH_CODE, entries(TOKENIZER, auto_map=OWN, tokenizer_class="Own")), "not run"),
    "tokenizer: auto_map, a list": (
        both(WITH_CODE, entries(TOKENIZER, auto_map=[None, "own.Tokenizer"], tokenizer_class="Own")),
        "not run",
    ),
    "tokenizer: class": (both(WITH_CODE, entries(TOKENIZER, tokenizer_class="os.system")), None),
    "tokenizer: trust_remote_code": (
        both(WITH_CODE, entries(TOKENIZER, auto_map=OWN, tokenizer_class="Own", trust_remote_code=True)),
        "not run",
    ),
    "tokenizer: chat template": (entries(TOKENIZER, chat_template=JINJA), None),
    "tokenizer: chat_template.jinja": (text("chat_template.jinja", JINJA), None),
    "tokenizer: code in a number": (entries(TOKENIZER, model_max_length="<code>"), "model_max_length"),
    "generation: custom_generate": (
        both(
            text("custom_generate/generate.py", "<code>"), entries("generation_config.json", custom_generate="evil/x")
        ),
        None,
    ),
    "an import beside the weights": (
        both(text("torch.py", "<code>"), text("transformers.py", "<code>"), text("conftest.py", "<code>")),
        None,
    ),
}

# -- what comes with an adapter ----------------------------------------------------------------------------------------

ADAPTER = "adapter_config.json"


def own_base(folder, canary):
    """The base model has code of its own."""
    base = shutil.copytree(folder.parent / "lm", folder.parent / "base")
    both(WITH_CODE, entries("config.json", auto_map=OWN, model_type="own"))(base, canary)
    changed(folder / ADAPTER, base_model_name_or_path=str(base))


def outside(*builders):
    """Builds in a folder beside, which `<outside>` in `entries` stands for."""

    def build(folder, canary):
        (folder.parent / "outside").mkdir()
        both(*builders)(folder.parent / "outside", canary)

    return build


PROMPT = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 32}
PROMPT |= {"num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
ADAPTERS = {
    **{
        f"adapter_model.bin: {name}": (instead("*.safetensors", pickled("adapter_model.bin", name)), PICKLED)
        for name in ("exec", "posix.system", "numpy array", "numpy scalar", "torch's pickle")
    },
    "both files": (pickled("adapter_model.bin", "exec"), None),
    "adapter: base with code": (own_base, "not run"),
    "adapter: auto_mapping": (
        entries(ADAPTER, auto_mapping={"base_model_class": "system", "parent_library": "os"}, task_type=None),
        None,
    ),
    "adapter: auto_map": (both(WITH_CODE, entries(ADAPTER, auto_map=OWN, trust_remote_code=True)), None),
    "adapter: revision": (entries(ADAPTER, revision="../../outside"), None),
    "adapter: megatron": (
        entries(ADAPTER, megatron_config={"a": 1}, megatron_core="own"),
        "could not load the adapter",
    ),
    "adapter: corda": (
        both(
            outside(pickled("cache.pt", "exec")),
            entries(
                ADAPTER,
                init_lora_weights="corda",
                corda_config={"cache_file": "<outside>/cache.pt", "covariance_file": "<outside>/cache.pt"},
            ),
        ),
        "could not load the adapter",
    ),
    "adapter: eva": (
        entries(ADAPTER, init_lora_weights="eva", eva_config={"rho": "<code>"}),
        "could not load the adapter",
    ),
    "adapter: lora-ga": (
        both(
            outside(pickled("cache.pt", "exec")),
            entries(ADAPTER, init_lora_weights="lora_ga", lora_ga_config={"cache_file": "<outside>/cache.pt"}),
        ),
        None,
    ),
    "adapter: loftq": (
        entries(ADAPTER, init_lora_weights="loftq", loftq_config={"loftq_bits": "<code>"}),
        "could not load the adapter",
    ),
    "adapter: another type": (entries(ADAPTER, peft_type="__import__"), "could not load the adapter"),
    "adapter: x-lora": (
        both(
            outside(entries(ADAPTER, peft_type="LORA"), pickled("adapter_model.bin", "exec")),
            entries(ADAPTER, peft_type="XLORA", hidden_size=32, adapters={"0": "<outside>"}),
        ),
        "could not load the adapter",
    ),
    "adapter: tokenizer with code": (
        both(
            outside(WITH_CODE, entries(TOKENIZER, auto_map=OWN), entries("config.json", model_type="own")),
            entries(
                ADAPTER,
                **PROMPT,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text="a",
                tokenizer_name_or_path="<outside>",
                tokenizer_kwargs={"trust_remote_code": True},
                inference_mode=False,
            ),
        ),
        "could not load the adapter",
    ),
    "adapter: multitask": (
        both(
            outside(pickled("state.pt", "exec")),
            entries(
                ADAPTER,
                **PROMPT | {"peft_type": "MULTITASK_PROMPT_TUNING"},
                prompt_tuning_init="AVERAGE_SOURCE_TASKS",
                prompt_tuning_init_state_dict_path="<outside>/state.pt",
            ),
        ),
        "could not load the adapter",
    ),
    "adapter: runtime": (entries(ADAPTER, runtime_config={"ephemeral_gpu_offload": "<code>"}), None),
}

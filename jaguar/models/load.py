"""Models and tokenizers from a local folder or the hub; selection of the parameters that are trained."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jaguar.models import saved
from jaguar.models.adapters import virtual_tokens
from jaguar.models.choices import TRAINABLE
from jaguar.models.errors import said
from jaguar.models.facts import first_position
from jaguar.models.untrusted import check_kernels, check_weight_files, code_of, unasked, wants_code

_ADAPTER_FILE = "adapter_config.json"

# What the name of an architecture ends with -> how the model is asked.
_KINDS = {
    "ForSequenceClassification": "classifier",
    "ForMaskedLM": "masked",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, and its kind: "causal", "masked" or "classifier"."""

    model: Any
    tokenizer: Any
    kind: str
    pad_id: int
    max_length: int
    cut: int | None = None  # tokens at which texts were cut when it was tuned


def load(
    name: str, *, dtype: str = "auto", use_cpu: bool = False, in_4bit: bool = False, trust_remote_code: bool = False
) -> Loaded:
    """A causal LM, masked LM or sequence classifier with its tokenizer, or an adapter on one of these.

    Args:
        name: a local folder in Hugging Face form, or a name on the hub; a folder with a PEFT adapter names its base.
        dtype: the weights': "float32", "bfloat16", "float16", or "auto" for the one they were saved in.
        use_cpu: stay on the CPU even if there is a GPU.
        in_4bit: hold the weights of linear layers in 4 bits (NF4, bitsandbytes); adapters train beside them.
        trust_remote_code: run Python files that come with the model, if it needs any.

    Raises:
        ValueError: the folder is missing or incomplete, the model is of another kind, or needs code of its own; the
            message says which.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_cpu": use_cpu,
        "in_4bit": in_4bit,
        "trust_remote_code": trust_remote_code,
    }
    _check_folder(name)
    adapter = Path(name) / _ADAPTER_FILE
    if not is_adapter(name):
        loaded = _load_base(name, **options)
        return replace(loaded, cut=(saved.read(name) or {}).get("max_length"))
    base, tried = _base_of(adapter)
    try:
        loaded = _load_base(base, **options)
    except ValueError as error:
        places = f" (no folder {_few(tried)})" if tried else ""
        raise ValueError(f"{adapter} names the model {base!r}{places}: {error}") from error
    with _errors_of_loading(f"the adapter {name!r}", name):
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

        held = [entry.name for entry in Path(name).glob("adapter_model.*")]
        if not held:
            raise ValueError("there is no adapter_model.safetensors beside adapter_config.json")
        is_prompt = PeftConfig.from_pretrained(name).is_prompt_learning
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # which is an error here
            model = PeftModel.from_pretrained(loaded.model, name, is_trainable=not is_prompt)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if missing := sorted(set(expected) - set(load_peft_weights(name, device="cpu"))):
            raise ValueError(f"its weights lack {_few(missing)}")
    if is_prompt:  # which PEFT does not load as trainable
        model.prompt_encoder.requires_grad_(True)
    return replace(adapted(loaded, model.eval()), cut=(saved.read(name) or {}).get("max_length"))


def adapted(loaded: Loaded, model: Any) -> Loaded:
    """The same with an adapter around the model, whose virtual tokens take some of the positions."""
    return replace(loaded, model=model, max_length=_longest(model, loaded.tokenizer))


def _base_of(adapter: Path) -> tuple[str, list[str]]:
    """The model that an adapter is for; and the folders, from here and from its own up, if it is none of them."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter} is damaged: it names no base model")
    folder = adapter.parent.resolve()
    tried = [Path(base), *([] if Path(base).is_absolute() else [above / base for above in (folder, *folder.parents)])]
    found = next((str(place) for place in tried if place.is_dir()), None)
    return (found, []) if found else (base, [str(place.absolute()) for place in tried])


def _is_a_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_folder(name: str) -> None:
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the model {name!r} is a file; give the folder that holds config.json and the weights")
    if not folder.exists() and _is_a_path(name):
        raise ValueError(f"the model folder {name!r} does not exist")


def configuration(name: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, read without its weights.

    Raises:
        ValueError: the folder is missing or incomplete, or the model needs code of its own.
    """
    import transformers

    _check_folder(name)
    with _errors_of_loading(f"the model {name!r}", name, trust_remote_code):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def is_adapter(name: str) -> bool:
    """True for a folder of an adapter."""
    return (Path(name) / _ADAPTER_FILE).is_file()


def _load_base(name: str, *, dtype: str, use_cpu: bool, in_4bit: bool, trust_remote_code: bool) -> Loaded:
    import transformers

    what = f"the model {name!r}"
    config = configuration(name, trust_remote_code)
    named = getattr(config, "architectures", None)
    architecture = str(named[0]) if isinstance(named, list) and named else "(none named)"
    kind = next((kind for end, kind in _KINDS.items() if architecture.endswith(end)), None)
    if kind is None:
        raise ValueError(
            f"the model {name!r} is a {architecture}, which has no head that answers; jaguar fine-tunes causal LMs "
            "(...ForCausalLM), masked LMs (...ForMaskedLM) and sequence classifiers (...ForSequenceClassification)"
        )
    auto = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "masked": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
    }[kind]
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if in_4bit:
        options["quantization_config"] = _four_bits(options["dtype"])
    with _errors_of_loading(f"the tokenizer of {what}", name, trust_remote_code):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"its model_max_length is {tokenizer.model_max_length!r}, no number")
    with _errors_of_loading(what, name, trust_remote_code):
        check_kernels(config)
        check_weight_files(Path(name), getattr(config, "transformers_weights", None))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    # transformers would go on with random values, or refer to a report that it has logged.
    if other := sorted(report["mismatched_keys"]):
        shapes = [f"{key} ({tuple(found)} in the file, {tuple(wanted)} in the model)" for key, found, wanted in other]
        raise ValueError(f"the weights of {name!r} are of another model than its config.json: {_few(shapes)}")
    if report["missing_keys"]:
        raise ValueError(
            f"the weights of {name!r} lack {_few(sorted(report['missing_keys']))}; the folder is incomplete"
        )
    model.eval()
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, but the model embeds only {rows}; they "
            "do not belong together"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has neither a pad token nor an end-of-text token to fill short rows with; name "
            "one in its tokenizer_config.json"
        )
    if kind == "classifier" and model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id  # decoder classifiers look for the last token that is not padding
    if in_4bit:
        for module in model.modules():  # a fast layout for CPUs, from which a state_dict does not come back whole
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model = model.to("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    return Loaded(model, tokenizer, kind, pad_id, _longest(model, tokenizer))


def _longest(model: Any, tokenizer: Any) -> int:
    """Tokens that fit; RoBERTa's family loses the positions up to its padding id, an adapter takes its own."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    bounded = limits[0] and limits[0] > 0  # XLNet, whose positions are relative, says -1
    places = limits[0] - first_position(model) - virtual_tokens(model) if bounded else None
    return min(int(limit) for limit in [places, limits[1], 10**6] if limit is not None)


def _four_bits(dtype: Any) -> Any:
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError:
        raise ValueError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes") from None
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


@contextlib.contextmanager
def _errors_of_loading(what: str, name: str, trust_remote_code: bool = False) -> Iterator[None]:
    """Turns the libraries' long messages into one line with the fault and the remedy; nothing is asked."""
    try:
        with unasked():
            yield
    except Exception as error:  # the libraries below raise nearly everything, plain Exception included
        if wants_code(error):
            files = ", ".join(code_of(name))
            advice = (
                "transformers runs none of a model inside another"
                if trust_remote_code
                else "read it, and give --trust_remote_code to run it"
            )
            raise ValueError(f"{what} has code of its own ({files}), which was not run: {advice}") from error
        advice = (
            "the folder is incomplete or damaged"
            if Path(name).is_dir()
            else "give a local folder, or check the name and the network"
        )
        raise ValueError(f"could not load {what}: {said(error)} ({advice})") from error


def select_trainable(model: nn.Module, which: str) -> None:
    """Freezes everything but "all", "norm" (weights and biases of normalisation layers) or "bias".

    Raises:
        ValueError: the model has no such parameters.
    """
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    chosen = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = (
            which == "all"
            or (which == "norm" and id(parameter) in norms)
            or (which == "bias" and name.endswith("bias"))
        )
        parameter.requires_grad_(wanted)
        chosen += wanted
    if not chosen:
        raise ValueError(
            f"--train {which}: a {type(model).__name__} has no such parameters; choose another of "
            f"{', '.join(TRAINABLE)}"
        )

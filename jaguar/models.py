"""Models and tokenizers from a local folder or the hub, and which of their parameters are trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jaguar.choices import TRAINABLE
from jaguar.tasks.text_classification import Task

_TASK_FILE = "jaguar_task.json"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, and what kind it is."""

    model: Any
    tokenizer: Any
    is_classifier: bool
    pad_id: int
    max_length: int


def load(name: str, *, dtype: str = "auto", use_cpu: bool = False) -> Loaded:
    """A causal LM or sequence classifier with its tokenizer.

    Args:
        name: a local folder in Hugging Face form, or a name on the hub.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto" for the one they were saved in.
        use_cpu: stay on the CPU even if there is a GPU.

    Raises:
        ValueError: the folder is missing or incomplete, or the model is of another kind; the message says which.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the model {name!r} is a file; give the folder that holds config.json and the weights")
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"the model folder {name!r} does not exist")
    with _errors_of_loading(name, folder.is_dir()):
        config = AutoConfig.from_pretrained(name)
    kind = (getattr(config, "architectures", None) or ["(none named)"])[0]
    is_classifier = kind.endswith("ForSequenceClassification")
    if not is_classifier and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"the model {name!r} is a {kind}; jaguar fine-tunes causal LMs (...ForCausalLM) and sequence classifiers "
            "(...ForSequenceClassification)"
        )
    auto: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    with _errors_of_loading(name, folder.is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = auto.from_pretrained(name, dtype=precision, output_loading_info=True)
    if report["missing_keys"]:  # transformers would go on with random values
        raise ValueError(
            f"the weights of {name!r} lack {', '.join(sorted(report['missing_keys'])[:3])}; the folder is incomplete"
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
            f"the tokenizer of {name!r} has neither a pad token nor an end-of-text token to fill short rows with"
        )
    if is_classifier and model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id  # decoder classifiers look for the last token that is not padding
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    max_length = min(int(limit) for limit in [*limits, 10**6] if limit)
    device = "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"
    return Loaded(model.to(device), tokenizer, is_classifier, pad_id, max_length)


@contextlib.contextmanager
def _errors_of_loading(name: str, is_folder: bool) -> Iterator[None]:
    """transformers' long messages as one line that says what to do."""
    try:
        yield
    except Exception as error:  # the libraries below raise nearly everything, plain Exception included
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            "the folder is incomplete or damaged"
            if is_folder
            else "give a local folder, or check the name and the network"
        )
        raise ValueError(f"could not load the model {name!r}: {first} ({advice})") from error


def select_trainable(model: nn.Module, which: str) -> list[tuple[str, nn.Parameter]]:
    """Freezes everything but the chosen parameters and returns those: "all", "norm" (weights and biases of
    normalisation layers) or "bias".

    Raises:
        ValueError: the model has no such parameters.
    """
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    chosen = []
    for name, parameter in model.named_parameters(remove_duplicate=False):  # the optimizer takes a tie's first name
        wanted = (
            which == "all"
            or (which == "norm" and id(parameter) in norms)
            or (which == "bias" and name.endswith("bias"))
        )
        parameter.requires_grad_(wanted)
        if wanted:
            chosen.append((name, parameter))
    if not chosen:
        raise ValueError(
            f"--train {which}: a {type(model).__name__} has no such parameters; choose another of "
            f"{', '.join(TRAINABLE)}"
        )
    return chosen


def save_task(task: Task, folder: Path) -> None:
    """Writes the prompt beside the model, so that `jaguar eval` asks as the training did."""
    (folder / _TASK_FILE).write_text(json.dumps(asdict(task), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_task(name: str) -> Task | None:
    """The prompt that lies beside a model, or None."""
    path = Path(name) / _TASK_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Task(saved["template"], tuple(saved["labels"]), tuple(saved["verbalizers"]))
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged; delete it and pass --template and --verbalizers") from None

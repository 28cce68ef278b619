"""Adapters, by PEFT: LoRA, prefix tuning, prompt tuning. Parameters that they leave trainable are trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jaguar.models.choices import ADAPTERS
from jaguar.models.errors import said
from jaguar.models.tolerance import rounding

# Tokens that a new prefix is tried with.
_PROBE = 3
_TASK_TYPES = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}
# Types of layers whose memory is a running state, in the words of transformers' configurations.
_RUNNING = ("linear_attention", "hybrid", "hybrid_sliding", "conv")


class Unlike(ValueError):
    """A prefix or prompt that a model reads otherwise than the tokens it is made of."""


@dataclass(frozen=True)
class Adapter:
    """Settings of an adapter, which is trained beside a frozen model.

    Attributes:
        kind: "none", "lora", "prefix" or "prompt".
        r: rank of LoRA's factors.
        alpha: LoRA's scale is alpha / r.
        target_modules: modules that get LoRA factors, by the ends of their names, or as PEFT takes them in a single
            string: "all-linear", or a pattern that a whole name matches; empty: PEFT's choice for the architecture
            (queries and values for OPT, Llama, Mistral, Qwen, RoBERTa and BERT).
        num_virtual_tokens: length of the prefix or prompt.
    """

    kind: str = "none"
    r: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] | str = ()
    num_virtual_tokens: int = 5

    def applied(self, model: Any, model_kind: str, prompt_ids: Sequence[int] = ()) -> Any:
        """The model with the adapter; the rest is frozen.

        Args:
            model: a causal LM, masked LM or sequence classifier.
            model_kind: which of them: "causal", "masked" or "classifier".
            prompt_ids: tokens of a real prompt, whose activations a prefix or prompt begins with (random ones would
                undo what the model knows); empty: PEFT's random ones.

        Raises:
            ValueError: PEFT is not installed, or the adapter does not fit the model; the message says why.
        """
        if self.kind == "none":
            return model
        try:
            import peft
        except ImportError:
            raise ValueError(f"--{ADAPTERS[self.kind]} needs PEFT: pip install peft") from None
        if self.kind != "lora" and model_kind != "causal":
            raise ValueError(
                f"--{ADAPTERS[self.kind]} adds tokens before the prompt, which PEFT does for causal LMs only; use "
                "--lora"
            )
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.kind != "lora" and places and 0 < places <= self.num_virtual_tokens + _PROBE:
            raise ValueError(
                f"--num_virtual_tokens {self.num_virtual_tokens} leaves nothing to the prompt: a "
                f"{type(model).__name__} has {places} positions"
            )
        task_type = _TASK_TYPES.get(model_kind)
        if self.kind == "lora":
            self._refuse_unknown(model)
            config: Any = peft.LoraConfig(
                task_type=task_type,
                r=self.r,
                lora_alpha=self.alpha,
                target_modules=self._targets,
            )
        else:
            made = peft.PrefixTuningConfig if self.kind == "prefix" else peft.PromptTuningConfig
            config = made(task_type=task_type, num_virtual_tokens=self.num_virtual_tokens)
        try:
            adapted = peft.get_peft_model(model, config).eval()
            if self.kind != "lora":
                self._begin_with(adapted, prompt_ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PEFT fills caches without looking at their form, so nearly everything
            raise self._unfit(type(model).__name__, self._why(model, error)) from error
        made = adapted.peft_config[adapted.active_adapter]
        if made.base_model_name_or_path and Path(made.base_model_name_or_path).is_dir():
            made.base_model_name_or_path = str(Path(made.base_model_name_or_path).resolve())
        return adapted

    def check(self, config: Any) -> None:
        """Checks a model's configuration, before anything is read; the model itself decides.

        Raises:
            ValueError: the adapter cannot fit.
        """
        reason = _without_keys(config.get_text_config()) if self.kind == "prefix" else ""
        if reason:
            raise self._unfit((getattr(config, "architectures", None) or [type(config).__name__])[0], reason)

    def _unfit(self, name: str, reason: str) -> ValueError:
        advice = "name modules with --lora_target_modules" if self.kind == "lora" else "use --lora"
        return ValueError(f"--{ADAPTERS[self.kind]} does not fit a {name}: {reason} ({advice})")

    def _why(self, model: Any, error: Exception) -> str:
        """The reason of an error in plain words, where it can be seen; the library's own behind it."""
        if self.kind != "prefix" or isinstance(error, Unlike):
            return said(error)
        reason = _without_keys(model.config.get_text_config()) or _cached(model)
        return f"{reason} (PEFT: {said(error)})"

    @property
    def _targets(self) -> list[str] | str | None:
        """Target modules as PEFT takes them: names in a list, anything else as the string that it is."""
        given = [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules)
        patterns = [name for name in given if name == "all-linear" or re.search(r"[^\w.-]", name)]
        if patterns and len(given) > 1:
            raise ValueError(
                f"--lora_target_modules {' '.join(given)}: give names, or a single pattern ({patterns[0]!r} is one)"
            )
        return patterns[0] if patterns else given or None

    def _refuse_unknown(self, model: Any) -> None:
        """Raises ValueError for a name that no module has; PEFT leaves it out in silence if it finds another."""
        names = [f".{name}" for name, _ in model.named_modules()]
        for target in self._targets if isinstance(self._targets, list) else ():
            if not any(name.endswith(f".{target}") for name in names):
                raise ValueError(f"--lora_target_modules {target}: a {type(model).__name__} has no module of this name")

    def _begin_with(self, model: Any, prompt_ids: Sequence[int]) -> None:
        """Makes the prefix or prompt the activations of a real one, and sees whether the model reads them as that.

        Raises:
            Unlike: it does not: its caches are not of keys and values that stand for tokens.
        """
        import peft

        count = self.num_virtual_tokens
        begin = torch.tensor([(list(prompt_ids or [0]) * count)[:count]], device=model.device)
        probe = torch.cat([begin, begin[:, :1]], 1)[:, -_PROBE:]
        with torch.no_grad():
            if not prompt_ids:
                model(input_ids=probe, use_cache=False)  # it runs, at the least
                return
            with model.disable_adapter():
                expected = model(input_ids=torch.cat([begin, probe], 1), use_cache=False).logits[:, count:].float()
                if self.kind == "prefix":
                    cache = model(input_ids=begin, use_cache=True).past_key_values
                    peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
                else:
                    words = model.get_input_embeddings()(begin)[0]
                    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(words)
            found = model(input_ids=probe, use_cache=False).logits[:, -probe.shape[1] :].float()
        spread = (expected - expected.mean(-1, keepdim=True)).abs().max()
        far = ((found - expected).abs().max() / spread).item()
        if far > rounding(model):
            raise Unlike(
                f"it reads {count} tokens otherwise when they come as a {self.kind} (logits differ by {far:.0%})"
            )


def _without_keys(config: Any) -> str:
    """The reason why a model cannot take a prefix, as far as its configuration tells; empty: none is seen."""
    kinds = list(getattr(config, "layer_types", None) or [])
    running = [kind for kind in kinds if kind in _RUNNING]
    if running:
        return (
            f"{len(running)} of its {len(kinds)} layers ({', '.join(sorted(set(running)))}) keep a running state of "
            "what they read, and a prefix is keys and values in every layer"
        )
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        return (
            "its attention has a single head of keys and values for all queries (multi_query), and PEFT makes a "
            "prefix with as many as there are heads of queries"
        )
    return ""


def _cached(model: Any) -> str:
    """The reason why a model cannot take a prefix, as far as its cache tells."""
    with contextlib.suppress(Exception), torch.no_grad():  # the error that is explained here is the one to be told
        ids = torch.zeros(1, _PROBE, dtype=torch.long, device=model.device)
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
        if cache is None:
            return "it keeps no keys and values of earlier tokens, which a prefix is"
        if any(layer.keys.shape != layer.values.shape for layer in cache.layers):
            return "the keys of its attention are of another size than the values, and those of a prefix are of one"
    return "PEFT cannot make keys and values of the form that its attention keeps"


def adds_tokens(model: Any) -> bool:
    """True if the model's adapter puts virtual tokens before the prompt."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return bool(config is not None and config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """Number of positions that the model's adapter takes."""
    return int(model.active_peft_config.num_virtual_tokens) if adds_tokens(model) else 0

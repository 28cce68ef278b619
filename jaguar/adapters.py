"""Adapters, by PEFT: LoRA, prefix tuning, prompt tuning. What they leave trainable is what trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jaguar.choices import ADAPTERS

_TASK_TYPES = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}


@dataclass(frozen=True)
class Adapter:
    """What is trained beside a frozen model.

    Attributes:
        kind: "none", "lora", "prefix" or "prompt".
        r: rank of LoRA's factors.
        alpha: LoRA's scale is alpha / r.
        target_modules: modules that get LoRA factors; empty: PEFT's choice for the architecture (queries and values for
            OPT, Llama, Mistral, Qwen, RoBERTa and BERT).
        num_virtual_tokens: length of the prefix or prompt.
    """

    kind: str = "none"
    r: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ()
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
        task_type = _TASK_TYPES.get(model_kind)
        if self.kind == "lora":
            config: Any = peft.LoraConfig(
                task_type=task_type,
                r=self.r,
                lora_alpha=self.alpha,
                target_modules=list(self.target_modules) or None,
            )
        else:
            made = peft.PrefixTuningConfig if self.kind == "prefix" else peft.PromptTuningConfig
            config = made(task_type=task_type, num_virtual_tokens=self.num_virtual_tokens)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            reason = (str(error).splitlines() or [""])[0]
            advice = " (name modules with --lora_target_modules)" if self.kind == "lora" else ""
            raise ValueError(
                f"--{ADAPTERS[self.kind]} does not fit a {type(model).__name__}: {reason}{advice}"
            ) from error
        adapted.eval()
        if self.kind != "lora" and prompt_ids:
            self._begin_with(adapted, prompt_ids)
        return adapted

    def _begin_with(self, model: Any, prompt_ids: Sequence[int]) -> None:
        import peft

        count = self.num_virtual_tokens
        ids = torch.tensor([(list(prompt_ids) * count)[:count]], device=model.device)
        with torch.no_grad(), model.disable_adapter():
            if self.kind == "prefix":
                cache = model(input_ids=ids, use_cache=True).past_key_values
                peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
            else:
                words = model.get_input_embeddings()(ids)[0]
                model.prompt_encoder[model.active_adapter].embedding.weight.copy_(words)


def adds_tokens(model: Any) -> bool:
    """Whether the model's adapter puts virtual tokens before the prompt."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return bool(config is not None and config.is_prompt_learning)

"""Tolerance between two ways to compute the same logits."""

from __future__ import annotations

from typing import Any

import torch

# As a share of the largest logit. Measured on 24 layers of six architectures: 1.8 times the spacing of a half-precision
# type, here four times; 1e-6 in fp32, where a random model that looks ahead differs by 1e-4.
_HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_FULL = 2e-5


def rounding(model: Any) -> float:
    """The largest change of logits by rounding, as a share of the largest logit."""
    if getattr(model, "is_quantized", False):
        return _HALF[torch.bfloat16]
    is_tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    kind = torch.float16 if is_tf32 and model.dtype == torch.float32 else model.dtype  # TF32 has as many bits as fp16
    return _HALF.get(kind, _FULL)

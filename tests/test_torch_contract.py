"""What torch.optim promises and its users build on, held against torch.optim.SGD."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import jaguar

OURS = {
    "jaguar-signsgd": lambda p, **o: jaguar.JaguarSignSGD(p, coordinates=0.5, **o),
    "jaguar-muon": lambda p, **o: jaguar.JaguarMuon([{"params": list(p), "ns": True}], coordinates=0.5, **o),
    "zo-sgd": lambda p, **o: jaguar.ZOSGD(p, momentum=0.9, **o),
    "zo-signsgd": lambda p, **o: jaguar.ZOSignSGD(p, momentum=0.9, **o),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_a_closure_widened_is_warned_of_once(dtype: torch.dtype) -> None:
    x = nn.Parameter(torch.ones(4))
    opt = jaguar.ZOSGD([x], lr=1e-3)
    opt.watch_dtype(torch.float32)
    with pytest.warns(UserWarning, match=f"{dtype}; at tau 1e-3"):
        opt.watch_dtype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.watch_dtype(dtype)
        opt.step(lambda: (x.square().sum()).to(dtype))

"""ZO-SignSGD: the element-wise sign of the estimate, against numpy; every other law is ZO-SGD's, whose code it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.oracles import DIRECTION, sign_at, step_key_ints, stream_ints
from helpers.tensors import weights
from jaguar import ZOSGD, ZOSignSGD

TAU, LR, DECAY = 2.0**-6, 1e-2, 0.1


def closure_of(x: torch.Tensor, losses: list[float]):
    def closure() -> torch.Tensor:
        losses.append(float((x * (x - 0.3)).sum()))
        return torch.tensor(losses[-1])

    return closure


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("n_directions", [1, 3])
def test_steps_equal_numpy(n_directions: int, momentum: float) -> None:
    f = np.float32
    x = weights(torch.float32, 5, 9).requires_grad_()
    options = {"tau": TAU, "seed": 12345, "distribution": "rademacher", "restore": "copy", "n_directions": n_directions}
    opt = ZOSignSGD([("x", x)], LR, momentum, DECAY, **options)
    own, m, losses = x.detach().numpy().ravel().copy(), np.zeros(45, f), []
    for t in range(6):
        losses.clear()
        opt.step(closure_of(x, losses))
        g = np.zeros(45, f)
        for k in range(n_directions):
            key = step_key_ints(12345, t, k, DIRECTION)
            z = np.array([sign_at(key, stream_ints("x"), i) for i in range(45)], f)
            g += z * ((f(losses[2 * k]) - f(losses[2 * k + 1])) / f(2 * TAU))
        g = g / f(n_directions)
        m = f(momentum) * m + g
        own = own * f(1 - LR * DECAY) - f(LR) * np.sign(m)
        assert np.array_equal(x.detach().numpy().ravel(), own)


def test_every_coordinate_moves_by_lr_whatever_the_derivative() -> None:
    x = torch.zeros(1000, requires_grad=True)
    opt = ZOSignSGD([("x", x)], 2.0**-10, tau=1e-3, distribution="gaussian")
    losses = iter((1e6, 0.0))
    opt.step(lambda: torch.tensor(next(losses)))
    assert torch.equal(x.abs(), torch.full_like(x, 2.0**-10)) and 400 < int((x > 0).sum()) < 600


def test_a_checkpoint_of_zo_sgd_does_not_fit() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="ZOSGD"):
        ZOSignSGD([("x", x)]).load_state_dict(ZOSGD([("x", x)]).state_dict())

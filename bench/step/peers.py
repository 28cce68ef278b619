"""Peers of the optimizers, written from the formulas: MeZO's loop, torch._foreach, the released JAGUAR.

All of them work on the same tensors in place, with the same losses, and store by nearest rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from step.parity import Losses, expect_close
from step.shapes import Named, cut

TAU, LR, BETA = 1e-3, 1e-6, 0.9
_VISIBLE_LR = 1e-3  # in checks: with rho = 35 a step far above bf16's rounding
# Half the spacing of bf16 from 1/16 to 1/8, where the largest of the weights lie: one rounding.
_NEAREST = 2.0**-12
_RHO = (Losses.values[0] - Losses.values[1]) / (2 * TAU)


def _small(named: Named) -> tuple[Named, list[Tensor]]:
    """Small copies under their names, and copies of the copies."""
    corners = cut(named)
    small = [(f"small.{i}.weight", corner) for i, corner in enumerate(corners)]
    return small, [corner.clone() for corner in corners]


class MezoLoop:
    """MeZO's published loop (arXiv 2305.17333, Algorithm 1): four passes, z drawn again in each, tensor by tensor.

    The order of its operations is the released one, decay included: 37 accesses of each element (74 bytes in bf16)
    in 18 kernels per tensor.
    """

    name, what = "MeZO's loop", "step"

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._named, self._closure, self._lr, self._decay = named, closure, lr, 0.0
        self._seed = 0

    def _z(self, p: Tensor) -> Tensor:
        return torch.normal(mean=0.0, std=1.0, size=p.size(), dtype=p.dtype, device=p.device)

    def _perturb(self, scale: float) -> None:
        torch.manual_seed(self._seed)
        for _, p in self._named:
            p.add_(scale * self._z(p) * TAU)

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        self._seed += 1
        self._perturb(1.0)
        plus = self._closure()
        self._perturb(-2.0)
        minus = self._closure()
        self._perturb(1.0)
        rho = ((plus - minus) / (2 * TAU)).item()
        torch.manual_seed(self._seed)
        for name, p in self._named:
            z = self._z(p)
            if any(part in name for part in ("bias", "layer_norm", "layernorm")):
                p.sub_(self._lr * (rho * z))
            else:
                p.sub_(self._lr * (rho * z + self._decay * p))

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless a step is x - lr rho z, up to the roundings of four passes."""
        small, before = _small(named)
        loop = cls(small, Losses(before[0].device), _VISIBLE_LR)
        loop()
        torch.manual_seed(loop._seed)
        for (name, p), x in zip(small, before, strict=True):
            expect_close(p, x.float() - _VISIBLE_LR * _RHO * loop._z(p).float(), name)


class ForeachMezo:
    """MeZO with `_foreach` operations: z is drawn once into a second copy of the parameters' memory and kept."""

    name, what = "MeZO, torch._foreach, z kept in memory", "step"

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._params, self._closure, self._lr = [p.detach() for _, p in named], closure, lr
        sizes = [-(-p.numel() // 64) * 64 for p in self._params]  # every view is as aligned as its parameter
        self._flat = torch.empty(sum(sizes), dtype=self._params[0].dtype, device=self._params[0].device)
        self._z = [z[: p.numel()].view(p.shape) for z, p in zip(self._flat.split(sizes), self._params, strict=True)]

    @torch.no_grad()
    def __call__(self) -> None:
        """One step; the way back and the update are one pass."""
        self._flat.normal_()
        torch._foreach_add_(self._params, self._z, alpha=TAU)
        plus = self._closure()
        torch._foreach_add_(self._params, self._z, alpha=-2 * TAU)
        rho = ((plus - self._closure()) / (2 * TAU)).item()
        torch._foreach_add_(self._params, self._z, alpha=TAU - self._lr * rho)

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless a step is x - lr rho z, up to the roundings of three passes."""
        small, before = _small(named)
        step = cls(small, Losses(before[0].device), _VISIBLE_LR)
        step()
        for (name, p), x, z in zip(small, before, step._z, strict=True):
            expect_close(p, x.float() - _VISIBLE_LR * _RHO * z.float(), name)


class ForeachJaguar:
    """JAGUAR SignSGD, update="all", as a user of torch would write it: indexing for S, `_foreach` for the sign step."""

    name, what = "JAGUAR all, torch indexing and _foreach", "step"
    _every = 100

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._params, self._closure, self._lr = [p.detach() for _, p in named], closure, lr
        self._momenta = [torch.zeros_like(p) for p in self._params]
        # One coordinate of every hundred, so that none is drawn twice.
        self._firsts = [torch.arange(0, max(1, p.numel() - 99), 100, device=p.device) for p in self._params]
        self.picks: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        self.picks, saved = [], []
        for p, first in zip(self._params, self._firsts, strict=True):
            index = first + torch.randint(min(self._every, p.numel()), first.shape, device=p.device)
            sign = (torch.randint(2, first.shape, device=p.device) * 2 - 1).to(p.dtype)
            self.picks.append((index, sign))
            saved.append(p.view(-1)[index])
            p.view(-1)[index] = saved[-1] + TAU * sign
        plus = self._closure()
        for p, (index, sign), old in zip(self._params, self.picks, saved, strict=True):
            p.view(-1)[index] = old - TAU * sign
        rho = ((plus - self._closure()) / (2 * TAU)).item()
        for p, m, (index, sign), old in zip(self._params, self._momenta, self.picks, saved, strict=True):
            p.view(-1)[index] = old
            m.view(-1)[index] = BETA * m.view(-1)[index] + (1 - BETA) * rho * sign
        torch._foreach_add_(self._params, torch._foreach_sign(self._momenta), alpha=-self._lr)

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless a step from m = 0 is x - lr sign(rho s) on S and nothing else."""
        small, before = _small(named)
        step = cls(small, Losses(before[0].device), _VISIBLE_LR)
        step()
        for (name, p), x, (index, sign) in zip(small, before, step.picks, strict=True):
            wanted = x.float()
            wanted.view(-1)[index] -= _VISIBLE_LR * sign.float()
            expect_close(p, wanted, name, _NEAREST)


class ForeachSign:
    """The dense sign step alone with `_foreach` operations, from a momentum that is there."""

    name, what = "sign step, torch._foreach", "apply_"

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._params, self._lr = [p.detach() for _, p in named], lr
        self._momenta = [torch.randn_like(p) for p in self._params]

    @torch.no_grad()
    def __call__(self) -> None:
        """x <- x - lr sign(m)."""
        torch._foreach_add_(self._params, torch._foreach_sign(self._momenta), alpha=-self._lr)

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless x <- x - lr sign(m)."""
        small, before = _small(named)
        step = cls(small, None, _VISIBLE_LR)
        step()
        for (name, p), x, m in zip(small, before, step._momenta, strict=True):
            expect_close(p, x.float() - _VISIBLE_LR * m.sign().float(), name, _NEAREST)


class ReleasedJaguar:
    """What the authors' released JAGUAR SignSGD computes: one joint block of 10 % of the rows x 10 % of the columns.

    Its momentum is zeroed in every step, so that the update is -lr sign(rho) on the blocks; whole tensors are zeroed,
    their sign is taken and they are added nevertheless.
    """

    name, what = "JAGUAR as released", "step"

    def __init__(self, named: Named, closure: Any, lr: float = LR) -> None:
        self._params, self._closure, self._lr = [p.detach() for _, p in named], closure, lr
        self._gradients = [torch.zeros_like(p) for p in self._params]
        self.blocks: list[tuple[Tensor, ...]] = []

    @staticmethod
    def _block(p: Tensor) -> tuple[Tensor, ...]:
        axes = [torch.randperm(n, device=p.device)[: max(1, n // 10)] for n in p.shape]
        return (axes[0],) if len(axes) == 1 else (axes[0].unsqueeze(1), axes[1])

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        self.blocks, saved = [], []
        for p in self._params:
            block = self._block(p)
            self.blocks.append(block)
            saved.append(p[block].clone())
            p[block] = p[block] + TAU
        plus = self._closure()
        for p, block in zip(self._params, self.blocks, strict=True):
            p[block] = p[block] - 2 * TAU
        minus = self._closure()
        for p, block, old in zip(self._params, self.blocks, saved, strict=True):
            p[block] = old
        rho = ((plus - minus) / (2 * TAU)).item()
        for p, g, block in zip(self._params, self._gradients, self.blocks, strict=True):
            g.zero_()
            g[block] = BETA * g[block] + (1 - BETA) * rho
            p.add_(g.sign(), alpha=-self._lr)

    @classmethod
    def check(cls, named: Named) -> None:
        """Raises Mismatch unless a step is x - lr sign(rho) on the blocks and nothing else."""
        small, before = _small(named)
        step = cls(small, Losses(before[0].device), _VISIBLE_LR)
        step()
        for (name, p), x, block in zip(small, before, step.blocks, strict=True):
            wanted = x.float()
            wanted[block] -= _VISIBLE_LR
            expect_close(p, wanted, name, _NEAREST)


PEERS = (MezoLoop, ForeachMezo, ForeachJaguar, ForeachSign, ReleasedJaguar)

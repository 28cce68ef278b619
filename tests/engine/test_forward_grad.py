"""ForwardGrad: derivatives that are those of a backward pass, on real architectures, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny
from helpers.trainers import scored
from jaguar import ForwardGrad
from jaguar.cli.finetune.progress import Losses
from jaguar.method.directions import Gaussian
from jaguar.method.rng import Draw, Elements
from jaguar.optimizers import tangents


def along(opt: ForwardGrad, seed: int, step: int = 0) -> dict[Tensor, Tensor]:
    """z of every tensor, 0 in the rows that stay."""
    found = {}
    for s in opt.slots:
        elements = Elements([(s.stream, 0, s.count)], s.tensor.device)
        found[s.tensor] = Gaussian().values_of(Draw(seed, step, 0), elements).view(s.tensor.shape)
        if s.kept is not None:
            found[s.tensor][s.kept] = 0.0
    return found


def by_backward(loss: Tensor, z: dict[Tensor, Tensor]) -> float:
    grads = torch.autograd.grad(loss, list(z), allow_unused=True)
    return sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, z.values(), strict=True) if g is not None)


@pytest.mark.parametrize("name", ["opt", "llama", "roberta"])
def test_the_derivative_is_that_of_a_backward_pass(name: str) -> None:
    model = tiny.architecture(name).eval()
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0

    def closure() -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss

    opt = ForwardGrad(model.named_parameters(), lr=1e-3, model=model, seed=3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    record = opt.measure(closure)
    z = along(opt, 3)
    exact = by_backward(closure(), z)
    assert abs(record.losses[1] - exact) <= 1e-5 * max(1.0, abs(exact))
    assert record.losses[0] == pytest.approx(closure().item(), rel=1e-5)
    assert all(type(p) is nn.Parameter and torch.equal(p, before[n]) for n, p in model.named_parameters())
    opt.apply_(record)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - 1e-3 * record.losses[1] * z[p], rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """Its output projection is used by another module than its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 1)

    def forward(self) -> Tensor:
        x = torch.linspace(-1, 1, 48).view(2, 3, 8)
        y, _ = self.attention(x, x, x, need_weights=False)
        return (self.out(y) ** 2).mean()


def test_where_a_parameter_is_used_elsewhere_all_tangents_are_held(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Attention()
    tangents._SAID.clear()
    opt = ForwardGrad(model.named_parameters(), model=model, seed=3)
    with caplog.at_level(logging.INFO, "jaguar"):
        for step in range(2):
            record = opt.measure(model)
            assert record.losses[1] == pytest.approx(by_backward(model(), along(opt, 3, step)), rel=1e-4, abs=1e-6)
            opt.apply_(record)
    said = [r.getMessage() for r in caplog.records]
    assert sum("attention.out_proj" in m and "all tangents are held" in m for m in said) == 1
    assert sum("attention runs in its plain form" in m for m in said) == 1
    other = ForwardGrad(model.named_parameters(), seed=3)
    with pytest.raises(RuntimeError, match=r"attention\.out_proj.* was used outside the forward.*: pass model="):
        other.measure(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())


class Tied(nn.Module):
    """Its embedding is a weight by hand too, and the closure adds a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self) -> Tensor:
        h = self.hidden(self.embedding(torch.arange(7)))
        return nn.functional.linear(h, self.embedding.weight).logsumexp(-1).mean()


@pytest.mark.parametrize("penalty", [False, True])
def test_second_uses_of_a_parameter_are_noticed(penalty: bool) -> None:
    torch.manual_seed(0)
    model = Tied()

    def closure() -> Tensor:
        more = sum(p.pow(2).sum() for p in model.hidden.parameters()) if penalty else 0.0
        return model() + 0.1 * more

    opt = ForwardGrad(model.named_parameters(), model=model, seed=3)
    assert opt.measure(closure).losses[1] == pytest.approx(by_backward(closure(), along(opt, 3)), rel=1e-4, abs=1e-6)
    captured = model.hidden.weight
    with pytest.raises(
        RuntimeError, match=r"hidden\.weight was used outside .*: fetch it from its module in the closure"
    ):
        opt.measure(lambda: model() + captured.pow(2).sum())
    with pytest.raises(ValueError, match=r"embedding\.weight is no parameter of model="):
        ForwardGrad(model.named_parameters(), model=model.hidden)
    with pytest.raises(RuntimeError, match=r"loss has no derivative, although the model ran"):
        opt.measure(lambda: torch.tensor(model().item()))
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_only_the_tangents_of_modules_in_flight_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    most, x = [0], torch.ones(2, 16)
    real = tangents.Tangents._enter

    def counted(self: tangents.Tangents, module: nn.Module, inputs: object = None) -> None:
        real(self, module, inputs)
        most[0] = max(most[0], sum(len(own) for own in self._own.values()))

    monkeypatch.setattr(tangents.Tangents, "_enter", counted)
    opt = ForwardGrad(model.named_parameters(), model=model)
    opt.step(lambda: model(x).square().mean())
    assert most[0] == 2, "weight and bias of one layer"


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


def test_an_operation_without_a_formula_is_named() -> None:
    model = nn.Linear(4, 4)
    opt = ForwardGrad(model.named_parameters(), model=model)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated in forward mode: .*(Custom|jvp)"):
        opt.step(lambda: Custom.apply(model(torch.ones(1, 4))).sum())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_refusals() -> None:
    w = [("w", nn.Parameter(torch.zeros(3)))]
    with pytest.raises(ValueError, match="restore='walk': forward mode perturbs nothing"):
        ForwardGrad(w, restore="walk")
    with pytest.raises(ValueError, match="has an estimator of its own"):
        ForwardGrad(w, estimator="one-sided")
    with pytest.raises(TypeError, match="model must be the module"):
        ForwardGrad(w, model=3)  # type: ignore[arg-type]


def test_the_losses_of_the_picture_are_losses(tmp_path: Path) -> None:
    """And not means of a loss and a derivative."""
    losses = Losses()
    trainer = scored(tmp_path, steps=3, optim_zo="forward-grad", coordinates=None, callbacks=[losses])
    trainer.train()
    assert len(losses.values) == 3 and losses.values[-1] == trainer.zeroth_order.last_record.losses[0]


def test_the_derivative_of_a_scored_loss(tmp_path: Path) -> None:
    """As the trainer's closure has it: rows packed, options scored, sums in fp64."""
    trainer = scored(tmp_path, steps=2, optim_zo="forward-grad", coordinates=None)
    trainer.train()
    opt, model = trainer.zeroth_order, trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    total, weight = trainer.scorer.loss(batch, model)
    exact = by_backward(total / weight, along(opt, opt._seed, 2))
    record = opt.measure(lambda: (lambda pair: pair[0] / pair[1])(trainer.scorer.loss(batch, model)))
    assert record.losses[1] == pytest.approx(exact, rel=1e-4, abs=1e-6)

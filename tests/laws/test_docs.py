"""docs/adding-a-method.md is true: its blocks run in order, print what they say, and its lists are complete."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

import jaguar
from jaguar.method import directions, estimators, orthogonal, rules

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", TEXT, flags=re.S | re.M)]
KERNELS = "@triton.jit"


def block_with(words: str) -> str:
    (found,) = [block for block in BLOCKS if words in block]
    return found


def promised(block: str) -> list[str]:
    """What the comments behind calls of print say that it prints."""
    said = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.M)
    return [line for comment in said for line in comment.split(", then ")]


def executed(block: str, names: dict[str, Any], folder: Path) -> list[str]:
    """The lines that a block prints; it lies in a file, where Triton looks for its kernels' source."""
    path = folder / f"block_{BLOCKS.index(block)}.py"
    path.write_text(block)
    with redirect_stdout(StringIO()) as out:
        exec(compile(block, path, "exec"), names)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, list[str]]]]:
    """The names that the page leaves behind, and what each block printed."""
    folder, names, printed = tmp_path_factory.mktemp("docs"), {"__name__": "page"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            if KERNELS not in block and "triton_kernels" not in block:
                own = {"__name__": "page"} if "jaguar\n" in block else dict(names)  # who imports it is copied alone
                printed[block] = executed(block, own, folder)
                names |= own
    yield names, printed


def made(direction: Any, rule: Any, **more: Any) -> tuple[torch.nn.Parameter, jaguar.ZerothOrder]:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    numbers = {"beta1": 0.9, "beta2": 0.99} if rule.keys.keys() == {"beta1", "beta2"} else {"momentum": 0.5}
    return w, jaguar.ZerothOrder([("w", w)], jaguar.Method(direction, rule), lr=1e-2, **numbers, **more)


def test_the_blocks_print_what_they_say(ran: Any) -> None:
    _, printed = ran
    assert len(printed) == len(BLOCKS) - 2 and sum(map(len, printed.values())) >= 5
    for block, lines in printed.items():
        assert lines == promised(block)


def test_the_own_method_is_under_forty_lines() -> None:
    """With its imports, as it is copied."""
    assert len(block_with("class Lion").strip().splitlines()) < 40


def test_without_a_kernel_it_runs_on_the_reference_and_triton_refuses_it_by_name(ran: Any) -> None:
    pytest.importorskip("triton")
    names, _ = ran
    w, auto = made(directions.Gaussian(), names["Lion"]())
    before = w.detach().clone()
    auto.step(lambda: w.square().sum())
    assert "backend: reference" in repr(auto) and not w.equal(before)
    with pytest.raises(RuntimeError, match=r"the rule's lion has no kernel.*backend='auto' uses the reference"):
        made(directions.Gaussian(), names["Lion"](), backend="triton")


def test_an_own_direction_runs_on_the_reference_and_triton_refuses_it_by_name(ran: Any) -> None:
    pytest.importorskip("triton")
    walsh = ran[0]["Walsh"]()
    bits = []
    for direction in (walsh, directions.Layers(walsh, keep=1.0, layers=("w",))):
        w, auto = made(direction, rules.SGD())
        auto.step(lambda w=w: w.square().sum())
        assert "backend: reference" in repr(auto)
        bits.append(w.detach())
        with pytest.raises(RuntimeError, match="Walsh is drawn by the reference only"):
            made(direction, rules.SGD(), backend="triton")
    assert bits[0].equal(bits[1]) and not bits[0].equal(made(walsh, rules.SGD())[0])


def test_its_kernel_has_the_bits_of_the_reference(ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from jaguar.triton_kernels import rules as kernels

    names, _ = ran
    own: dict[str, Any] = {"__name__": "own_kernels"}
    executed(block_with(KERNELS), own, tmp_path)
    for name in ("lion", "lion_step"):
        monkeypatch.setattr(kernels, name, own[name], raising=False)
    seen = []
    for backend in ("reference", "triton"):
        w, opt = made(directions.Gaussian(), names["Lion"](), backend=backend)
        for _ in range(3):
            opt.step(lambda w=w: (w - 0.3).square().sum())
        seen.append([w.detach(), opt.state[w]["m"], opt.state[w]["u"]])
    assert all(map(torch.equal, *seen))


def test_launches_are_seen(ran: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    block = block_with("triton_kernels.launch")
    assert executed(block, dict(ran[0]), tmp_path) == promised(block)


@dataclass(frozen=True)
class Clipped(directions.Gaussian):
    """A distribution that keeps its parent's name."""

    def values_of(self, draw: Any, elements: Any) -> torch.Tensor:
        return super().values_of(draw, elements).clamp(-1, 1)


class Last(directions.Coordinates):
    """A sample that kernels do not know."""


def sgd_step(x: torch.Tensor, m: torch.Tensor, decay: float, lr: float) -> torch.Tensor:
    return x


class Still(rules.SGD):
    """A step that has the name of another one."""

    step = staticmethod(sgd_step)


@pytest.mark.parametrize(
    ("direction", "rule", "reason"),
    [
        (Clipped(), rules.SGD(), "Clipped is drawn by the reference only"),
        (directions.Layers(Clipped(), layers=("w",)), rules.SGD(), "Clipped is drawn by the reference only"),
        (Last(0.5), rules.SGD(), "Last is drawn by the reference only"),
        (directions.Gaussian(), Still(), r"sgd_step is not jaguar\.rules\.sgd_step"),
    ],
    ids=["dense", "inner", "sparse", "rule"],
)
def test_no_kernel_computes_something_else_under_the_same_name(direction: Any, rule: Any, reason: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match=reason):
        made(direction, rule, backend="triton")
    assert "backend: reference" in repr(made(direction, rule)[1])


@dataclass(frozen=True)
class Half(directions.Rademacher):
    """Leaves every second element where it is."""

    name = "half"

    def values_of(self, draw: Any, elements: Any) -> torch.Tensor:
        e = super().values_of(draw, elements)
        return e * (elements.at(torch.arange(len(e)))[1] % 2)


@pytest.mark.parametrize("n", [1, 2], ids=["alone", "together"])
def test_zeros_of_a_direction_are_not_taken_for_lost_perturbations(n: int) -> None:
    tensors = [torch.zeros(10, requires_grad=True) for _ in range(n)]
    opt = jaguar.ZerothOrder(tensors, jaguar.Method(Half(), rules.SGD()), lr=0.1, momentum=0)
    opt.step(lambda: sum((x - 1).square().sum() for x in tensors))
    assert set(opt.lost_share.values()) == {0.0}
    assert all(bool((x[0::2] == 0).all()) and bool((x[1::2] != 0).all()) for x in tensors)


@dataclass(frozen=True)
class Wide(directions.Rademacher):
    scale: float = 1.0


@dataclass(frozen=True)
class Weighted(estimators.TwoSided):
    weight: float = 1.0


@pytest.mark.parametrize("part", [(Wide, "scale"), (Weighted, "weight")], ids=["direction", "estimator"])
def test_fields_of_own_parts_are_compared_by_checkpoints(part: Any) -> None:
    kind, field = part
    opts = []
    for value in (1.0, 2.0):
        own = kind(**{field: value})
        parts = (own, rules.SGD()) if kind is Wide else (directions.Gaussian(), rules.SGD(), own)
        opts.append(jaguar.ZerothOrder([torch.zeros(3, requires_grad=True)], jaguar.Method(*parts), lr=1, momentum=0))
    with pytest.raises(ValueError, match=rf"{field}=2\.0, this optimizer has {field}=1\.0"):
        opts[0].load_state_dict(opts[1].state_dict())


def test_the_table_of_parts_is_complete() -> None:
    rows = re.findall(r"^\| (direction|estimator|rule) \|.*\| (.*) \|$", TEXT, flags=re.M)
    listed = {name for _, cell in rows for name in re.findall(r"`([A-Z]\w+)`", cell)}
    abstract = {directions.Direction, directions.Dense, directions.Sparse, rules.Rule, estimators.Estimator}
    bases = (directions.Direction, rules.Rule, estimators.Estimator)
    there = {
        kind
        for module in (directions, rules, estimators, orthogonal)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, bases)
    }
    assert listed == {kind.__name__ for kind in there - abstract}


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(((?!http)[^)]+)\)", TEXT)
    assert links and all((PAGE.parent / link).exists() for link in links)

"""Who may import whom (DESIGN 11), read from the source; and what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaguar

ROOT = Path(jaguar.__file__).parent
KERNELS = ROOT.parent / "triton_kernels"
SOURCES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)

# Bottom to top; a file imports only from layers below its own, or from its own package. The rest are outer leaves.
LAYERS = [
    {"saved_values", "reached"},
    {"record", "journal", "interrupts", "module_state", "rng", "storage", "params", "rules", "schemes"}
    | {"triton_kernels"},
    {"samples"},
    {"isolation", "rounding", "directions", "estimators", "iteration", "extension"},
    {"launches"},
    {"reference"},
    {"fused"},
    {"parts", "muon", "kept"},
    {"ops"},
    {"polar"},
    {"optimizers"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NO_TORCH = {"record", "journal"}
OUTSIDE_THE_ENGINE = {
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "rich",
    "matplotlib",
    "gguf",
    "numpy",
}


def part_of(path: Path) -> str:
    """The module or package right below jaguar that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, also inside functions, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violations(path: Path) -> list[str]:
    """What `path` imports and may not."""
    own, wrong = part_of(path), []
    if own not in LEVEL:
        return []
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top in OUTSIDE_THE_ENGINE or (own in NO_TORCH and top == "torch"):
            wrong.append(name)
        if top == "jaguar":
            other = rest.split(".")[0]
            allowed = other == own or LEVEL.get(other, 99) < LEVEL[own]
            if not allowed:
                wrong.append(name)
    return wrong


ENGINE = [p for p in SOURCES if part_of(p) in LEVEL]


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_engine_imports_point_down(path: Path) -> None:
    assert not violations(path)


def test_the_engine_is_there() -> None:
    beside_the_package, still_to_come = {"triton_kernels"}, {"journal"}
    assert {part_of(p) for p in ENGINE} >= set(LEVEL) - beside_the_package - still_to_come


BROKEN = {
    "cli": ("rules.py", "import jaguar.cli"),
    "transformers": ("ops.py", "def f():\n    from transformers import Trainer"),
    "torch": ("record.py", "import torch.nn"),
    "upwards": ("rng.py", "from jaguar.directions import Gaussian"),
    "leaf": ("optimizers/base.py", "from jaguar import scoring"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_law_notices(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, text = BROKEN[case]
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert violations(tmp_path / name)


def test_only_ops_names_the_backends() -> None:
    for path in ENGINE:
        if part_of(path) not in ("fused", "ops"):
            assert not [n for n in imports(path) if n.startswith("jaguar.triton_kernels")]
        if part_of(path) not in ("ops", "reference", "fused", "optimizers"):
            assert not [n for n in imports(path) if n.startswith("jaguar.reference")]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    """Besides the standard library."""
    allowed = {"torch", "triton", "__future__", "jaguar.triton_kernels", *sys.stdlib_module_names}
    wrong = [n for n in imports(path) if n.split(".")[0] not in allowed and not n.startswith("jaguar.triton_kernels")]
    assert not wrong


LIGHT = [
    "import jaguar",
    "import jaguar.record",
    "from jaguar import Record; Record(1, (1.0,), (2.0,)).pack()",
    "import jaguar; dir(jaguar)",
]


@pytest.mark.parametrize("statement", LIGHT)
def test_reading_a_record_needs_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, timeout=600).returncode == 0


def test_importing_the_engine_loads_no_leaf() -> None:
    leaves = "'transformers', 'jaguar.cli', 'jaguar.scoring'"
    code = f"import sys, jaguar.optimizers; sys.exit(any(m in sys.modules for m in ({leaves})))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, timeout=600).returncode == 0


def test_public_names() -> None:
    for name in jaguar.__all__:
        assert getattr(jaguar, name) is not None
        assert name in dir(jaguar)
    for module in ("optimizers", "reference", "fused"):
        package = importlib.import_module(f"jaguar.{module}")
        assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jaguar.no_such_name


def test_public_names_have_docstrings() -> None:
    for name in set(jaguar.__all__) - {"__version__"}:
        assert getattr(jaguar, name).__doc__


@pytest.mark.parametrize("path", [*SOURCES, *sorted(KERNELS.rglob("*.py"))], ids=lambda p: p.name)
def test_files_are_small_and_have_names(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 450
    assert path.name != "utils.py"


def test_the_engine_never_seeds_or_reads_global_generators() -> None:
    """Only the isolation of closures touches them (rule 3)."""
    for path in ENGINE:
        if part_of(path) in ("isolation", "saved_values"):
            continue
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        banned = (
            "torch.rand",
            "torch.manual_seed",
            "torch.bernoulli",
            "torch.normal",
            "random.",
            "numpy.random",
            "np.random",
        )
        assert not [c for c in calls if c.startswith(banned)], path


@pytest.mark.parametrize("name", ["rules.py", "reference/coordinate.py", "reference/dense.py", "reference/common.py"])
def test_the_arithmetic_has_no_fused_operations(name: str) -> None:
    """Rule 8: no `alpha=`, lerp, addcmul or addcdiv, whose fused multiply-add changes bits."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call):
            assert "alpha" not in [k.arg for k in node.keywords]
            assert ast.unparse(node.func).rsplit(".", 1)[-1].rstrip("_") not in (
                "lerp",
                "addcmul",
                "addcdiv",
                "addmm",
                "baddbmm",
            )

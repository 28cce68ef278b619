"""Laws of imports between rooms, read from the source; and what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaguar
import jaguar.trainer
from helpers.imports import imports

ROOT = Path(jaguar.__file__).parent
KERNELS = ROOT.parent / "triton_kernels"
SOURCES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)
Modules = dict[str, Path]


def modules(root: Path, package: str = "jaguar") -> Modules:
    """Dotted names of the files below a folder."""
    files = {path: path.relative_to(root).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join([package, *parts]).removesuffix(".__init__"): path for path, parts in files.items()}


# Rooms, bottom to top: a file imports from rooms on floors below its own room's, or from its own room.
ENGINE_FLOORS = [{"record", "triton_kernels"}, {"method"}, {"backends"}, {"optimizers"}]
# Language models and their tasks; they know nothing of the engine.
TASK_FLOORS = [{"models"}, {"tasks"}, {"scoring"}]
# Whoever asks `jaguar` for a public name stands above all that it names.
TOP_FLOORS = [{"trainer"}, {"__init__"}, {"cli"}, {"__main__"}]
FLOORS = [*ENGINE_FLOORS, *TASK_FLOORS, *TOP_FLOORS]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ENGINE_ROOMS, TASK_ROOMS = set().union(*ENGINE_FLOORS), set().union(*TASK_FLOORS)
# Inside a room, a folder or a file that must not know what is above it: (who, whom).
CLOSED = [
    ("backends.polar", "backends.ops"),
    ("backends.reference", "backends.triton"),
    ("backends.reference", "backends.bind"),
    ("backends.triton", "backends.bind"),
    ("cli.finetune", "cli.commands"),
    ("cli.finetune", "cli.parser"),
]
# Functions that import what a string names, unseen by the laws on imports, and the only files that call them: packages
# whose public names are imported on first use, and the loader of the CUDA extension.
DYNAMIC = {"import_module", "__import__"}
MAY_BE_DYNAMIC = {"__init__.py", "optimizers/__init__.py", "trainer/__init__.py", "backends/polar/cuda.py"}
MODULES = modules(ROOT) | modules(KERNELS, "jaguar.triton_kernels")
NO_TORCH = {"record"}
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


def room_of(path: Path) -> str:
    """The file or the folder right below jaguar that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def dynamic(path: Path) -> set[str]:
    """The functions of `DYNAMIC` that a file names, however it came by them."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return DYNAMIC & {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name")}


def module_of(name: str, known: Modules) -> str | None:
    """The file that an imported name is in: a submodule, else the package that has the name; None: of another house."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def violations(path: Path) -> list[str]:
    """What `path` imports and may not."""
    own, wrong = room_of(path), []
    if own not in LEVEL:
        return ["it has no room"]
    if path.relative_to(ROOT).as_posix() not in MAY_BE_DYNAMIC:
        wrong += dynamic(path)
    where = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    closed = [whom for who, whom in CLOSED if f"{where}.".startswith(f"{who}.")]
    for name in imports(path):
        top = name.partition(".")[0]
        if (own in ENGINE_ROOMS and top in OUTSIDE_THE_ENGINE) or (own in NO_TORCH and top == "torch"):
            wrong.append(name)
        if module := module_of(name, MODULES):
            other = module.partition(".")[2].partition(".")[0] or "__init__"
            upwards = other != own and LEVEL.get(other, len(FLOORS)) >= LEVEL[own]
            upwards |= any(f"{module}.".startswith(f"jaguar.{whom}.") for whom in closed)
            if upwards or (own in TASK_ROOMS and other in ENGINE_ROOMS):
                wrong.append(name)
    return wrong


ENGINE = [p for p in SOURCES if room_of(p) in ENGINE_ROOMS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert not violations(path)


def test_every_room_is_there() -> None:
    beside_the_package, still_to_come = {"triton_kernels"}, {"journal"}
    assert {room_of(p) for p in SOURCES} == set(LEVEL) - beside_the_package - still_to_come
    assert len(LEVEL) == sum(map(len, FLOORS))


BROKEN = {
    "cli": ("method/rules.py", "import jaguar.cli.commands"),
    "transformers": ("backends/ops.py", "def f():\n    from transformers import Trainer"),
    "torch": ("record/record.py", "import torch.nn"),
    "upwards": ("method/rng.py", "from jaguar.backends.launches import Lost"),
    "leaf": ("optimizers/base.py", "from jaguar import scoring"),
    "for types": ("method/orthogonal.py", "if TYPE_CHECKING:\n    from jaguar.backends.launches import Moves"),
    "a public name": ("optimizers/base.py", "from jaguar import Record"),
    "the package": ("trainer/arguments.py", "def f():\n    import jaguar"),
    "from task to engine": ("tasks/task.py", "from jaguar.method import rng"),
    "from model to scorer": ("models/load.py", "from jaguar.scoring.scorer import Scorer"),
    "from trainer to command": ("trainer/trainer.py", "from jaguar.cli.flags import DEFAULTS"),
    "from run to cli": ("cli/finetune/job.py", "if TYPE_CHECKING:\n    from jaguar.cli import commands"),
    "from run to parser": ("cli/finetune/run.py", "from jaguar.cli.parser import parse"),
    "by a string": ("method/rules.py", "import importlib\nimportlib.import_module('jaguar.cli.commands')"),
    "by a string, renamed": ("models/load.py", "from importlib import import_module as load\nload('jaguar.cli')"),
    "by a string, built in": ("tasks/task.py", "def f():\n    __import__('jaguar.cli.commands')"),
    "by a string, in a package": ("tasks/__init__.py", "import importlib as i\ni.import_module('jaguar.cli')"),
    "inside a room": ("backends/reference/dense.py", "from jaguar.backends.triton import DeviceScalars"),
    "no room": ("novel.py", "import math"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_law_notices(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, text = BROKEN[case]
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert violations(tmp_path / name)


def test_files_that_may_import_by_a_string_do() -> None:
    assert all(dynamic(ROOT / name) for name in MAY_BE_DYNAMIC)


def circles(known: Modules) -> set[frozenset[str]]:
    """The sets of files that import each other, directly or by way of others."""
    imported = {name: {module_of(other, known) for other in imports(path)} - {None} for name, path in known.items()}
    reached = {}
    for name in known:
        seen, ahead = set(), set(imported[name])
        while ahead:
            other = ahead.pop()
            seen.add(other)
            ahead |= imported[other] - seen
        reached[name] = seen
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in known if a in reached[a]}


def test_no_circle_between_files() -> None:
    assert not circles(MODULES)


CIRCLES = {
    "of two": {"a": "import jaguar.b", "b": "from jaguar.a import x"},
    "of three": {"a": "from jaguar import b", "b": "import jaguar.c as c", "c": "from jaguar.a import x"},
    "for types": {"a": "if TYPE_CHECKING:\n    from jaguar.b import x", "b": "from jaguar import a"},
    "in a function": {"a": "def f():\n    import jaguar.b", "b": "import jaguar.a"},
    "by a public name": {"__init__": "if TYPE_CHECKING:\n    from jaguar.a import x", "a": "from jaguar import x"},
    "by the package": {"__init__": "from jaguar.a import x", "a": "import jaguar"},
    "by a folder's names": {"p/__init__": "from jaguar.p.a import x", "p/a": "from jaguar.p import x"},
}


def planted(files: dict[str, str], folder: Path) -> Modules:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return modules(folder)


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_is_found(case: str, tmp_path: Path) -> None:
    known = planted(CIRCLES[case], tmp_path)
    assert circles(known) == {frozenset(known)}


def test_a_submodule_is_not_its_package(tmp_path: Path) -> None:
    files = {"__init__": "from jaguar.a import x", "a": "from jaguar import b\nimport jaguar.p.c", "b": "import torch"}
    assert not circles(planted(files | {"p/__init__": "from jaguar.p.c import x", "p/c": ""}, tmp_path))


def test_public_names_are_imported_from_where_they_are_found() -> None:
    """So that the laws above, which read imports, see what the package imports on first use."""
    seen = {*imports(ROOT / "__init__.py"), *imports(ROOT / "optimizers" / "names.py")}
    assert seen >= {f"{home}.{name}" for name, home in jaguar._HOME.items()}
    assert seen >= set(jaguar._PARTS.values())
    lazy = jaguar.trainer._HOME.items()
    assert {*imports(ROOT / "trainer" / "__init__.py")} >= {f"{home}.{name}" for name, home in lazy}


def test_at_most_twelve_entries() -> None:
    """Generated files aside: what a clone has."""
    generated = {"__pycache__", "triton_kernels"}
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith("_cuda")} - generated
    assert len(entries) <= 12, sorted(entries)


def test_only_backends_name_the_kernels() -> None:
    for path in ENGINE:
        if room_of(path) != "backends":
            assert not [n for n in imports(path) if n.startswith("jaguar.triton_kernels")]
        if room_of(path) not in ("backends", "optimizers"):
            assert not [n for n in imports(path) if n.startswith("jaguar.backends.reference")]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    """Besides the standard library."""
    allowed = {"torch", "triton", "__future__", "jaguar.triton_kernels", *sys.stdlib_module_names}
    wrong = [n for n in imports(path) if n.split(".")[0] not in allowed and not n.startswith("jaguar.triton_kernels")]
    assert not wrong and not dynamic(path)


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
    leaves = "'transformers', 'jaguar.cli.commands', 'jaguar.scoring'"
    code = f"import sys, jaguar.optimizers; sys.exit(any(m in sys.modules for m in ({leaves})))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, timeout=600).returncode == 0


def test_public_names() -> None:
    for name in jaguar.__all__:
        assert getattr(jaguar, name) is not None
        assert name in dir(jaguar)
    for module in ("optimizers", "backends.reference", "backends.triton"):
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
    """Only the isolation of closures touches them."""
    for path in ENGINE:
        if path.stem in ("isolation", "saved_values"):
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


@pytest.mark.parametrize(
    "name", ["method/rules.py", *(f"backends/reference/{name}.py" for name in ("coordinate", "dense", "common"))]
)
def test_the_arithmetic_has_no_fused_operations(name: str) -> None:
    """No `alpha=`, lerp, addcmul or addcdiv, whose fused multiply-add changes bits."""
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

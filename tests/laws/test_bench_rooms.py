"""Laws of bench/: its rooms import each other without circles, and the table has every benchmark."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.imports import imports

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
from registry import BENCHMARKS  # noqa: E402

ROOMS = {"step", "polar", "scoring", "compile", "learning", "theorems", "gpu"}
FILES = {"__main__", "registry", "machine"}  # beside the rooms: what all of them use


def sources(bench: Path) -> dict[str, Path]:
    """Files by their dotted names."""
    return {".".join(path.relative_to(bench).with_suffix("").parts): path for path in sorted(bench.rglob("*.py"))}


def circle(bench: Path) -> list[str]:
    """Rooms, or files beside them, that import each other; none: []."""
    found: dict[str, set[str]] = {}
    for name, path in sources(bench).items():
        room = name.partition(".")[0]
        found.setdefault(room, set()).update({other.partition(".")[0] for other in imports(path)} - {room})
    try:
        TopologicalSorter({room: others & set(found) for room, others in found.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def unlisted(bench: Path, table: dict[str, str]) -> set[str]:
    """Modules that have a function `main` and no line in the table, or the reverse."""
    modules = {name: ast.parse(path.read_text()).body for name, path in sources(bench).items() if name != "__main__"}
    mains = {name for name, body in modules.items() if any(getattr(node, "name", "") == "main" for node in body)}
    return mains ^ set(table.values())


TABLE = {name: entry.module for name, entry in BENCHMARKS.items()}


def test_rooms_are_those_that_are_named() -> None:
    found = {name.partition(".")[0] for name in sources(BENCH)}
    assert found == ROOMS | FILES
    for room in ROOMS:  # else a folder of tests/ with the same name would be found instead
        (text,) = ast.parse((BENCH / room / "__init__.py").read_text()).body
        assert isinstance(text, ast.Expr)


def test_rooms_have_no_circle() -> None:
    assert circle(BENCH) == []


CIRCLES = {
    "of two": {"a/x": "import b.y", "b/y": "from a import x"},
    "in a function": {"a/x": "def f():\n    from b import y", "b/y": "", "b/z": "from a.x import f"},
    "of three": {"a/x": "import b.x", "b/x": "from c import x", "c/x": "", "c/y": "from a.x import f"},
    "with a file": {"a/x": "import c", "c": "from a.y import f", "a/y": ""},
}


def planted(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_is_found(case: str, tmp_path: Path) -> None:
    assert set(circle(planted(CIRCLES[case], tmp_path))) == {name[0] for name in CIRCLES[case]}


def test_files_of_a_room_may_import_each_other(tmp_path: Path) -> None:
    files = {"a/x": "import a.y\nimport b.x", "a/y": "import a.x", "b/x": "import torch"}
    assert circle(planted(files, tmp_path)) == []


def test_every_benchmark_is_in_the_table_under_its_files_name() -> None:
    assert unlisted(BENCH, TABLE) == set()
    assert [module.rpartition(".")[2].replace("_", "-") for module in TABLE.values()] == list(TABLE)


def test_a_benchmark_that_is_missing_is_found(tmp_path: Path) -> None:
    files = {"__main__": "def main(): ...", "a/x": "def main(): ...", "a/y": "def f(): ...", "a/z": "def main(): ..."}
    folder = planted(files, tmp_path)
    assert unlisted(folder, {"x": "a.x", "z": "a.z"}) == set()
    assert unlisted(folder, {"x": "a.x"}) == {"a.z"}
    assert unlisted(folder, {"x": "a.x", "z": "a.z", "y": "a.y"}) == {"a.y"}


def named(text: str) -> list[str]:
    """Benchmarks that a page says how to run."""
    return re.findall(r"(?:python|\(PYTHON\)) bench ([a-z-]+)", text)


def test_benchmarks_that_pages_and_the_makefile_name_exist() -> None:
    root = BENCH.parent
    paths = [root / "Makefile", *root.glob("*.md"), *root.glob("docs/*.md"), *sources(BENCH).values()]
    found = {name: path.name for path in paths for name in named(path.read_text())}
    assert {name: where for name, where in found.items() if name not in BENCHMARKS} == {}
    assert {"step", "gpu", "architectures"} <= set(found)


@pytest.mark.parametrize("name", sources(BENCH))
def test_files_are_under_400_lines_and_have_names(name: str) -> None:
    assert len(sources(BENCH)[name].read_text().splitlines()) < 400
    assert not name.endswith("utils")

"""Laws of these tests: shared things are in tests/helpers, no file of tests is imported, and files are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Also in programs that tests write.
IMPORT = re.compile(r"^\s*(?:import|from)\s+(?:[\w.]+(?:\s+as\s+\w+)?\s*,\s*)*(?:\w+\.)*(test_\w+|conftest)\b", re.M)


def imported(text: str) -> list[str]:
    """Files of tests, or conftest, that a source imports."""
    return IMPORT.findall(text)


def test_no_file_of_tests_is_imported() -> None:
    found = {str(path.relative_to(TESTS)): imported(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("name", ["test_other", "conftest"])
@pytest.mark.parametrize(
    "form",
    [
        "import {}",
        "import os, {}",
        "import tiny as t, {} as o",
        "from {} import make",
        "def f():\n    from a.{} import b",
    ],
)
def test_an_import_is_noticed(form: str, name: str) -> None:
    assert imported('"""Text."""\n' + form.format(name) + "\n") == [name]
    assert imported("from helpers.tiny import test_rows\nfrom helpers import tiny\n") == []


def too_long(sources: dict[str, str]) -> list[str]:
    """Files of more than 400 lines."""
    return [name for name, text in sources.items() if len(text.splitlines()) > 400]


def test_files_are_under_400_lines() -> None:
    assert too_long({str(path.relative_to(TESTS)): path.read_text() for path in TESTS.rglob("*.py")}) == []


def test_a_long_file_is_noticed() -> None:
    assert too_long({"short": "pass\n" * 400, "long": "pass\n" * 401}) == ["long"]

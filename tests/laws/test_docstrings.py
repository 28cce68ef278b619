"""Laws of docstrings: those of modules begin with a noun or a verb."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "jaguar/**/", "triton_kernels/**/", "bench/**/", "tests/**/")
OPENERS = {"What", "Which", "Whether", "How", "Where", "When", "Why", "Who", "Whose", "Everything", "Shared"}


def openers(root: Path) -> dict[str, str]:
    """Modules whose docstring begins with one of `OPENERS`, and that word."""
    paths = [path for folder in FOLDERS for path in root.glob(f"{folder}*.py")]
    texts = {str(path.relative_to(root)): ast.get_docstring(ast.parse(path.read_text())) for path in paths}
    words = {name: re.split(r"\W", text or "", maxsplit=1)[0] for name, text in texts.items()}
    return {name: word for name, word in words.items() if word in OPENERS}


def test_module_docstrings_begin_with_a_noun_or_a_verb() -> None:
    assert openers(ROOT) == {}


@pytest.mark.parametrize("name", ["setup.py", "jaguar/method/__init__.py", "bench/gpu/a.py", "tests/a/b/test_c.py"])
def test_another_opener_is_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('"""What is done here."""\n')
    (tmp_path / "noun.py").write_text('"""Whatever is done, and how."""\n')
    assert openers(tmp_path) == {name: "What"}

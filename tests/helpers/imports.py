"""Imports of a source file, for the laws of rooms."""

from __future__ import annotations

import ast
from pathlib import Path


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, inside functions and for types only too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names

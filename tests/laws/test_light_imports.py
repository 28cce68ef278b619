"""Modules that are imported, by name: `import jaguar`, the help and one-line errors answer before torch could load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Formatting a help text takes these two; a progress bar and tables are for runs.
OF_HELP = {"rich", "rich_argparse"}
OF_RUNS = {"rich.live", "rich.progress", "rich.table", "jaguar.cli.finetune", "jaguar.trainer.arguments"}

PROGRAM = """
import contextlib, io, sys
found = {*sys.modules}
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        exec(sys.argv.pop())
print(*sorted({*sys.modules} - found))
"""


def imported(statement: str, *words: str) -> set[str]:
    """The modules that a statement imports in a process of its own, whose command line is `words`."""
    command = [sys.executable, "-c", PROGRAM, *words, statement]
    done = subprocess.run(command, cwd=ROOT, timeout=600, capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def heavy(modules: set[str], allowed: set[str]) -> set[str]:
    """Those that come neither with Python nor with the package, nor are allowed."""
    light = {*sys.stdlib_module_names, "jaguar", *allowed}
    return {name for name in modules if name.partition(".")[0] not in light} | modules & OF_RUNS


@pytest.mark.parametrize("statement", ["import jaguar", "import jaguar; dir(jaguar)", "import jaguar.optimizers.names"])
def test_the_package_is_imported_alone(statement: str) -> None:
    modules = imported(statement)
    assert "jaguar" in modules and not heavy(modules, set())


COMMAND = "from jaguar.cli.commands import main; sys.exit(main())"


@pytest.mark.parametrize("words", ["--help", "finetune --help", "eval --help", "info --help"])
def test_help_imports_nothing_heavy(words: str) -> None:
    modules = imported(COMMAND, *words.split())
    assert "rich_argparse" in modules and not heavy(modules, OF_HELP)


@pytest.mark.parametrize("words", ["", "no_such_command", "--no_such_flag", "finetune --model m", "eval --bogus 1"])
def test_an_error_of_one_line_imports_nothing_heavy(words: str) -> None:
    modules = imported(COMMAND, *words.split())
    assert "jaguar.cli.parser" in modules and not heavy(modules, OF_HELP)


@pytest.mark.parametrize(
    ("statement", "found"),
    [("from rich import table", "rich.table"), ("import numpy", "numpy"), ("import yaml", "yaml")],
)
def test_what_is_heavy_is_noticed(statement: str, found: str) -> None:
    assert found in heavy(imported(f"import jaguar; {statement}"), OF_HELP)


ALL = "finetune, eval, replay, journal, info"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", f"jaguar: error: a command is missing; there is: {ALL} (see jaguar --help)"),
        ("tune", f"jaguar: error: 'tune' is no command; there is: {ALL} (see jaguar --help)"),
        ("--modle m", f"jaguar: error: '--modle' is no command; there is: {ALL} (see jaguar --help)"),
        (
            "eval --modle m --model m",
            "jaguar eval: error: unrecognized arguments: --modle m; did you mean --model? (see jaguar eval --help)",
        ),
    ],
)
def test_a_wrong_command_or_flag_is_told_in_one_line(words: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "jaguar", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{said}\n")

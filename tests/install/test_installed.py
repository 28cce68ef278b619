"""The installed package: its public names, and every file that it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaguar

ROOT = Path(__file__).resolve().parents[2]
# fmt: off
PUBLIC = [
    "AccZOM", "DiZO", "FZOO", "ForwardGrad", "JaguarMuon", "JaguarSignSGD", "Journal", "LeZO", "Method", "Record",
    "Scorer", "ScoringTrainer", "Shard", "StepSize", "ZOAdaMM", "ZOAdaMU", "ZOMuon", "ZOSGD", "ZOSGDCons", "ZOSignSGD",
    "ZOTrainer", "ZOTrainingArguments", "ZerothOrder", "__version__", "directions", "estimators", "newton_schulz",
    "orthogonal", "param_groups", "replay", "rules",
]
# fmt: on


def test_public_names_are_these() -> None:
    assert jaguar.__all__ == PUBLIC


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip install .` makes it of a copy, without what builds leave in the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    left = shutil.ignore_patterns("__pycache__", "_cuda*", "*.egg-info")
    for name in ("jaguar", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=left)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target]
    command = [sys.executable, "-m", "pip", "install", "-q", *map(str, options), str(source)]
    done = subprocess.run(command, env=os.environ | {"JAGUAR_CUDA": "0"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return target


def test_every_file_is_installed(target: Path) -> None:
    """Sources, kernels, presets and the mark of a typed package."""
    wanted = {path.relative_to(ROOT) for path in (ROOT / "jaguar").rglob("*.py") if "triton_kernels" not in path.parts}
    wanted |= {Path("jaguar") / path.relative_to(ROOT) for path in (ROOT / "triton_kernels").rglob("*.py")}
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "jaguar").rglob("*.yaml")} | {Path("jaguar/py.typed")}
    assert len(wanted) > 150 and not [name for name in sorted(wanted) if not (target / name).is_file()]


def test_public_names_are_those_of_the_installed_package(target: Path) -> None:
    code = (
        "import json, jaguar; from jaguar.tasks.presets import presets; "
        "objects = [getattr(jaguar, name) for name in jaguar.__all__]; import jaguar.triton_kernels; "
        "print(json.dumps([jaguar.__file__, jaguar.__all__, len(presets())]))"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=target, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    where, names, count = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(target) and names == PUBLIC and count > 3

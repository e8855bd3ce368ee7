"""What each extra brings, and one sentence where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {missing!r} else real(name, *rest)
sys.path.insert(0, {root!r})
import {package}
"""


@pytest.mark.parametrize(
    ("package", "missing", "extra"),
    [
        ("unet_adapters", {"diffusers"}, "unet"),
        ("experiments", {"typer"}, "experiments"),
        ("experiments.cli", {"diffusers", "typer"}, "experiments"),
    ],
)
def test_a_missing_extra_is_named(package: str, missing: set[str], extra: str, tmp_path: Path) -> None:
    code = WITHOUT.format(missing=missing, root=str(ROOT), package=package)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert f"pip install 'linear-token-mixers[{extra}]'" in message
    assert all(name in message for name in missing)


def test_mixers_need_torch_and_einops_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", line).group(0) for line in project["dependencies"]}  # type: ignore[union-attr]
    assert names == {"torch", "einops"}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    unpinned = {"ray", "torch-fidelity", "flash-linear-attention", "imscore", "linear-token-mixers"}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            name = re.match(r"[\w.-]+", line).group(0).lower().replace("_", "-")  # type: ignore[union-attr]
            assert name in pinned | unpinned, f"{name} of the extra {extra!r} has no exact version in constraints.txt"

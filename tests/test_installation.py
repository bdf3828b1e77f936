"""Packages that do not fit each other are named, with what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"
"""What torchvision of PyPI says beside torch of the CPU index."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    told = tmp_path / "torchvision-0.20.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def perco(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pillow_perco.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_torchvision_of_another_build_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    photo = Path(__file__).parent.parent / "pillow_perco" / "demo.jpg"
    run = perco(environment, "encode", str(photo), str(tmp_path / "x.perco"))
    assert run.returncode == 1
    assert run.stderr.startswith("Error: torchvision 0.20.0 does not work with torch ")
    assert "(operator torchvision::nms does not exist)" in run.stderr and "pip uninstall torchvision" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "x.perco").exists()
    doctor = perco(environment, "doctor")
    assert doctor.returncode == 0 and "unfit: torchvision 0.20.0 does not work with torch" in doctor.stdout

"""Every conformance case: bytes written once still say, and decode to, the same."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perco_engine import bitstream, get_engine

FOLDER = Path(__file__).parent / "conformance"
_spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
assert _spec and _spec.loader
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(params=sorted(path.parent.name for path in FOLDER.glob("*/case.json")))
def case(request: pytest.FixtureRequest) -> Path:
    return FOLDER / request.param


def test_there_are_cases() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/case.json")} == set(make.CASES)


def test_header_and_hyper_latent(case: Path) -> None:
    data = (case / "input.perco").read_bytes()
    assert make.describe(bitstream.read_header(data)) == json.loads((case / "header.json").read_text())
    codes = get_engine().codes(data)
    stored = np.load(case / "indices.npz")
    assert len(codes.indices) == len(stored.files)
    for grid, name in zip(codes.indices, stored.files, strict=True):
        np.testing.assert_array_equal(grid, stored[name])
    assert bitstream.pack(codes, get_engine().rate_points, prior=get_engine().prior) == data


def test_picture(case: Path) -> None:
    decoded, reference = get_engine().decode((case / "input.perco").read_bytes()), Image.open(case / "reference.png")
    assert (decoded.size, decoded.mode) == (reference.size, reference.mode)
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(reference).astype(int)).mean()
    assert difference <= json.loads((case / "case.json").read_text())["max_mean_difference"]

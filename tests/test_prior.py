"""The prior of the hyper-latent, held against FORMAT.md's formulas in plain Python integers."""

from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from perco_engine.bitstream import entropy, pack, read_header, unpack, unpack_partial
from perco_engine.bitstream.container import _encode_by_prior
from perco_engine.bitstream.prior import POWERS, Prior, frequencies, most_grids
from perco_engine.codes import Codes, ModelReference
from perco_engine.errors import InvalidModel, InvalidStream, TruncatedFile
from perco_engine.rates import Grid, RatePoint, ladder

POINTS = ladder(Grid(32, 16), Grid(16, 24), Grid(16, 16), Grid(8, 17))
STATE, HIDDEN, EMBEDDED = 3, 5, 2

Tensors = dict[str, NDArray[np.generic]]


def tensors(seed: int = 0, size: int = 90) -> Tensors:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> NDArray[np.int8]:
        return rng.integers(-size, size + 1, shape).astype(np.int8)

    def bias(*shape: int) -> NDArray[np.int32]:
        return rng.integers(-3000, 3000, shape).astype(np.int32)

    made: Tensors = {}
    for k, grid in enumerate(POINTS[-1].grids):
        made |= {
            f"{k}.embedding": weight(grid.codebook_size, EMBEDDED),
            f"{k}.enter.weight": weight(STATE, STATE, 3, 3),
            f"{k}.enter.bias": bias(STATE),
            f"{k}.near.weight": weight(HIDDEN, EMBEDDED, 5, 5),
            f"{k}.near.bias": bias(4, HIDDEN),
            f"{k}.context.weight": weight(HIDDEN, STATE),
            f"{k}.middle.weight": weight(HIDDEN, HIDDEN),
            f"{k}.middle.bias": bias(HIDDEN),
            f"{k}.out.weight": weight(grid.codebook_size, HIDDEN),
            f"{k}.out.bias": bias(grid.codebook_size),
            f"{k}.state.weight": weight(STATE, STATE + EMBEDDED, 3, 3),
            f"{k}.state.bias": bias(STATE),
        }
    del made["0.enter.weight"], made["3.state.weight"], made["3.state.bias"]
    return made


def random_codes(width: int, height: int, rate_point: int = 3) -> Codes:
    rng = np.random.default_rng(width)
    point = POINTS[rate_point]
    return Codes(
        ModelReference(2), width, height, rate_point,
        tuple(
            rng.integers(0, grid.codebook_size, shape).astype(np.int32)
            for grid, shape in zip(point.grids, point.shapes(width, height), strict=True)
        ),
    )  # fmt: skip


Plane = list[list[list[int]]]


def convolve(weight: NDArray[np.generic], planes: Plane, row: int, column: int) -> list[int]:
    """One cell of a convolution, zeros around, by the definition."""
    w = weight.tolist()
    reach = len(w[0][0]) // 2
    rows, columns = len(planes[0]), len(planes[0][0])
    return [
        sum(
            kernel[y][x] * plane[row + y - reach][column + x - reach]
            for kernel, plane in zip(out, planes, strict=True)
            for y in range(2 * reach + 1)
            for x in range(2 * reach + 1)
            if 0 <= row + y - reach < rows and 0 <= column + x - reach < columns
        )
        for out in w
    ]


def activation(sums: list[int], bias: NDArray[np.generic]) -> list[int]:
    return [min(max((x + b + 64) // 128, 0), 127) for x, b in zip(sums, bias.tolist(), strict=True)]


def planes_of(cells: Callable[[int, int], list[int]], rows: int, columns: int) -> Plane:
    values = [[cells(r, c) for c in range(columns)] for r in range(rows)]
    return [[[value[k] for value in line] for line in values] for k in range(len(values[0][0]))]


def slow_stream(t: Tensors, codes: Codes) -> bytes:
    """The hyper-latent stream by FORMAT.md, in Python's integers."""
    symbols, cdfs = [], []
    state: Plane = []
    coarser = 0
    for k, grid in enumerate(POINTS[codes.rate_point].grids):
        indices = codes.indices[k].tolist()
        rows, columns = len(indices), len(indices[0])
        if k == 0:
            nothing = [0] * STATE
            u = planes_of(lambda r, c: activation(nothing, t["0.enter.bias"]), rows, columns)  # noqa: B023
        else:
            ratio = coarser // grid.pixels_per_index
            below = planes_of(lambda r, c: [plane[r // ratio][c // ratio] for plane in state], rows, columns)  # noqa: B023
            u = planes_of(
                lambda r, c: activation(convolve(t[f"{k}.enter.weight"], below, r, c), t[f"{k}.enter.bias"]),  # noqa: B023
                rows,
                columns,
            )
        coarser = grid.pixels_per_index
        embedding = t[f"{k}.embedding"].tolist()
        known: Plane = [[[0] * columns for _ in range(rows)] for _ in range(EMBEDDED)]
        for j, phase in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
            cells = [(r, c) for r in range(rows) for c in range(columns) if (r % 2, c % 2) == phase]
            for r, c in cells:
                near = convolve(t[f"{k}.near.weight"], known, r, c)
                here = [plane[r][c] for plane in u]
                context = [
                    sum(w * x for w, x in zip(line, here, strict=True)) for line in t[f"{k}.context.weight"].tolist()
                ]
                a = activation([x + y for x, y in zip(near, context, strict=True)], t[f"{k}.near.bias"][j])
                a = activation(
                    [sum(w * x for w, x in zip(line, a, strict=True)) for line in t[f"{k}.middle.weight"].tolist()],
                    t[f"{k}.middle.bias"],
                )
                logits = [
                    (sum(w * x for w, x in zip(line, a, strict=True)) + b) // 16
                    for line, b in zip(t[f"{k}.out.weight"].tolist(), t[f"{k}.out.bias"].tolist(), strict=True)
                ]
                largest = max(logits)
                weights = [floor(2.0 ** (16 - (largest - x) % 256 / 256)) >> (largest - x) // 256 for x in logits]
                n = grid.codebook_size
                cdfs.append([2 * i + sum(weights[:i]) * (65536 - 2 * n) // sum(weights) for i in range(n + 1)])
                symbols.append(indices[r][c])
            for r, c in cells:
                for plane, value in zip(known, embedding[indices[r][c]], strict=True):
                    plane[r][c] = value
        if f"{k}.state.weight" in t:
            both = u + known
            state = planes_of(
                lambda r, c: activation(convolve(t[f"{k}.state.weight"], both, r, c), t[f"{k}.state.bias"]),  # noqa: B023
                rows,
                columns,
            )
    encoder = entropy.Encoder()
    for symbol, cdf in zip(symbols, cdfs, strict=True):
        encoder.encode(np.array([symbol], dtype=np.int32), np.array(cdf, dtype=np.int32))
    return encoder.finish()


class Likely:
    """A prior's tensors, and codes that it expects, so that its stream is the shorter one."""

    def __init__(self, width: int, height: int) -> None:
        self.tensors = tensors()
        rng = np.random.default_rng(1)
        grids = Prior(self.tensors).walk(
            POINTS[3], width, height,
            lambda level, cells, cdf: np.array(
                [np.searchsorted(row, rng.integers(65536), side="right") - 1 for row in cdf], dtype=np.int32
            ),
        )  # fmt: skip
        self.codes = Codes(ModelReference(2), width, height, 3, tuple(grids))
        self.prior = Prior(self.tensors)


@pytest.mark.parametrize(("width", "height"), [(70, 50), (33, 8), (8, 90), (1, 1)])
def test_streams_are_those_of_the_specification(width: int, height: int) -> None:
    likely = Likely(width, height)
    data = pack(likely.codes, POINTS, prior=likely.prior)
    header = read_header(data)
    if width * height > 1000:
        assert header.by_prior
        assert data[4] == 0x1B
        assert len(data) < len(pack(likely.codes, POINTS))
        assert header.hyper_latent == slow_stream(likely.tensors, likely.codes)
    assert _encode_by_prior(likely.codes, POINTS[3], likely.prior) == slow_stream(likely.tensors, likely.codes)
    assert unpack(data, POINTS, prior=likely.prior) == likely.codes


def test_the_bytes_of_a_prior_stream() -> None:
    likely = Likely(40, 40)
    assert [grid.reshape(-1)[:4].tolist() for grid in likely.codes.indices] == [
        [7, 12, 14, 8], [0, 8, 2, 9], [12, 0, 2, 13], [13, 7, 9, 15],
    ]  # fmt: skip
    assert read_header(pack(likely.codes, POINTS, prior=likely.prior)).hyper_latent == bytes.fromhex(
        "73 0e 3a 46 82 f5 03 2c 17 8c e0 c3 df a2 86 72 6c ea 51 8c fa 6e 68 6c"
    )


def test_a_picture_that_surprises_the_prior_is_coded_without_it() -> None:
    codes = random_codes(300, 200)
    data = pack(codes, POINTS, prior=Prior(tensors()))
    assert data == pack(codes, POINTS)
    assert data[4] == 0x13
    assert unpack(data, POINTS, prior=Prior(tensors())) == codes


def test_parts_of_a_large_grid_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    likely = Likely(300, 170)
    whole = pack(likely.codes, POINTS, prior=likely.prior)
    monkeypatch.setattr("perco_engine.bitstream.prior.CELLS_AT_ONCE", 40)
    assert pack(likely.codes, POINTS, prior=likely.prior) == whole


def test_a_file_that_needs_a_prior_is_refused_without_one() -> None:
    likely = Likely(70, 50)
    with pytest.raises(InvalidStream, match="coded by a prior, and its model has none"):
        unpack(pack(likely.codes, POINTS, prior=likely.prior), POINTS)


def test_another_ladders_prior_is_refused() -> None:
    likely = Likely(70, 50)
    with pytest.raises(InvalidModel, match="not one for codebooks of"):
        pack(random_codes(70, 50, 0), (RatePoint(0.1, (Grid(32, 17),)),), prior=likely.prior)
    for sides in ((32, 12), (16, 32)):
        point = RatePoint(0.1, (Grid(sides[0], 16), Grid(sides[1], 24)))
        with pytest.raises(InvalidModel, match="each side divides the one before"):
            likely.prior.check(point)


def test_a_cut_file_gives_its_complete_grids() -> None:
    likely = Likely(140, 100)
    data = pack(likely.codes, POINTS, prior=likely.prior)
    seen = set()
    for length in range(11, len(data)):
        try:
            partial = unpack_partial(data[:length], POINTS, prior=likely.prior)
        except TruncatedFile:
            assert not seen
            continue
        seen.add(partial.rate_point)
        kept = likely.codes.indices[: partial.rate_point + 1]
        assert all(np.array_equal(a, b) for a, b in zip(partial.indices, kept, strict=True))
    assert seen == {0, 1, 2, 3}


def test_a_huge_picture_in_a_few_bytes_costs_nothing() -> None:
    point = POINTS[3]
    assert most_grids(point, 65535, 65535, 100) == 0
    fewest_bits = [-np.log2(1 - 2 * (grid.codebook_size - 1) / 65536) - 2**-12 for grid in point.grids]
    for size in (100, 1000, 5000):
        need = np.cumsum([bits * r * c for bits, (r, c) in zip(fewest_bits, point.shapes(size, size), strict=True)]) / 8
        for stream_bytes in (1, 10, 100, 1000):
            assert most_grids(point, size, size, stream_bytes) >= int((need <= stream_bytes).sum())


def test_powers_of_two_are_the_exact_floors() -> None:
    for j in (0, 1, 100, 255):
        assert Fraction(int(POWERS[j])) ** 256 <= Fraction(2) ** (16 * 256 - j) < Fraction(int(POWERS[j]) + 1) ** 256


def test_frequencies() -> None:
    """65536 - 8 is shared by 65536 : 32768 : 46340 : 0 parts of probability, and each index has 2 beside it."""
    cdf = frequencies(np.array([[0, -256, -128, -20 * 256]], dtype=np.int64))
    assert cdf.tolist() == [[0, 29691, 44538, 65534, 65536]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.near.bias": np.zeros((3, HIDDEN), np.int32)}, "1.near.bias of the prior must be"),
        ({"2.out.weight": np.full((16, HIDDEN), -128, np.int8)}, "2.out.weight of the prior must be"),
        ({"0.enter.bias": np.full(STATE, 2**21 + 1, np.int32)}, "0.enter.bias of the prior must be"),
        ({"0.middle.weight": np.zeros((HIDDEN, HIDDEN), np.float32)}, "0.middle.weight of the prior must be"),
        ({"0.extra": np.zeros(1, np.int8)}, "0.extra"),
        ({"0.context.weight": np.zeros((HIDDEN, 600), np.int8)}, "more products than come out exactly"),
        ({"2.embedding": np.zeros((15, EMBEDDED), np.int8)}, "a codebook of less than 16"),
        ({"2.embedding": np.zeros((32768, EMBEDDED), np.int8)}, "or more than 32767"),
    ],
)
def test_a_faulty_prior_is_refused(change: Tensors, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        Prior(tensors() | change)


def test_priors_are_read_from_a_model_folder(tmp_path: Path) -> None:
    assert Prior.load(tmp_path) is None
    (tmp_path / "prior").mkdir()
    save_file(tensors(), tmp_path / "prior" / "prior.safetensors")
    likely = Likely(70, 50)
    loaded = Prior.load(tmp_path)
    assert pack(likely.codes, POINTS, prior=loaded) == pack(likely.codes, POINTS, prior=likely.prior)
    (tmp_path / "prior" / "prior.safetensors").write_bytes(b"no weights")
    with pytest.raises(InvalidModel, match="cannot read"):
        Prior.load(tmp_path)

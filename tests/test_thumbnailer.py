"""perco-thumbnailer, as file managers run it: a cold process that has nothing but its two paths."""

import fcntl
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perco_engine import Metadata, bitstream, get_engine, rates, thumbnailer, weights
from perco_engine.bitstream.prior import Prior
from perco_engine.codes import Codes, ModelReference
from perco_engine.thumbnails import uri

PROGRAM = """
import sys
from perco_engine.thumbnailer import main
code = main()
assert not {'torch', 'diffusers', 'click', 'socket', 'ssl'} & set(sys.modules), 'too much is imported'
print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])
sys.exit(code)
"""
EMBEDDED_ID = weights.REGISTRY[0].registry_id
CONFORMANCE = Path(__file__).parent / "conformance"


def thumbnail(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs it without a home and without any variable."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"env": {}, **options})  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def coded(photo: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "a photo ü.perco"
    path.write_bytes(get_engine().encode(photo))
    return path


@pytest.mark.parametrize(
    ("size", "expected"), [("128", (128, 85)), ("64", (64, 43)), ("1024", (192, 128)), ("5000", (192, 128))]
)
def test_it_writes_a_png_whatever_the_name(coded: Path, tmp_path: Path, size: str, expected: tuple[int, int]) -> None:
    target = tmp_path / "thumbnail"
    run = thumbnail("-s", size, coded, target)
    assert (run.returncode, run.stderr) == (0, "")
    with Image.open(target, formats=["PNG"]) as picture:
        assert picture.size == expected and "Thumb::URI" not in picture.info
    assert sorted(path.name for path in tmp_path.iterdir()) == [coded.name, "thumbnail"]


def test_it_takes_uris(coded: Path, tmp_path: Path) -> None:
    assert thumbnail("-s", "64", uri(coded), tmp_path / "x.png").returncode == 0
    odd = tmp_path / os.fsdecode(b"\xff%.perco")
    coded.rename(odd)
    assert thumbnail("-s", "64", uri(odd), tmp_path / "y.png").returncode == 0


def test_what_it_writes_into_the_cache_has_its_keys(coded: Path, tmp_path: Path) -> None:
    target = tmp_path / (hashlib.md5(uri(coded).encode()).hexdigest() + ".png")
    assert thumbnail("-s", "64", coded, target).returncode == 0
    with Image.open(target) as picture:
        assert picture.info["Thumb::URI"] == uri(coded)
        assert picture.info["Thumb::MTime"] == str(int(coded.stat().st_mtime))
    assert target.stat().st_mode & 0o777 == 0o600


def test_wrong_command_lines(coded: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    assert thumbnail(coded).returncode == 2
    assert thumbnail("-s", "0", coded, target).returncode == 2
    assert thumbnail("-s", "huge", coded, target).returncode == 2
    assert thumbnail(tmp_path / "none.perco", target).returncode == 1
    assert thumbnail(tmp_path, target).returncode == 1
    data = coded.read_bytes()
    assert "itself" in thumbnail(coded, coded).stderr
    assert coded.read_bytes() == data and not target.exists()


def test_where_nothing_can_be_written(coded: Path, tmp_path: Path) -> None:
    run = thumbnail(coded, tmp_path / "no" / "x.png")
    assert run.returncode == 1 and run.stderr.startswith("perco-thumbnailer: ") and "Traceback" not in run.stderr


def test_what_it_says_is_a_line_of_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def render(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(thumbnailer, "limit", lambda: None)
    name = "nope\n\x1b[31mRED.perco"
    assert thumbnailer.main([name, "x.png"]) == 1
    monkeypatch.setattr(thumbnailer, "read", render)
    assert thumbnailer.main([name, "x.png"]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(r"perco-thumbnailer: nope\n\x1b[31mRED.perco ")


def test_damaged_exif_is_nothing_to_speak_of(photo: Image.Image, tmp_path: Path) -> None:
    source = tmp_path / "x.perco"
    source.write_bytes(get_engine().encode(photo, metadata=Metadata(exif=b"II*\0\x08\0\0\0\xff\xff"), effort=0))
    run = thumbnail("-s", "64", source, tmp_path / "x.png")
    assert (run.returncode, run.stderr) == (0, "")


def packed(width: int, height: int, level: int, fill: Callable[[tuple[int, int], int], np.ndarray]) -> bytes:
    grids = rates.EMBEDDED[level].grids
    indices = tuple(fill(grid.shape(width, height), grid.codebook_size).astype(np.int32) for grid in grids)
    return bitstream.pack(Codes(ModelReference(EMBEDDED_ID), width, height, level, indices), rates.EMBEDDED)


def test_twelve_megapixels_as_they_are_saved(tmp_path: Path) -> None:
    """With the prior, which takes the more memory the more cells it looks at at once."""
    model = weights.find("embedded")
    shapes = [grid.shape(4096, 2928) for grid in rates.EMBEDDED[3].grids]
    codes = Codes(ModelReference(EMBEDDED_ID), 4096, 2928, 3, tuple(np.zeros(shape, np.int32) for shape in shapes))
    source, target = tmp_path / "x.perco", tmp_path / "x.png"
    source.write_bytes(bitstream.pack(codes, rates.EMBEDDED, prior=Prior.load(model.folder)))
    run = thumbnail("-s", "256", source, target)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200 * 1024
    with Image.open(target) as picture:
        assert picture.size == (256, 183)


def hostile() -> Iterator[tuple[str, bytes, bool]]:
    """Name, bytes, and whether a thumbnail can be made of them."""
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, int], size: int) -> np.ndarray:
        return rng.integers(0, size, shape)

    whole = packed(320, 200, 4, random)
    yield "empty", b"", False
    yield "another format", b"\x89PNG\r\n\x1a\n" + bytes(100), False
    yield "magic alone", whole[:4], False
    yield "cut", whole[:-40], False
    yield "a bit turned", bytes([*whole[:30], whole[30] ^ 1, *whole[31:]]), False
    yield "zeros behind", whole + bytes(1000), False
    header = bytearray(whole[:10])
    header[6:10] = b"\xff\xfe\xff\xfe"
    body = bytes(header) + whole[10:-2]
    yield "65535 pixels a side", body + bitstream.header.checksum(body), False  # type: ignore[attr-defined]
    yield "a line", packed(65535, 1, 4, random), True
    yield "a column", packed(1, 65535, 4, random), True
    yield "one pixel", packed(1, 1, 4, random), True
    yield "8 megapixels, every grid", packed(4096, 2048, 4, random), True
    yield "170 megapixels", packed(13000, 13000, 1, random), True
    bomb = Codes(
        ModelReference(EMBEDDED_ID), 64, 64, 0, (np.zeros((1, 1), np.int32),), caption="x" * 4000,
        metadata=bitstream.header.Metadata(bytes(1 << 24), bytes(1 << 24), bytes(1 << 24)),  # type: ignore[attr-defined]
    )  # fmt: skip
    yield "metadata that expand", bitstream.pack(bomb, rates.EMBEDDED), True
    yield "40 MB", whole + bytes(40 << 20), False


@pytest.mark.parametrize(("name", "data", "good"), [pytest.param(*case, id=case[0]) for case in hostile()])
def test_hostile_files(tmp_path: Path, name: str, data: bytes, good: bool) -> None:
    """Whatever a file says: within 5 seconds of work and 300 MB, with no trace but the thumbnail."""
    source, target = tmp_path / "x.perco", tmp_path / "x.png"
    source.write_bytes(data)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = thumbnail("-s", "1024", source, target, env={"TMPDIR": str(temporary)})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (run.returncode == 0) is good is target.exists(), run.stderr
    assert "Traceback" not in run.stderr and bool(run.stderr) is not good
    assert used.ru_utime + used.ru_stime - seconds.ru_utime - seconds.ru_stime < 5
    assert int(run.stdout) < 300 * 1024  # kB, and of the process itself
    assert not list(temporary.iterdir()) and {path.name for path in tmp_path.iterdir()} <= {
        "x.perco", "x.png", "temporary",
    }  # fmt: skip
    if good:
        with Image.open(target) as picture:
            assert max(picture.size) <= 1024


def test_the_conformance_files(tmp_path: Path) -> None:
    for case in sorted(CONFORMANCE.glob("*/input.perco")):
        target = tmp_path / f"{case.parent.name}.png"
        assert thumbnail("-s", "256", case, target).returncode == 0, case
        with Image.open(target) as ours, Image.open(case.parent / "reference.png") as reference:
            wanted = reference.convert(ours.mode)
            wanted.thumbnail((256, 256))
            assert ours.size == wanted.size
            assert np.abs(np.asarray(ours, np.float32) - np.asarray(wanted, np.float32)).mean() < 12


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.perco")
    assert thumbnail(tmp_path / "x.perco", tmp_path / "x.png", timeout=20).returncode == 1


@pytest.mark.parametrize("blocked", ["input", "output"])
def test_what_blocks_is_not_waited_for_for_ever(coded: Path, tmp_path: Path, blocked: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    # A file whose bytes do not come, as on a network that is gone, is a pipe that is taken for a file.
    program = "import pathlib, sys; from perco_engine import thumbnailer; thumbnailer.MOST_SECONDS_WAITING = 0.3;"
    program += "pathlib.Path.is_file = lambda path: True; sys.exit(thumbnailer.main())"
    paths = (tmp_path / "pipe", tmp_path / "x.png") if blocked == "input" else (coded, tmp_path / "pipe")
    command = [sys.executable, "-c", program, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1 and f"{tmp_path / 'pipe'} cannot be" in run.stderr and "0.3 seconds" in run.stderr
    assert not (tmp_path / "x.png").exists()


def test_a_file_is_made_once_at_a_time(coded: Path, tmp_path: Path) -> None:
    """Two at once, as Thunar asks for them, would make tumbler lose both; one that never ends is not waited for."""
    program = "import sys; from perco_engine import thumbnailer; thumbnailer.MOST_SECONDS_WAITING = float(sys.argv[3]);"
    program += "sys.exit(thumbnailer.main(sys.argv[1:3]))"
    paths = [coded, tmp_path / "x.png"]
    with coded.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-c", program, *paths, "0.3"], check=True)
        paths[1].unlink()
        waiting = subprocess.Popen([sys.executable, "-c", program, *paths, "60"])
        time.sleep(1.5)
        assert waiting.poll() is None and not paths[1].exists()
    assert waiting.wait(60) == 0 and paths[1].exists()


def test_full_quality_is_the_engine_s(coded: Path, tmp_path: Path, photo: Image.Image) -> None:
    command = [sys.executable, "-m", "perco_engine.thumbnailer", "--quality", "full", "-s", "96"]
    subprocess.run([*command, coded, tmp_path / "x.png"], check=True)
    expected = get_engine().decode(coded.read_bytes(), max_size_px=96)
    with Image.open(tmp_path / "x.png") as picture:
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_full_quality_without_torch(coded: Path, tmp_path: Path) -> None:
    """As in the installation for all users."""
    code = "import sys; sys.modules['torch'] = None; from perco_engine.thumbnailer import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--quality", "full", coded, tmp_path / "x.png"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "--quality full needs torch" in run.stderr and "Traceback" not in run.stderr


def test_the_limits_are_kept_where_there_are_stricter_ones(coded: Path, tmp_path: Path) -> None:
    def stricter() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (200 << 20, 200 << 20))

    assert thumbnail(coded, tmp_path / "x.png", preexec_fn=stricter).returncode == 0

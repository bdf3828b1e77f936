"""What the documents say is what the code does.  Needs the checkout, not only the package."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import perco_engine
from perco_engine import get_engine
from perco_engine.bitstream import header
from perco_engine.bitstream.chunks import ChunkKind
from pillow_perco.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FORMAT = (Path(perco_engine.__file__).parent / "bitstream" / "FORMAT.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("perco ")]


def test_the_two_commands_are_one_line_each() -> None:
    lines = [block.strip().splitlines() for block in blocks("sh") if "constraints.txt" in block]
    assert [len(block) for block in lines] == [1, 1]
    assert lines[0][0].endswith(".venv/bin/perco demo") and lines[1][0].endswith(".venv/bin/pytest")


def test_the_constraints_are_exact_and_of_no_one_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_the_commands_of_the_readme_run(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):  # for `perco desktop`
        monkeypatch.setenv(name, str(tmp_path / name))
    photo.save("photo.jpg")
    assert len(COMMANDS) >= 6
    for line in COMMANDS:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments == ["bench"]:
            arguments += ["--times", "1", "--photo", "photo.jpg"]
        result = CliRunner().invoke(main, arguments)
        faults_are_told = arguments == ["desktop", "status"]
        assert isinstance(result.exception, SystemExit | None), (line, result.output)
        assert result.exit_code == 0 or faults_are_told, (line, result.output)
        if arguments[0] == "bench":
            assert re.search(r"^Image\.open \(ms\) +[0-9.]+$", result.output, re.MULTILINE)
    assert Path("out.png").exists() and Path("perco-demo.png").exists()


def test_the_first_program_of_the_readme_runs(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "show", lambda image: image.load())
    photo.save("photo.jpg")
    exec(blocks("python")[0], {})


def test_the_table_of_sizes() -> None:
    """At most: 12 bytes beside indices of 8 or 9 bits each, and the coder's two bits."""
    bits_of_index = (8, 8, 9, 9, 8, 8)
    for level, point in enumerate(get_engine().rate_points):
        most = []
        for size in ((768, 512), (512, 512)):
            cells = [rows * columns for rows, columns in point.shapes(*size)]
            bits = sum(count * bits for count, bits in zip(cells, bits_of_index[: level + 1], strict=True))
            most.append(12 + -(-(bits + 2) // 8))
        sizes = " | ".join(f"{size:,}" for size in most)
        assert re.search(rf"^\| {point.bpp} \|.*\| {sizes} \|$", README, re.MULTILINE)


def test_the_constants_of_the_format() -> None:
    assert f"magic `{header.MAGIC.hex(' ').upper()}`" in FORMAT
    assert f"version, {header.VERSION};" in FORMAT
    assert f"id {header.RESERVED_MODEL} is" in FORMAT.replace("\n", " ")
    assert f"Ids {header.FIRST_FAMILY} to {header.RESERVED_MODEL - 1} each name a *family*" in FORMAT
    assert f"The first {header.FAMILY_FINGERPRINT_BYTES} bytes of the checkpoint's fingerprint follow" in FORMAT
    for kind in ChunkKind:
        assert re.search(rf"^\| {kind.value} \(", FORMAT, re.MULTILINE)
    assert header.checksum(b"123456789") == b"\x29\xb1"


def test_nothing_links_nowhere() -> None:
    for document in (*ROOT.glob("*.md"), ROOT / "integrations" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document.name, link)

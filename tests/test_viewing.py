"""perco view: the viewer gets a private PNG; the terminal gets what independent readers of its protocols accept."""

import base64
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import pillow_perco
from perco_engine import service, terminal, viewing
from pillow_perco import cli_view
from pillow_perco.cli import main


@pytest.fixture
def file(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse() -> Path:
        raise PermissionError("no process of its own for a test")

    monkeypatch.setattr(service, "runtime_folder", refuse)
    assert service.status() is None
    path = tmp_path / "a b#ü.perco"
    pillow_perco.save(photo, path, bpp=0.002)
    return path


def fake_opener(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = folder / "bin" / "xdg-open"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {folder}/opened\necho "no viewer" >&2\nexit {code}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return folder / "opened"


def test_the_viewer_gets_a_private_png_and_the_second_time_the_same(
    file: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = fake_opener(tmp_path, 0, monkeypatch)
    assert CliRunner().invoke(main, ["view", str(file)]).exit_code == 0
    place = Path(opened.read_text())
    assert place.name == "a b#ü.png" and place.is_relative_to(tmp_path / "cache")
    assert (stat.S_IMODE(place.stat().st_mode), stat.S_IMODE(place.parent.stat().st_mode)) == (0o600, 0o700)
    with Image.open(place) as picture, Image.open(file) as expected:
        assert picture.tobytes() == expected.convert("RGB").tobytes()
    monkeypatch.setattr(viewing, "decode", None)
    assert CliRunner().invoke(main, ["view", str(file)]).exit_code == 0
    assert Path(opened.read_text()) == place


def test_a_viewer_that_does_not_open_is_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_opener(tmp_path, 3, monkeypatch)
    result = CliRunner().invoke(main, ["view", str(file)])
    assert result.exit_code == 1 and "no viewer" in result.output and "--terminal" in result.output
    monkeypatch.setenv("PATH", "/nowhere")
    assert "xdg-utils" in CliRunner().invoke(main, ["view", str(file)]).output


def test_pictures_shown_long_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "KEPT_BYTES", 250)
    for k in range(4):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "x.png").write_bytes(bytes(100))
        os.utime(tmp_path / str(k), (k, k))
    viewing._make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_without_a_terminal_half_blocks(file: Path) -> None:
    result = CliRunner().invoke(main, ["view", str(file), "--terminal", "--width", "12"], color=True)
    lines = result.output.splitlines()
    assert result.exit_code == 0 and [line.count("▀") for line in lines] == [12] * 4


def test_where_a_width_is_given_rows_do_not_bound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "24")
    result = CliRunner().invoke(main, ["view", str(file), "--width", "90"], color=True)
    assert result.exit_code == 0 and [line.count("▀") for line in result.output.splitlines()] == [90] * 30


def test_standard_streams_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout"):
            patch.setattr(sys, name, None)
        assert terminal.detect() == "blocks" and terminal.cell_size_px() == (8, 16)


def test_half_blocks_in_letters() -> None:
    picture = Image.new("RGB", (1, 3))
    picture.putdata([(255, 0, 0), (0, 128, 255), (1, 2, 3)])
    assert terminal.blocks(picture) == (
        "\x1b[38;2;255;0;0;48;2;0;128;255m▀\x1b[0m\n\x1b[38;2;1;2;3;48;2;0;0;0m▀\x1b[0m\n"
    )
    assert terminal.blocks(picture, true_colour=False).startswith("\x1b[38;5;196;48;5;39m▀")


def test_sixel_in_letters() -> None:
    picture = Image.new("RGB", (5, 7), "red")
    assert terminal.sixel(picture) == '\x1bP0;1q"1;1;5;7#0;2;100;0;0#0!5~-#0!5@-\x1b\\'


def test_sixel_mixes_colours_that_its_palette_lacks() -> None:
    """Rows of one colour each, more than 256 of them: without dithering each stays of one colour."""
    ramp = np.linspace(0, 255, 600)
    rows = np.stack([ramp, ramp / 2, 255 - ramp / 3], 1).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(rows[:, None], (600, 64, 3)).copy())
    lines = re.findall(r"#\d+([^#$;]+)(?=[$-])", terminal.sixel(picture))
    assert sum(re.fullmatch(r"!64.", line) is None for line in lines) > len(lines) / 2


def test_sixel_read_by_another_program(photo: Image.Image, tmp_path: Path) -> None:
    formats = ""
    if shutil.which("convert"):
        formats = subprocess.run(["convert", "-list", "format"], capture_output=True, text=True, check=False).stdout
    if not re.search(r"^\s*SIXEL\*? .*\br", formats, re.MULTILINE):
        pytest.skip("no ImageMagick that reads Sixel")
    path = tmp_path / "x.sixel"
    path.write_text(terminal.sixel(photo))
    subprocess.run(["convert", f"sixel:{path}", str(tmp_path / "x.png")], check=True, capture_output=True)
    with Image.open(tmp_path / "x.png") as read:
        back = read.convert("RGB")
    crop = np.asarray(back.crop((0, 0, *photo.size)), float)
    assert back.width == photo.width and np.abs(crop - np.asarray(photo, float)).mean() < 8


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_pngs_in_letters(protocol: terminal.Protocol, photo: Image.Image) -> None:
    text = terminal.render(photo, protocol, 200, 100)
    if protocol == "kitty":
        pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
        assert [keys for keys, _ in pieces] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(pieces) - 2), "m=0"]
        assert all(len(piece) == 4096 for _, piece in pieces[:-1]) and len(pieces) > 2
        data = base64.b64decode("".join(piece for _, piece in pieces))
    else:
        found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=192px;height=128px:([^\a]*)\a\n", text)
        assert found
        data = base64.b64decode(found.group(2))
        assert len(data) == int(found.group(1))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.tobytes() == photo.tobytes()


def test_nothing_is_larger_than_the_terminal(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "cell_size_px", lambda: (8, 16))
    text = terminal.render(photo.convert("RGBA"), "sixel", 10, 5)
    assert '"1;1;80;53' in text
    assert len(terminal.render(Image.new("LA", (1, 500)), "blocks", 10, 5).splitlines()) == 5


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "x"}, None),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], expected: str | None) -> None:
    assert terminal.by_environment(environment) == expected


def test_what_the_terminal_answers() -> None:
    assert terminal.by_answer(b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c") == "kitty"
    assert terminal.by_answer(b"\x1b[?62;4;22c") == "sixel"
    assert terminal.by_answer(b"\x1b[?64;22c") == terminal.by_answer(b"") == "blocks"
    assert terminal.by_answer(b"\x1b[?4c") == "blocks"


def test_the_viewer_is_not_waited_for(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gio open does: it ends, and what it has started has its pipes."""
    fake_opener(tmp_path, 0, monkeypatch)
    script = tmp_path / "bin" / "xdg-open"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/viewer\n")
    viewing.open_in_viewer(tmp_path / "x.png")
    viewer = int((tmp_path / "viewer").read_text())
    os.kill(viewer, signal.SIGTERM)  # which raises where it is gone


def test_a_double_click_that_fails_is_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(cli_view, "notify", shown.append)
    file.write_bytes(file.read_bytes()[:-3])
    assert CliRunner().invoke(main, ["view", str(file)]).exit_code == 1
    assert len(shown) == 1 and shown[0].startswith("a b#ü.perco: ")
    assert CliRunner().invoke(main, ["view", str(file), "--terminal"]).exit_code == 1 and len(shown) == 1


def test_without_a_cache_the_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(service, "runtime_folder", lambda: tmp_path / "run")
    assert viewing.folder() == viewing.folder() == tmp_path / "run" / "view"

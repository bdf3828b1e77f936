"""Installing the desktop points, and taking them out: every other file stays as it was, byte for byte."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perco_engine import get_engine
from perco_engine.bitstream.header import MAGIC
from pillow_perco.cli import main
from pillow_perco.desktop import check, install, points, system, thunar

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the desktop is that of freedesktop.org")

needs_databases = pytest.mark.skipif(
    not all(map(shutil.which, (install.MIME_DATABASE, install.DESKTOP_DATABASE))),
    reason="no shared-mime-info, or no desktop-file-utils",
)

OTHERS = """<?xml version="1.0" encoding="UTF-8"?>
<!-- mine -->
<actions>
<action>
\t<icon>x</icon>
\t<name>Grüße &amp; more</name>
\t<unique-id>1234-1</unique-id>
\t<command>true %f</command>
\t<patterns>*</patterns>
\t<directories/>
</action>

</actions>

"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder of the user, on a machine without a system-wide installation."""
    folder = tmp_path / "home of ü"
    folder.mkdir()
    monkeypatch.setattr(points, "SYSTEM_PREFIX", tmp_path / "usr/local")
    monkeypatch.setenv("HOME", str(folder))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "DESTDIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def perco(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["desktop", *map(str, arguments)])
    assert result.exit_code in (0, 1) and (result.exception is None or isinstance(result.exception, SystemExit))
    return result


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below, with permissions and contents."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_an_empty_home_is_empty_again(home: Path) -> None:
    assert perco("install").exit_code == 0
    once = snapshot(home)
    assert perco("install").exit_code == 0
    assert snapshot(home) == once
    assert perco("uninstall").exit_code == 0
    assert snapshot(home) == {}
    assert perco("uninstall").output == "nothing is installed\n"


@needs_databases
def test_what_the_user_has_stays(home: Path) -> None:
    for name, text in (
        (".config/Thunar/uca.xml", OTHERS),
        (".local/share/nemo/actions/mine.nemo_action", "[Nemo Action]\n"),
        (".local/share/mime/packages/mine.xml", (points.ASSETS / "mime/pillow-perco.xml").read_text()),
        (".local/share/thumbnailers/pillow-perco.thumbnailer", "of some other time\n"),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / ".config/Thunar/uca.xml").chmod(0o600)
    subprocess.run(["update-mime-database", home / ".local/share/mime"], check=False)
    before = snapshot(home)
    perco("install")
    perco("install")
    during = snapshot(home)
    assert len(during) > len(before) + 10
    assert during[".config/Thunar/uca.xml"][0] & 0o777 == 0o600
    assert "TryExec" in (home / ".local/share/thumbnailers/pillow-perco.thumbnailer").read_text()
    perco("uninstall")
    assert snapshot(home) == before


@needs_databases
def test_folders_and_links_of_the_user_s_stay(home: Path) -> None:
    share = home / ".local/share"
    for name in ("dotfiles", ".local/share/nautilus-python/extensions/__pycache__", ".local/share/mime/packages"):
        (home / name).mkdir(parents=True)
    (share / "applications").symlink_to(home / "dotfiles")
    (share / "mime/packages/mine.xml").write_text(
        (points.ASSETS / "mime/pillow-perco.xml").read_text().replace("image/x-perco", "text/x-mine")
    )
    subprocess.run(["update-mime-database", share / "mime"], check=True)
    before = snapshot(home)
    perco("install")
    assert (share / "mime/image/x-perco.xml").exists() and (home / "dotfiles/mimeinfo.cache").exists()
    assert perco("uninstall").exit_code == 0
    assert snapshot(home) == before and (share / "applications").is_symlink()


def test_an_empty_folder_of_the_user_s_stays(home: Path) -> None:
    (home / ".local/share/applications").mkdir(parents=True)
    before = snapshot(home)
    perco("install")
    perco("uninstall")
    assert snapshot(home) == before


def test_an_uninstallation_that_broke_off_can_be_run_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object) -> None:
        raise OSError("no more")

    perco("install")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", break_off)
        assert perco("uninstall").exit_code == 1
    assert perco("uninstall").exit_code == 0
    assert snapshot(home) == {}


def test_what_was_changed_since_is_told_and_left(home: Path) -> None:
    perco("install")
    action = home / ".local/share/nemo/actions/pillow-perco-tiny.nemo_action"
    action.write_text("[Nemo Action]\n")
    menu = home / ".config/Thunar/uca.xml"
    menu.write_text(menu.read_text().replace("<actions>", "<actions>\n<action><unique-id>mine</unique-id></action>", 1))
    output = perco("uninstall").output
    assert f"{action} was changed since, and stays" in output
    assert action.read_text() == "[Nemo Action]\n"
    assert "<unique-id>mine" in menu.read_text() and "pillow-perco" not in menu.read_text()


def test_thunar_s_actions() -> None:
    ours = "<action>\n\t<name>A</name>\n\t<unique-id>pillow-perco-a</unique-id>\n</action>\n"
    merged = thunar.with_actions(OTHERS, ours)
    names = [action.findtext("unique-id") for action in ET.fromstring(merged.encode())]
    assert names == ["1234-1", "pillow-perco-a"]
    assert thunar.with_actions(merged, ours) == merged
    assert thunar.without_actions(merged) == OTHERS
    rewritten = merged.replace("\n<action>", "<action>").replace("\t", "  ")  # by Thunar itself
    assert "pillow-perco" not in thunar.without_actions(rewritten) and "1234-1" in thunar.without_actions(rewritten)
    assert len(ET.fromstring(thunar.with_actions('<actions x="1"><action/></actions>', ours))) == 2
    assert len(ET.fromstring(thunar.with_actions("<actions/>", ours))) == 1


@pytest.mark.parametrize("text", ["", "<actions>", "no XML", "<other/>"])
def test_a_file_that_cannot_be_merged_into_is_left(home: Path, text: str) -> None:
    menu = home / ".config/Thunar/uca.xml"
    menu.parent.mkdir(parents=True)
    menu.write_text(text)
    result = perco("install")
    if text:
        assert result.exit_code == 1 and "uca.xml cannot be merged into" in result.output
        assert menu.read_text() == text
    else:  # an empty file is no loss
        assert result.exit_code == 0, result.output


def test_the_files_are_what_they_should_be(home: Path) -> None:
    perco("install")
    share = home / ".local/share"
    thumbnailer = (share / "thumbnailers/pillow-perco.thumbnailer").read_text()
    assert " -s %s %i %o\nMimeType=image/x-perco;\n" in thumbnailer
    for path in share.rglob("*pillow?perco*"):
        if path.is_file():
            assert "@" not in path.read_text(), path
    for name in ("nautilus", "caja"):
        text = (share / f"{name}-python/extensions/pillow_perco_menu.py").read_text()
        compile(text, "menu", "exec")
        assert f"import GObject, {name.capitalize()}\n" in text
    assert (share / "kio/servicemenus/pillow-perco-encode.desktop").stat().st_mode & 0o111
    magic = ET.parse(share / "mime/packages/pillow-perco.xml").find(".//{*}match")
    assert magic is not None and magic.attrib["value"] == r"\x93PCo" and MAGIC == b"\x93PCo"


def test_the_menus_offer_rates_of_the_model() -> None:
    assert {float(bpp) for _, bpp in points.RATES} <= {point.bpp for point in get_engine().rate_points}


def test_stale_failures_are_cleared(home: Path) -> None:
    folder = home / ".cache/thumbnails/fail/gnome-thumbnail-factory"
    folder.mkdir(parents=True)
    for name, kind in (("a", "perco"), ("b", "jpg")):
        info = PngInfo()
        info.add_text("Thumb::URI", f"file:///x.{kind}")
        Image.new("RGB", (1, 1)).save(folder / f"{name}.png", pnginfo=info)
    perco("install")
    assert [path.name for path in folder.iterdir()] == ["b.png"]


@pytest.fixture(scope="module")
def destination(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that stands for /, with a system-wide installation in it."""
    root = tmp_path_factory.mktemp("root")
    menu = root / "etc/xdg/Thunar/uca.xml"
    menu.parent.mkdir(parents=True)
    menu.write_text(OTHERS)
    result = perco("install", "--system", "--destdir", root)
    assert result.exit_code == 0, result.output
    yield root


def test_a_system_wide_installation(destination: Path, photo: Image.Image, tmp_path: Path) -> None:
    app = destination / "usr/local/lib/pillow-perco/app"
    wrapper = (destination / "usr/local/bin/perco-thumbnailer").read_text()
    assert wrapper.startswith("#!/usr/bin/python3") and str(destination) not in wrapper
    assert not (app / "torch").exists() and not list(app.glob("perco_engine/embedded/unet"))
    assert sum(path.stat().st_size for path in app.rglob("*") if path.is_file()) < 120e6
    assert b"pillow-perco-png" in (destination / "etc/xdg/Thunar/uca.xml").read_bytes()
    path = tmp_path / "x.perco"
    path.write_bytes(get_engine().encode(photo))
    program = wrapper.replace("/usr/local/lib", f"{destination}/usr/local/lib").partition("\n")
    interpreter = program[0].removeprefix("#!").split()
    subprocess.run([*interpreter, "-c", program[2], "-s", "64", path, tmp_path / "x.png"], env={}, check=True)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (64, 43)


def test_it_is_taken_out_again(destination: Path) -> None:
    assert perco("install", "--system", "--destdir", destination).exit_code == 0
    assert perco("uninstall", "--system", "--destdir", destination).exit_code == 0
    left = [path for path in destination.rglob("*") if path.is_file()]
    assert left == [destination / "etc/xdg/Thunar/uca.xml"] and left[0].read_text() == OTHERS
    assert not (destination / "usr").exists()


def test_where_no_package_index_is_another_python_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pillow_perco.desktop import system

    other = system.Interpreter(Path("/usr/bin/python3"), (3, 99), "cpython-399-x86_64-linux-gnu")
    monkeypatch.setattr(system, "interpreter", lambda: other)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = perco("install", "--system", "--destdir", tmp_path / "root")
    assert result.exit_code == 1 and "cannot be had" in result.output
    assert not (tmp_path / "root/usr/local/bin").exists()


@needs_databases
def test_the_findings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed: perco desktop install" in perco("status").output
    perco("install")
    monkeypatch.setenv("XDG_CURRENT_DESKTOP", "ubuntu:GNOME")
    result = perco("status")
    assert "installed, 13 files" in result.output and "desktop install --system" in result.output
    helper_in_usr = "in GNOME's sandbox too" in result.output
    assert result.exit_code == (0 if helper_in_usr else 1)
    monkeypatch.setenv("XDG_CURRENT_DESKTOP", "XFCE")
    assert perco("status").exit_code == 0
    (home / ".local/share/nemo/actions/pillow-perco-tiny.nemo_action").unlink()
    result = perco("status")
    assert "changed or removed (pillow-perco-tiny.nemo_action, ...): perco desktop install" in result.output
    assert result.exit_code == 1
    (home / ".config/Thunar/uca.xml").write_text(OTHERS)
    assert "our entries are not in" in perco("status").output
    manifest = home / ".local/share/pillow-perco/desktop.json"
    manifest.write_text(json.dumps({"nonsense": 1}))
    assert "damaged" in perco("status").output
    assert "Pillow plugin            registered" in CliRunner().invoke(main, ["doctor"]).output


@needs_databases
def test_what_no_double_click_would_open_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perco("install")
    assert "double-click             knows image/x-perco\n" in perco("status").output
    cache = home / ".local/share/applications/mimeinfo.cache"
    cache.write_text("[MIME Cache]\nimage/x-perco=other.desktop;\n")
    result = perco("status")
    told = "double-click             nothing of ours is in applications/mimeinfo.cache: perco desktop install\n"
    assert told in result.output and result.exit_code == 1
    cache.unlink()
    monkeypatch.setenv("PATH", "/none")
    assert "update-desktop-database is missing: install desktop-file-utils, then: perco" in perco("status").output


def test_the_command_for_all_users_is_one_that_sudo_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, said in (("/home/a b/bin/perco", "'/home/a b/bin/perco'"), ("/usr/local/bin/perco", "perco")):
        monkeypatch.setattr(points, "script", lambda name, own=own: Path(own))
        assert check.install_system() == f"sudo {said} desktop install --system"


def test_what_the_sandbox_sees(tmp_path: Path) -> None:
    script = tmp_path / "helper"
    script.write_text("#!/usr/bin/python3\n")
    assert not check.seen_by_sandbox(script)
    assert check.seen_by_sandbox(Path("/usr/bin/env"))


def test_the_menu_command_converts_beside(home: Path, photo: Image.Image, tmp_path: Path) -> None:
    for name in ("a b/1.png", "ü/-2.png"):
        (tmp_path / name).parent.mkdir()
        photo.resize((64, 48)).save(tmp_path / name)
    result = perco("convert", "--bpp", "0.002", "--", tmp_path / "a b/1.png", tmp_path / "ü/-2.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a b/1.perco").stat().st_size < 30 and (tmp_path / "ü/-2.perco").exists()
    (tmp_path / "a b/1.png").write_bytes(b"no picture")
    perco("convert", "--to", "png", "--", tmp_path / "a b/1.perco")
    assert (tmp_path / "a b/1.png").read_bytes() == b"no picture"  # what is there is never replaced
    result = perco("convert", "--to", "webp", "--", tmp_path / "a b/1.png")
    assert result.exit_code == 1 and "1.png" in result.output


def installed_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str = "/bin/true") -> None:
    """Without the thumbnailer's packages, and with nothing outside of a test's folder."""
    monkeypatch.setattr(system, "install", lambda *_: iter(()))
    place = replace(points.system_place(), config=folder / "etc/xdg", perco=(program,))
    list(install.install(place))


def test_what_this_user_cannot_run_is_not_left_to_the_system(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_for_all(home.parent, monkeypatch, "/home/somebody/.venv/bin/perco")
    perco("install")
    share = home / ".local/share"
    assert (share / "applications/pillow-perco.desktop").exists() and list((share / "nemo").rglob("*.nemo_action"))
    assert not list((share / "mime").glob("packages/pillow-perco.xml"))


def test_what_the_system_has_is_no_fault_of_the_user_s(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that is documented for Caja: for all, and then for oneself."""
    installed_for_all(home.parent, monkeypatch)
    perco("install")
    ours = (home / ".local/share").rglob("*pillow*")
    assert not any(path.suffix == ".thumbnailer" for path in ours)
    lines = perco("status").output.splitlines()
    for place in ("this user", "system"):
        assert any(line.startswith(f"desktop, {place}") and "installed, " in line for line in lines), lines
    assert not any(line.startswith("thumbnailer, this user") for line in lines)
    assert not any("other users cannot run" in line for line in lines)


def test_a_program_s_path_is_told_as_it_is(home: Path) -> None:
    perco = home / 'a "b\\b 100%free' / "perco"
    place = replace(points.user_place(), thumbnailer=home / "bin" / "perco-thumbnailer", perco=(str(perco),))
    text = points.files(place)[place.data / points.VIEWER][0].decode()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert shlex.split(lines["Exec"].replace("%%", "%")) == [str(perco), "view", "%f"] and "100%%free" in lines["Exec"]
    menu = points.files(place)[place.data / "nautilus-python/extensions/pillow_perco_menu.py"][0].decode()
    line = next(line for line in menu.splitlines() if line.startswith("PERCO = "))
    assert eval(line.removeprefix("PERCO = ").partition("  #")[0], {"json": json}) == [str(perco)]
    text = points.files(place)[place.data / "thumbnailers/pillow-perco.thumbnailer"][0].decode()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert lines["TryExec"] == f"{home}/bin/perco-thumbnailer"
    assert shlex.split(lines["Exec"]) == [f"{home}/bin/perco-thumbnailer", "-s", "%s", "%i", "%o"]


def test_a_user_makes_room_for_what_is_installed_for_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that is advised on GNOME: for oneself, for all, and once more for oneself."""
    perco("install")
    compiled = home / ".local/share/nautilus-python/extensions/__pycache__/pillow_perco_menu.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.touch()
    installed_for_all(home.parent, monkeypatch)
    assert "once more" in "".join(check.advice(points.system_place()))
    perco("install")
    assert not list((home / ".local/share/nemo").rglob("*.nemo_action"))
    assert not list((home / ".local/share/thumbnailers").glob("*"))
    perco("uninstall")
    assert snapshot(home) == {}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may give a folder away")
def test_another_user_s_home_is_not_installed_into(home: Path) -> None:
    os.chown(home, 65534, 65534)
    assert "is not this user's own: run it as its owner, or use --system" in perco("install").output
    assert snapshot(home) == {}


def test_without_a_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert "no home folder to install into: use --system" in perco("install").output
    assert "no home folder" in perco("status").output


def test_options_of_another_place(home: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["desktop", "install", "--destdir", str(tmp_path / "package")])
    assert result.exit_code == 2 and "go with --system" in result.output and snapshot(home) == {}


def test_a_menu_that_is_gone_is_told(home: Path) -> None:
    perco("install")
    (home / ".config/Thunar/uca.xml").unlink()
    result = perco("status")
    assert result.exit_code == 1 and "our entries are not in" in result.output


@needs_databases
def test_a_failure_that_was_noted_is_no_fault_of_the_installation(home: Path) -> None:
    perco("install")
    noted = home / ".cache/thumbnails/fail/x/y.png"
    noted.parent.mkdir(parents=True)
    info = PngInfo()
    info.add_text("Thumb::URI", "file:///x.perco")
    Image.new("L", (1, 1)).save(noted, pnginfo=info)
    result = perco("status")
    assert result.exit_code == 0 and "1 failures are noted" in result.output


def test_menus_run_no_module_that_lies_beside_the_photos(home: Path, photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("open('was-here', 'w')")
    photo.save(tmp_path / "1.jpg")
    command = "import sys; from pathlib import Path; from pillow_perco.desktop.menu import convert_beside; "
    command += "print(list(convert_beside([Path(sys.argv[1])], 'perco', '0.002')))"
    command_line = [sys.executable, "-P", "-c", command, "1.jpg"]
    run = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]" and (tmp_path / "1.perco").exists() and not (tmp_path / "was-here").exists()


def test_what_a_lost_manifest_knew_is_taken_out(home: Path) -> None:
    perco("install")
    (home / ".local/share/pillow-perco/desktop.json").unlink()
    perco("install")
    perco("uninstall")
    assert [name for name, (_, data) in snapshot(home).items() if b"perco" in data.lower()] == []


def test_a_menu_that_is_no_xml_any_more_keeps_nothing_else_from_being_taken_out(home: Path) -> None:
    perco("install")
    menu = home / ".config/Thunar/uca.xml"
    menu.write_text("<actions>")
    output = perco("uninstall").output
    assert f"{menu} was changed since, and stays" in output
    assert [name for name in snapshot(home) if (home / name).is_file()] == [".config/Thunar/uca.xml"]


def test_a_package_holds_what_its_system_is_to_know(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "install", lambda *_: iter(()))
    root = tmp_path / "not" / "yet"
    assert perco("install", "--system", "--prefix", "/usr", "--destdir", root).exit_code == 0
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert "usr/share/mime/packages/pillow-perco.xml" in names
    assert not {name for name in names if name.endswith(("mime.cache", "mimeinfo.cache", "globs2"))}
    manifest = json.loads((root / "usr/lib/pillow-perco/desktop.json").read_text())
    assert "/usr/share/mime/packages/pillow-perco.xml" in manifest["written"] and str(root) not in json.dumps(manifest)

"""Desktop installations of another release, ones that broke off, and files that cannot be written or are links."""

# ruff: noqa: F811  (fixtures of another file)

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_desktop import OTHERS, home, installed_for_all, perco, snapshot  # noqa: F401

from perco_engine.store import install as store
from perco_engine.version import __version__
from pillow_perco.desktop import check, install, manifest, points, system

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the desktop is that of freedesktop.org")


@pytest.fixture
def menu(home: Path) -> Path:
    """Where the user's file of Thunar's actions is to lie."""
    path = home / ".config/Thunar/uca.xml"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that refreshes the MIME database, and makes one file."""
    command = tmp_path / "commands" / install.MIME_DATABASE
    command.parent.mkdir()
    command.write_text('#!/bin/sh\n: > "$1/mime.cache"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")


def write_protect(protected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has one file that cannot be written, not even by root."""
    write_beside = manifest.write_beside

    def write(path: Path, *arguments: object, **options: object) -> None:
        if path == protected:
            raise OSError(f"{path} lies in a read-only folder")
        write_beside(path, *arguments, **options)  # type: ignore[arg-type]

    for module in (manifest, install):
        monkeypatch.setattr(module, "write_beside", write)


def installed_by(release: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs for all, as another release did; returns the thumbnailer, which says that it is of that release."""
    with monkeypatch.context() as patch:
        patch.setattr(install, "__version__", release)
        installed_for_all(folder, patch)
    helper = points.SYSTEM_PREFIX / "bin" / "perco-thumbnailer"
    helper.parent.mkdir(exist_ok=True)
    helper.write_text(f"#!/bin/sh\necho {release}\n")
    helper.chmod(0o755)
    (points.system_place().data / points.THUMBNAILER).write_text(f"TryExec={helper}\n")
    return helper


def test_a_helper_of_another_release_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = installed_by("0.0.1", home.parent, monkeypatch)
    told = {finding.name: finding for finding in check.findings()}["thumbnailer, system"]
    assert told.found == f"{helper} cannot be used (it is of release 0.0.1, and this is {__version__})"
    assert told.fault and told.mend == check.install_system()
    installed_by(__version__, home.parent, monkeypatch)
    assert "cannot be used" not in perco("status").output


def test_nothing_is_left_to_a_system_of_another_release(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perco("install")
    before = snapshot(home)
    helper = installed_by("0.0.1", home.parent, monkeypatch)
    perco("install")
    assert snapshot(home) == before and check.thumbnailer_of(points.user_place()) == points.script("perco-thumbnailer")
    monkeypatch.setenv("XDG_CURRENT_DESKTOP", "GNOME")
    line = next(line for line in perco("status").output.splitlines() if line.startswith("thumbnailer, this user"))
    assert line.endswith(check.install_system()) or "in GNOME's sandbox too" in line
    installed_by(__version__, home.parent, monkeypatch)
    perco("install")
    assert points.user_place().thumbnailer == helper
    assert not list((home / ".local/share/thumbnailers").iterdir())


def test_what_this_release_does_not_have_is_taken_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perco("install")
    before = snapshot(home)
    perco("uninstall")
    with monkeypatch.context() as patch:
        patch.setattr(points, "RATES", (*points.RATES, ("former", "0.055"), ("changed", "0.085")))
        perco("install")
    actions = home / ".local/share/nemo/actions"
    (actions / "pillow-perco-changed.nemo_action").write_text("[Nemo Action]\n")
    assert (actions / "pillow-perco-former.nemo_action").exists()
    assert "changed.nemo_action is not needed any more; it was changed since, and stays" in perco("install").output
    assert "pillow-perco-changed" not in points.user_place().manifest.read_text()
    (actions / "pillow-perco-changed.nemo_action").unlink()
    perco("install")
    assert snapshot(home) == before


def test_a_menu_in_another_place_stays_until_all_is_taken_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perco("install")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "other"))
    perco("install")
    for folder in (".config", "other"):
        assert b"pillow-perco" in (home / folder / "Thunar/uca.xml").read_bytes()
    perco("uninstall")
    assert snapshot(home) == {}


def test_the_command_that_is_installed_beside_the_files_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(place: points.Place, known: manifest.Manifest) -> list[str]:
        known.put(system.wrapper(place), b"#!/bin/sh\n", 0o755, None)
        return []

    monkeypatch.setattr(system, "install", put)
    place = points.system_place(destination=home.parent / "root")
    list(install.install(place))
    assert place.thumbnailer.relative_to("/") == system.wrapper(place).relative_to(place.root)
    assert system.wrapper(place).exists()


def test_a_menu_that_cannot_be_written_is_told_when_all_else_is_done(
    menu: Path, home: Path, database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    menu.write_text(OTHERS)
    before = snapshot(home)
    write_protect(menu, monkeypatch)
    result = perco("install")
    assert result.exit_code == 1 and result.output.endswith(f"Error: {menu} lies in a read-only folder\n")
    assert (home / ".local/share/mime/mime.cache").exists()
    assert perco("uninstall").exit_code == 0  # there is nothing of ours to be taken out of the menu
    assert snapshot(home) == before


def test_what_cannot_be_taken_out_keeps_nothing_else(menu: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    menu.write_text(OTHERS)
    before = snapshot(home)
    perco("install")
    with monkeypatch.context() as patch:
        write_protect(menu, patch)
        result = perco("uninstall")
    assert result.exit_code == 1 and f"{menu} is still there: {menu} lies in a read-only folder" in result.output
    files = [name for name in snapshot(home) if (home / name).is_file()]
    assert files == [".config/Thunar/uca.xml", ".local/share/pillow-perco/desktop.json"]
    assert perco("uninstall").exit_code == 0
    assert snapshot(home) == before


def test_an_installation_that_broke_off_leaves_no_database(
    home: Path, database: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, "_refresh", break_off)
        with pytest.raises(KeyboardInterrupt):
            list(install.install(points.user_place()))
    assert perco("uninstall").exit_code == 0
    assert snapshot(home) == {}


def test_a_new_menu_begins_with_the_first_of_the_system(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        shared = tmp_path / name / "Thunar" / "uca.xml"
        shared.parent.mkdir(parents=True)
        shared.write_text(OTHERS.replace("1234-1", name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_DIRS", f"second:{tmp_path}/none:{tmp_path}/first:{tmp_path}/second")
    perco("install")
    text = (home / ".config/Thunar/uca.xml").read_text()
    assert "<unique-id>first<" in text and "<unique-id>second<" not in text


def test_a_menu_that_is_a_link_to_nothing_is_one_again(menu: Path, home: Path) -> None:
    menu.symlink_to(home / "menu.xml")
    perco("install")
    assert b"pillow-perco" in (home / "menu.xml").read_bytes()
    perco("uninstall")
    assert menu.is_symlink() and [path.name for path in home.iterdir()] == [".config"]


def test_a_menu_keeps_its_line_ends(menu: Path) -> None:
    text = OTHERS.replace("\n", "\r\n").encode()
    menu.write_bytes(text)
    perco("install")
    menu.write_bytes(menu.read_bytes().replace(b"<!-- mine -->", b"<!-- changed -->"))
    perco("uninstall")
    assert menu.read_bytes() == text.replace(b"<!-- mine -->", b"<!-- changed -->")


def test_a_notice_says_what_is_refused_and_not_how_to_type_it(home: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    output = perco("convert", "--", tmp_path / "a.jpg", tmp_path / "a.png").output
    assert "a.perco" in output and "Usage:" not in output and output.count("Error: ") == 1


@pytest.mark.parametrize("is_package", [False, True])
def test_the_models_that_come_along_are_told(
    is_package: bool, home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCO_HOME", str(tmp_path / "own"))
    store.import_folder(tiny_model, name="mine")
    for name in ("_bring_packages", "_bring_ours", "_try_out"):
        monkeypatch.setattr(system, name, lambda *_: None)
    monkeypatch.setattr(system, "subprocess", SimpleNamespace(run=lambda *_, **__: None))
    monkeypatch.setattr(system, "interpreter", lambda: system.Interpreter(Path("/usr/bin/python3"), (3, 11), ""))
    place = points.system_place(destination=tmp_path / "root" if is_package else None)
    place.state.mkdir(parents=True)
    told = list(system.install(place, manifest.Manifest(place.manifest, place.root)))
    brought = [path.name for path in (place.state / "app").glob("store/models/*")]
    line = f"{place.state / 'app'}: previews of the embedded model, and of mine of {tmp_path / 'own' / 'models'}"
    assert (brought, line in told) == (([], False) if is_package else (["mine"], True))
    assert json.loads(place.manifest.read_text())["written"]

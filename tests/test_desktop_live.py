"""Real desktops, headless: tumbler, GNOME's factory in its sandbox, file managers on a virtual screen.

They need packages of Debian and root, since they install under /usr/local (and take it out again), so they run only by
`pytest -m desktop`, as .ci/run does.  There PERCO_DESKTOP_TESTS=required makes what is missing a failure.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageGrab, ImageOps

from perco_engine import get_engine, preview, thumbnails
from perco_engine.thumbnails import uri
from pillow_perco.desktop import points

pytestmark = pytest.mark.desktop

HERE = Path(__file__).parent / "desktop"
DEMO = Path(__file__).parent.parent / "pillow_perco" / "demo.jpg"
PERCO = Path(sys.executable).parent / "perco"
WATCHED = ("/usr/local/share", "/usr/local/bin", "/usr/local/lib/pillow-perco", "/etc/xdg")
LONG_AGO = 1.7e9
"""When the files of the tests were written: file managers wait with thumbnails of those that still change."""

LIKENESS = 0.85
"""The correlation of a thumbnail on the screen with the expected picture; another photo has less than 0.5."""


def needs(*commands: str, gi: tuple[str, str] | None = None) -> None:
    """Skips the test where something is missing, or fails it where everything must be there."""
    missing = [command for command in commands if shutil.which(command, path="/usr/bin:/usr/sbin:/sbin") is None]
    if os.geteuid():
        missing.append("root")
    if gi and not missing:
        code = f"import gi; gi.require_version({gi[0]!r}, {gi[1]!r})"
        if subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True, check=False).returncode:
            missing.append(f"gir1.2 of {gi[0]} {gi[1]}")
    if missing:
        text = f"not on this machine: {', '.join(missing)}"
        if os.environ.get("PERCO_DESKTOP_TESTS") == "required":
            pytest.fail(text)
        pytest.skip(text)


def state() -> dict[str, tuple[int, bytes]]:
    """What lies where a system-wide installation writes."""
    found = {}
    for folder in WATCHED:
        for path in sorted(Path(folder).rglob("*")) if Path(folder).exists() else ():
            if not path.is_symlink():
                found[str(path)] = path.stat().st_mode, path.read_bytes() if path.is_file() else b""
    return found


@pytest.fixture(scope="module")
def system() -> Iterator[Path]:
    """A system-wide installation under /usr/local, taken out again: then everything is as it was."""
    needs("update-mime-database", "update-desktop-database")
    if points.system_place().manifest.exists():
        pytest.fail("this machine has a system-wide installation: sudo perco desktop uninstall --system")
    before, mask = state(), os.umask(0o022)
    try:
        for _ in range(2):
            subprocess.run([PERCO, "desktop", "install", "--system"], check=True, capture_output=True)
        yield Path("/usr/local/bin/perco-thumbnailer")
    finally:
        subprocess.run([PERCO, "desktop", "uninstall", "--system"], check=True, capture_output=True)
        os.umask(mask)
    assert state() == before


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home with a folder of one .perco file."""
    (tmp_path / "pictures").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def data() -> bytes:
    with Image.open(DEMO) as photo:
        return get_engine().encode(ImageOps.fit(photo.convert("RGB"), (384, 256)), bpp=0.13)


@pytest.fixture
def coded(home: Path, data: bytes) -> Path:
    path = home / "pictures" / "a photo ü.perco"
    path.write_bytes(data)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def shown(coded: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same file, with thumbnails in the cache: its picture is soon on the screen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    (filled,) = thumbnails.fill_files([coded])
    assert filled.made
    return coded


def environment(home: Path) -> dict[str, str]:
    """No XDG_RUNTIME_DIR: with one that is no session's, Nemo makes no thumbnails."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "NO_AT_BRIDGE": "1",
        "PERCO_HOME": str(home / "models"),
    }  # fmt: skip


def run(command: list[object], home: Path, user: str | None = None, timeout: int = 120) -> str:
    """Runs a command on a message bus of its own."""
    words = ["dbus-run-session", "--", *map(str, command)]
    if user:
        words = ["/usr/sbin/runuser", "-u", user, "--", "env", f"HOME={home}", *words]  # which it sets itself
    done = subprocess.run(
        words, env=environment(home), capture_output=True, text=True, check=False, timeout=timeout, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def same(one: Path, data: bytes, size: int) -> None:
    """Asserts that a thumbnail is the picture in the bytes of a file."""
    with Image.open(one) as picture:
        expected = preview.render(data, size)
        assert picture.size == expected.size
        error = np.abs(np.asarray(picture.convert("RGB"), np.int16) - np.asarray(expected, np.int16))
        assert error.max() <= 1


@pytest.fixture(scope="module")
def user() -> Iterator[str]:
    """A user who is not root."""
    needs("useradd", "userdel", "runuser")
    name = f"perco-test-{os.getpid()}"  # of this run's own: one that was broken off leaves its user behind
    subprocess.run(["useradd", "--no-create-home", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)


def given_to(folder: Path, user: str) -> None:
    """Gives a folder to a user, who can also reach it."""
    subprocess.run(["chown", "-R", user, folder], check=True)
    for parent in folder.parents:
        if parent.owner() == "root" and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)


def test_tumbler_with_an_installation_of_the_user_alone(coded: Path, home: Path, data: bytes) -> None:
    needs("dbus-run-session", "update-mime-database", gi=("Gio", "2.0"))
    subprocess.run([PERCO, "desktop", "install"], env=environment(home), check=True, capture_output=True)
    thumbnailer = (home / ".local/share/thumbnailers/pillow-perco.thumbnailer").read_text()
    assert str(PERCO.parent) in thumbnailer
    assert run(["/usr/bin/python3", HERE / "tumbler_queue.py", "normal", coded], home).strip() == "0"
    (made,) = (home / ".cache/thumbnails/normal").iterdir()
    same(made, data, 128)
    told = subprocess.run(["gio", "info", coded], env=environment(home), capture_output=True, text=True, check=True)
    assert "image/x-perco" in told.stdout
    nameless = home / "pictures" / "nameless"
    nameless.write_bytes(data)
    told = subprocess.run(["gio", "info", nameless], env=environment(home), capture_output=True, text=True, check=True)
    assert "image/x-perco" in told.stdout


@pytest.mark.parametrize("version", ["3.0", "4.0"])
def test_gnome_s_sandbox(system: Path, coded: Path, home: Path, data: bytes, version: str) -> None:
    needs("bwrap", "dbus-run-session", gi=("GnomeDesktop", version))
    run(["/usr/bin/python3", HERE / "gnome_factory.py", version, coded, home / "x.png"], home)
    same(home / "x.png", data, 256)


def test_gnome_s_sandbox_for_a_normal_user(system: Path, coded: Path, home: Path, data: bytes, user: str) -> None:
    needs("bwrap", "dbus-run-session", gi=("GnomeDesktop", "4.0"))
    given_to(home, user)
    script = home / "factory.py"
    shutil.copy(HERE / "gnome_factory.py", script)
    run(["/usr/bin/python3", script, "4.0", coded, home / "x.png"], home, user)
    same(home / "x.png", data, 256)


@pytest.mark.parametrize("normal", [False, True], ids=["root", "a normal user"])
def test_tumbler(
    system: Path, coded: Path, home: Path, data: bytes, normal: bool, request: pytest.FixtureRequest
) -> None:
    needs("dbus-run-session", "update-mime-database", gi=("Gio", "2.0"))
    bad = home / "pictures" / "bad.perco"
    bad.write_bytes(data[:-9])
    script = home / "queue.py"
    shutil.copy(HERE / "tumbler_queue.py", script)
    user = request.getfixturevalue("user") if normal else None
    if user:
        given_to(home, user)
    assert run(["/usr/bin/python3", script, "large", coded, bad], home, user).strip() == "1"
    import hashlib

    made = list((home / ".cache/thumbnails/large").iterdir())
    assert [path.stem for path in made] == [hashlib.md5(uri(coded).encode()).hexdigest()]
    same(made[0], data, 256)


class Screen:
    """A file manager on a folder, on a virtual screen."""

    def __init__(self, program: str, folder: Path, home: Path) -> None:
        # -noreset: else the server starts anew when the first look at the screen ends before the file manager is there
        server = ["Xvfb", "-screen", "0", "900x600x24", "-nolisten", "tcp", "-noreset", "-displayfd"]
        ours, theirs = os.pipe()
        with (home / "xvfb.log").open("wb") as said:
            self._processes = [subprocess.Popen([*server, str(theirs)], stderr=said, pass_fds=[theirs])]
        os.close(theirs)
        with open(ours) as told:
            number = told.readline().strip()
        assert number, (home / "xvfb.log").read_text(errors="replace")
        self.display = f":{number}"
        environ = environment(home) | {"DISPLAY": self.display, "GDK_BACKEND": "x11", "GSK_RENDERER": "cairo"}
        self._environ = environ
        self._told = home / "file-manager.log"
        self._shots = Path(os.environ.get("PERCO_SCREENSHOTS", home))
        command = ["dbus-run-session", "--", program, str(folder)]
        with self._told.open("wb") as told:
            self._processes.append(
                subprocess.Popen(
                    command, env=environ, start_new_session=True, cwd="/", stdout=told, stderr=subprocess.STDOUT
                )
            )

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._processes[1].pid, signal.SIGKILL)
        self._processes[0].terminate()
        for process in self._processes:
            process.wait()

    def find(self, picture: Image.Image, timeout: float = 60) -> tuple[int, int]:
        """The middle of a picture on the screen, as soon as it is there, at whatever size."""
        end, best = time.monotonic() + timeout, 0.0
        while time.monotonic() < end:
            screen = ImageGrab.grab(xdisplay=self.display)
            likeness, place = located(screen, picture)
            if likeness > LIKENESS:
                self.picture = screen
                return place
            best = max(best, likeness)
            time.sleep(1)
        screen.save(self._shots / "perco-not-found.png")
        told = self._told.read_text(errors="replace")[-2000:]
        raise AssertionError(f"the thumbnail is not on the screen (likeness {best:.2f}); the file manager said: {told}")

    def wait_for(self, due: Path, seconds: float) -> None:
        """Waits until a file is there; where it does not come, keeps what is on the screen."""
        end = time.monotonic() + seconds
        while not due.exists():
            if time.monotonic() > end:
                ImageGrab.grab(xdisplay=self.display).save(self._shots / "perco-menu.png")
                raise AssertionError(f"{due} was not written")
            time.sleep(0.5)

    def open_menu(self, place: tuple[int, int]) -> None:
        """Opens the menu of what is at a place, and waits until it is there and moves no more."""
        before = ImageGrab.grab(xdisplay=self.display)
        self.do("mousemove", *place, "click", 3)
        end, last = time.monotonic() + 10, before
        while time.monotonic() < end:
            now = ImageGrab.grab(xdisplay=self.display)
            if now == last != before:
                return
            last = now
            time.sleep(1)

    def do(self, *words: object) -> None:
        subprocess.run(["xdotool", *map(str, words)], env=self._environ, check=True)
        time.sleep(1)


def located(screen: Image.Image, picture: Image.Image) -> tuple[float, tuple[int, int]]:
    """The best normalised correlation of a picture with any part of the screen, and the middle of that part."""
    whole = np.asarray(screen.convert("L"), np.float64)
    best = 0.0, (0, 0)
    for width in (60, 62, 64, 66, 68, 72, 84, 96, 112, 128):
        part = np.asarray(picture.convert("L").resize((width, round(width * picture.height / picture.width))), float)
        part = part - part.mean()
        sums = [np.fft.rfft2(layer) for layer in (whole, whole**2)]
        shape = whole.shape

        def correlated(spectrum: np.ndarray, kernel: np.ndarray, shape: tuple[int, ...] = shape) -> np.ndarray:
            return np.fft.irfft2(spectrum * np.conj(np.fft.rfft2(kernel, shape)), shape)

        box = np.ones_like(part)
        mean = correlated(sums[0], box) / part.size
        spread = np.sqrt(np.maximum(correlated(sums[1], box) / part.size - mean**2, 1))
        likeness = correlated(sums[0], part) / (spread * part.size * part.std())
        likeness = likeness[: shape[0] - part.shape[0], : shape[1] - part.shape[1]]
        top, left = np.unravel_index(likeness.argmax(), likeness.shape)
        if likeness[top, left] > best[0]:
            middle = int(left) + part.shape[1] // 2, int(top) + part.shape[0] // 2
            best = float(likeness[top, left]), middle
    return best


@pytest.fixture
def screen(request: pytest.FixtureRequest, home: Path, system: Path) -> Iterator[Screen]:
    """The file manager that the test is run with."""
    program = request.param
    needs("Xvfb", "xdotool", "dbus-run-session", program)
    if program == "caja":  # whose menu is each user's own
        subprocess.run([PERCO, "desktop", "install"], env=environment(home), check=True, capture_output=True)
    opened = Screen(program, home / "pictures", home)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("screen", ["thunar", "nautilus", "nemo", "caja"], indirect=True)
def test_the_thumbnail_is_on_the_screen(
    coded: Path, data: bytes, screen: Screen, request: pytest.FixtureRequest
) -> None:
    screen.find(preview.render(data, 128))
    if folder := os.environ.get("PERCO_SCREENSHOTS"):
        screen.picture.save(Path(folder) / f"{request.node.callspec.params['screen']}.png")
    with Image.open(Path(__file__).parent / "conformance/odd-size/reference.png") as other:
        assert located(screen.picture, other)[0] < LIKENESS  # the comparison can tell pictures apart


@pytest.fixture
def photo_file(home: Path) -> Path:
    path = home / "pictures" / "the photo.png"
    with Image.open(DEMO) as photo:
        ImageOps.fit(photo.convert("RGB"), (384, 256)).save(path)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


FROM_A_PHOTO = {
    "thunar": "Up Up",
    "nemo": "Down Down Down",
    "nautilus": "Up Up Right Down Down Down Down",
    "caja": "Up Up Right Down Down Down",
}
"""The keys from the opened menu to "Convert to PerCo", the finest rate."""

TO_PNG = {"thunar": "Up Up", "nemo": "Down Down Down", "nautilus": "Up Up", "caja": "Up Up"}


def _needs_extensions(program: str) -> None:
    """What the menus of Nautilus and Caja, which are written in Python, need."""
    if program in ("nautilus", "caja"):
        needs(gi=("Nautilus", "4.0") if program == "nautilus" else ("Caja", "2.0"))


def chosen(screen: Screen, picture: Image.Image, keys: str, due: Path) -> None:
    """Opens the menu of the file that shows a picture, goes to an entry, and waits for the file that it writes.

    Twice, if need be: on a busy machine keys may come before the menu that they are meant for.
    """
    for _ in range(2):
        place = screen.find(picture)
        screen.do("mousemove", *place, "click", 1)
        screen.open_menu(place)
        for key in [*keys.split(), "Return"]:
            screen.do("key", key)
        with contextlib.suppress(AssertionError):
            screen.wait_for(due, 90)
            return
        screen.do("key", "Escape")
    screen.wait_for(due, 0)


@pytest.mark.parametrize("screen", ["thunar", "nautilus", "nemo", "caja"], indirect=True)
def test_a_photo_is_converted_by_a_click(photo_file: Path, screen: Screen, request: pytest.FixtureRequest) -> None:
    _needs_extensions(request.node.callspec.params["screen"])
    with Image.open(photo_file) as photo:
        shown = photo.convert("RGB")
    chosen(screen, shown, FROM_A_PHOTO[request.node.callspec.params["screen"]], photo_file.with_suffix(".perco"))
    assert get_engine().codes(photo_file.with_suffix(".perco").read_bytes()).rate_point == 5


@pytest.mark.parametrize("screen", ["thunar", "nautilus", "nemo", "caja"], indirect=True)
def test_a_perco_file_becomes_a_png_by_a_click(
    shown: Path, data: bytes, screen: Screen, request: pytest.FixtureRequest
) -> None:
    _needs_extensions(request.node.callspec.params["screen"])
    chosen(screen, preview.render(data, 128), TO_PNG[request.node.callspec.params["screen"]], shown.with_suffix(".png"))
    with Image.open(shown.with_suffix(".png")) as picture:
        assert picture.size == (384, 256)


def test_kde_s_menu_by_its_command(system: Path, photo_file: Path, home: Path) -> None:
    """Dolphin is not run here: what its service menu says is."""
    import configparser
    import shlex

    menu = configparser.ConfigParser(interpolation=None)
    menu.read("/usr/local/share/kio/servicemenus/pillow-perco-encode.desktop")
    command = shlex.split(menu["Desktop Action tiny"]["Exec"])
    words = [word for part in command for word in ([str(photo_file)] if part == "%F" else [part])]
    subprocess.run(words, env=environment(home), check=True)
    assert photo_file.with_suffix(".perco").stat().st_size < 100


def test_status_is_content(system: Path, home: Path) -> None:
    told = subprocess.run(
        [PERCO, "desktop", "status"], env=environment(home), capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout
    assert "runs, in GNOME's sandbox too (tried)" in told.stdout


VIEWER = """[Desktop Entry]
Type=Application
Name=The viewer of this user
Exec=/bin/sh {script} %f
MimeType=image/png;
"""


@pytest.mark.parametrize("screen", ["thunar", "nautilus", "nemo", "caja"], indirect=True)
def test_a_double_click_opens_the_picture_in_the_user_s_viewer(
    shown: Path, data: bytes, home: Path, screen: Screen
) -> None:
    needs("xdg-open")
    applications, seen, script = home / ".local/share/applications", home / "seen", home / "viewer.sh"
    applications.mkdir(parents=True)
    script.write_text(f'cp "$1" "{seen}.part" && mv "{seen}.part" "{seen}"\n')
    (applications / "viewer.desktop").write_text(VIEWER.format(script=script))
    (home / ".config").mkdir(exist_ok=True)
    (home / ".config/mimeapps.list").write_text("[Default Applications]\nimage/png=viewer.desktop\n")
    place = screen.find(preview.render(data, 128))
    screen.do("mousemove", *place, "click", "--repeat", 2, "--delay", 80, 1)
    try:
        screen.wait_for(seen, 90)
        with Image.open(seen, formats=["PNG"]) as picture:
            error = np.asarray(picture.convert("RGB"), np.int16) - np.asarray(get_engine().decode(data), np.int16)
            assert np.abs(error).max() <= 1
    finally:
        subprocess.run([PERCO, "service", "stop"], env=environment(home), check=False, capture_output=True)

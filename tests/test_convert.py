"""perco convert from outside: both directions, bad files, breaks, watching, sources removed."""

import errno
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from click.testing import CliRunner, Result
from conftest import opened_size, reachable
from PIL import Image

from perco_engine import batch, batch_files, thumbnails, watch
from perco_engine.batch_networks import Settings
from perco_engine.conversion import Request, Task
from perco_engine.errors import ModelUnavailable, NotEnoughMemory
from pillow_perco import cli_convert
from pillow_perco.cli import main

COMMAND = [str(Path(sys.executable).with_name("perco")), "convert"]


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "thumbnails"


@pytest.fixture
def photos(photo: Image.Image, tmp_path: Path) -> Path:
    """A folder of pictures of two sizes, with odd names, one below, and two bad ones."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    photo.save(folder / "a.jpg")
    photo.save(folder / "b #1 100%\n.png")
    photo.resize((70, 90)).save(folder / "sub" / "Käse[x].webp")
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "b #1 100%\n.png").read_bytes()[:9000])
    return folder


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands that are killed at the end."""
    processes = []

    def start(*arguments: object, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        command = [*COMMAND, "--effort", "0", *map(str, arguments)]
        processes.append(subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


OUR_PATH = os.pathsep.join(
    [str(Path(batch.__file__).parent.parent), *(path for path in sys.path if path.endswith("site-packages"))]
)
"""What an interpreter elsewhere needs to find what this one has."""


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_there_and_back_with_bad_files(photos: Path, tmp_path: Path, cache: Path) -> None:
    result = convert(photos, "out", "-r", "--json", "--bpp", 0.002)
    assert result.exit_code == 1
    *lines, summary = map(json.loads, result.stdout.splitlines())
    assert {line["source"]: line["status"] for line in lines} == {
        f"{photos}/a.jpg": "written", f"{photos}/b #1 100%\n.png": "written", f"{photos}/bad.jpg": "failed",
        f"{photos}/cut.png": "failed", f"{photos}/sub/Käse[x].webp": "written",
    }  # fmt: skip
    assert {k: summary["summary"][k] for k in ("written", "failed", "skipped")} == {
        "written": 3, "failed": 2, "skipped": 0,
    }  # fmt: skip
    assert all(line["bytes"] == Path(line["target"]).stat().st_size for line in lines if line["status"] == "written")
    written = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    assert written == ["a.perco", "b #1 100%\n.perco", "sub/Käse[x].perco"]
    assert all(thumbnails.are_current(path.absolute()) for path in Path("out").rglob("*.perco"))
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 12

    result = convert("out", "back", "-r", "--to", "jpg", "--steps", 0)
    assert (result.exit_code, result.stdout[:9]) == (0, "3 written")
    assert opened_size(Path("back/a.jpg")) == (192, 128)
    assert opened_size(Path("back/sub/Käse[x].jpg")) == (70, 90)


def test_failures_are_told_at_the_end_in_a_line_each(photos: Path) -> None:
    result = convert(photos, "out", "--quiet", "--no-thumbnails")
    assert result.exit_code == 1 and result.stdout == ""
    assert [line.split(": ")[0] for line in sorted(result.stderr.splitlines())] == [
        f"{photos}/bad.jpg", f"{photos}/cut.png",
    ]  # fmt: skip
    result = convert("nowhere.jpg", photos / "a.jpg", "more/")
    assert result.exit_code == 1 and Path("more/a.perco").exists() and "there is no such file" in result.stderr
    result = convert("nowhere.jpg", "more/", "--dry-run")
    assert result.exit_code == 1 and "nowhere.jpg: there is no such file" in result.stderr


def test_the_bytes_are_those_of_perco_encode(photos: Path) -> None:
    Path("in/a.txt").write_text("  a barn owl\n")
    assert convert("in/a.jpg", "many.perco", "--seed", 5, "--max-bytes", 400).exit_code == 0
    arguments = ["in/a.jpg", "one.perco", "--seed", "5", "--max-bytes", "400", "--caption", "a barn owl"]
    assert CliRunner().invoke(main, ["encode", *arguments, "--no-thumbnails"]).exit_code == 0
    assert Path("many.perco").read_bytes() == Path("one.perco").read_bytes()


def test_metadata(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a barn owl", 6
    photo.save("a.jpg", exif=exif)
    for flags, kept in (([], None), (["--keep-metadata"], "a barn owl")):
        assert convert("a.jpg", "a.perco", "--overwrite", *flags).exit_code == 0
        assert convert("a.perco", "b.png", "--overwrite", *flags).exit_code == 0
        with Image.open("b.png") as image:
            assert image.size == (128, 192) and image.getexif().get(0x010E) == kept


def test_what_is_there_already(photos: Path) -> None:
    Path("out").mkdir()
    Path("out/a.perco").write_bytes(b"precious")
    result = convert(photos, "out")
    assert result.exit_code == 2 and "--skip-existing" in result.stderr
    assert names("out") == ["a.perco"]
    result = convert("in/a.jpg", "in/b [#]*", "out", "--skip-existing")
    assert result.exit_code == 0 and result.stdout.startswith("1 written, 1 skipped")
    assert Path("out/a.perco").read_bytes() == b"precious"
    assert convert("in/a.jpg", "out", "--overwrite").exit_code == 0
    assert Path("out/a.perco").read_bytes() != b"precious"


def test_where_all_is_there_nothing_is_loaded(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    photo.save("a.jpg")
    Path("a.perco").touch()
    monkeypatch.setattr(batch, "convert", lambda *_: pytest.fail("the conversion was started"))
    result = convert("a.jpg", "a.perco", "--skip-existing")
    assert result.exit_code == 0 and "1 skipped" in result.stdout
    assert Path("a.perco").read_bytes() == b""


def test_where_nothing_can_be_read_torch_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    program = "import sys; from pillow_perco.cli import main; code = main(['convert', 'bad.jpg', 'gone.jpg', 'out'],"
    program += "standalone_mode=False); sys.exit(10 + ('torch' in sys.modules) if code == 1 else 9)"
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 10


def test_a_dry_run_does_nothing(photos: Path) -> None:
    result = convert("in/a.jpg", "in/b [#]*", "out", "--dry-run")
    assert result.exit_code == 0 and not Path("out").exists()
    assert result.stdout == "in/a.jpg -> out/a.perco\nin/b #1 100%\\n.png -> out/b #1 100%\\n.perco\n2 planned\n"
    result = convert("in/a.jpg", "out", "--dry-run", "--delete-source")
    assert result.stdout == "in/a.jpg -> out/a.perco, and the source is removed\n1 planned\n"
    (line, _) = convert("in/a.jpg", "out", "--dry-run", "--delete-source", "--json").stdout.splitlines()
    assert json.loads(line)["source_removed"] is True
    result = convert("in/a.jpg", "out", "--dry-run", "--model", "none")
    assert result.exit_code == 1 and "neither a registered model" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("out",), "name the files to convert"),
        (("in", "out", "--steps", 1), "--steps is of the other direction"),
        (("in", "out", "--bpp", -1), "--bpp"),
        (("in/a.jpg", "in/a.jpg"), "one of the two has to be"),
        (("in", "out", "--watch", "in"), "name the files to convert"),
        (("", "out"), "an empty name is neither a file nor a folder"),
        (("in", ""), "an empty name is neither a file nor a folder"),
        (("in", "out", "--bpp", "nan"), "nan is no rate"),
        (("--watch", "in", "in/a.jpg"), "is no folder"),
        (("a.perco", "out/", "--to", "pdf", "--delete-source"), "which .pdf cannot be"),
        (("in", "out", "--skip-existing", "--overwrite"), "--skip-existing and --overwrite exclude each other"),
    ],
)
def test_requests_that_make_no_sense(arguments: tuple[object, ...], says: str, photos: Path) -> None:
    Path("a.perco").touch()
    result = convert(*arguments)
    assert result.exit_code == 2 and says in result.stderr and not Path("out").exists()


def test_a_model_that_is_not_there_ends_it(photos: Path) -> None:
    result = convert(photos, "out", "--model", "none")
    assert result.exit_code == 1 and "neither a registered model" in result.stderr and not Path("out").exists()


def test_a_model_that_is_not_there_is_told_before_a_folder_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").mkdir()
    monkeypatch.setattr(batch, "convert", lambda *_: pytest.fail("the conversion was started"))
    result = convert("--watch", "in", "out", "--model", "none")
    assert result.exit_code == 1 and "neither a registered model" in result.stderr


def test_a_captioner_that_is_not_there_ends_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    result = convert("in/a.jpg", "in/sub", "out", "--captioner", "./none")
    assert result.exit_code == 1 and result.output.count("there is no folder './none'") == 1
    result = convert("in/a.jpg", "out/", "--captioner", "./none", "--caption", "an owl")  # which nobody asks
    assert result.exit_code == 0


def test_a_second_interrupt_leaves_no_part_of_a_file(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while writers are waited for."""
    for name in ("a.png", "b.png"):
        photo.save(name)
    writing, go_on = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        writing.set()
        go_on.wait(60)

    monkeypatch.setattr("perco_engine.files.os.fsync", slow)
    tasks = [Task(Path(f"{name}.png"), Path(f"out/{name}.perco")) for name in ("a", "b")]
    work = batch._Work(tasks, Settings(effort=0, thumbnails=False))
    told: list[batch.Result | batch.Thumbnailed] = []
    running = threading.Thread(target=lambda: told.extend(work.results()), daemon=True)
    running.start()
    assert writing.wait(120)
    time.sleep(0.2)  # for the other file to wait for its turn
    with monkeypatch.context() as patch:
        for writer in work._writers:
            patch.setattr(writer, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            work.stop()
    assert names("out") == []
    go_on.set()
    running.join(60)
    assert names("out") == [] and told == []


def test_sources_are_removed_only_when_the_file_was_read_back(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert(photos, "out", "--delete-source", "--no-thumbnails").exit_code == 1
    assert names("in") == ["bad.jpg", "cut.png", "sub"]
    write = batch.files.write_beside
    monkeypatch.setattr(batch.files, "write_beside", lambda path, data, **options: write(path, data[:-1], **options))
    result = convert("in/sub", "out", "--delete-source", "--no-thumbnails")
    assert result.exit_code == 1 and "the source was kept" in result.stderr
    assert names("in/sub") == ["Käse[x].webp"]


def test_a_written_file_is_told_where_its_source_cannot_be_removed(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save("a.png")

    def error(name: str) -> str:
        tasks = [Task(Path("a.png"), Path(name))]
        (done,) = batch.convert(tasks, Settings(effort=0, thumbnails=False, delete_source=True))
        assert isinstance(done, batch.Result) and Path(name).exists()
        return done.error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        # without links: with them, the name that a file was written under is removed
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
        assert error("b.perco") == "written; the source could not be removed (Permission denied)"
    with monkeypatch.context() as patch:
        patch.setattr(batch.Networks, "check", lambda *_: (_ for _ in ()).throw(RuntimeError("<_io.BytesIO>")))
        assert error("c.perco") == "written, but could not be read back: the source was kept"
    with monkeypatch.context() as patch:
        patch.setattr(batch.Networks, "check", lambda *_: os.utime("a.png", (0, 0)))
        assert error("d.perco") == "written; the source was changed meanwhile, and was kept"
    monkeypatch.setattr(batch.Networks, "check", lambda *_: Path("a.png").unlink())
    assert error("e.perco") == "written; the source is gone"


def test_one_file_too_small_for_its_limit_does_not_spoil_its_batch(photo: Image.Image) -> None:
    for name in ("a", "b", "c"):
        photo.save(f"{name}.png")
    Path("b.txt").write_text(os.urandom(200).hex())
    result = convert("a.png", "b.png", "c.png", "out/", "--max-bytes", 60, "--no-thumbnails")
    assert result.exit_code == 1 and "2 written, 1 failed" in result.stdout and "b.png" in result.stderr


def test_memory_is_bounded_by_what_is_in_flight(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "PIXELS_IN_FLIGHT", 3 * 192 * 128)
    photo.save("a.png")
    ahead = 0

    def written() -> int:
        return len(list(Path("out").glob("*.perco")))

    def tasks() -> Iterator[Task]:
        nonlocal ahead
        for k in range(12):
            ahead = max(ahead, k - written())
            yield Task(Path("a.png"), Path(f"out/{k}.perco"))

    for _ in batch.convert(tasks(), Settings(thumbnails=False)):
        pass
    assert written() == 12 and ahead <= 3 + batch.READERS


def test_breaking_off_leaves_no_thread_writing(photo: Image.Image) -> None:
    photo.save("a.png")
    tasks = [Task(Path("a.png"), Path(f"out/{k}.perco")) for k in range(100)]
    results = batch.convert(tasks, Settings(thumbnails=False))
    next(results)
    results.close()
    there = names("out")
    time.sleep(0.3)
    assert there == names("out") and 0 < len(there) < 100


def test_what_was_done_before_a_break_is_told(photo: Image.Image) -> None:
    photo.save("a.png")
    tasks = [Task(Path("a.png"), Path(f"out/{k}.perco")) for k in range(8)]
    told: list[batch.Result | batch.Thumbnailed] = []
    results = batch.convert(tasks, Settings(effort=0, thumbnails=False), told.append)
    told.append(next(results))
    wait_for(lambda: len(list(Path("out").glob("*.perco"))) > 2)
    results.close()
    assert sorted(done.task.target.name for done in told if isinstance(done, batch.Result)) == names("out")


def test_threads_that_cannot_be_started_are_told(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    photo.save("a.png")
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread is not first:
            raise RuntimeError("can't start new thread")
        start(thread)

    work = batch._Work([Task(Path("a.png"), Path("a.perco"))], Settings())
    first = work._writers[0]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(NotEnoughMemory, match="threads cannot be started"):
        list(work.results())
    work.stop()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_and_going_on(
    number: signal.Signals, code: int, photo: Image.Image, started: Callable[..., subprocess.Popen[str]]
) -> None:
    Path("in").mkdir()
    for k in range(60):
        photo.resize((768, 512)).save(f"in/{k:02}.jpg")
    process = started("in", "out", "--no-thumbnails")
    wait_for(lambda: Path("out").is_dir() and len(list(Path("out").glob("*.perco"))) > 0)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code and "--skip-existing" in said
    there = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert 0 < len(there) < 60 and all(path.suffix == ".perco" for path in there)
    for path in list(Path("in").iterdir()):
        if int(path.stem) > 55 or Path("out", path.stem + ".perco") in there:
            continue
        path.unlink()
    result = convert("in", "out", "--skip-existing", "--no-thumbnails")
    assert result.exit_code == 0 and f"{len(there)} skipped" in result.stdout
    assert all(path.read_bytes() == data for path, data in there.items())


def test_an_interrupt_while_torch_is_imported(
    photo: Image.Image, started: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save("a.jpg")
    Path("slow/torch").mkdir(parents=True)
    Path("slow/torch/__init__.py").write_text("open('importing', 'w').close()\nimport time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", "slow")
    process = started("a.jpg", "out/")
    wait_for(lambda: Path("importing").exists())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not Path("out").exists() or names("out") == []


def test_a_watched_folder_with_a_slow_writer(photo: Image.Image, started: Callable[..., subprocess.Popen[str]]) -> None:
    Path("in").mkdir()
    photo.save("in/early.png")
    if watch.is_being_written(Path("in/early.png")) is None:
        pytest.skip("the file system does not tell who has a file open for writing")
    data = Path("in/early.png").read_bytes()
    with open("told", "w") as told:
        process = started("--watch", "in", "out", "--no-thumbnails", "--json", stdout=told)
    with open("in/slow.png", "wb") as slow:
        # Long enough for anyone who only looks whether the file has stopped growing, and a whole picture at that.
        slow.write(data)
        slow.flush()
        wait_for(lambda: Path("out/early.perco").exists())
        time.sleep(4)
        assert not Path("out/slow.perco").exists()
        slow.write(b"more")
    wait_for(lambda: Path("out/slow.perco").exists())
    shutil.copy("in/early.png", "in/.part.png")
    Path("in/.part.png").rename("in/moved.png")
    wait_for(lambda: Path("out/moved.perco").exists())
    photo.save("in/early.jpg")
    wait_for(lambda: Path("told").read_text().count("\n") == 4)
    lines = [json.loads(line) for line in Path("told").read_text().splitlines()]
    assert [Path(line["source"]).name for line in lines] == ["early.png", "slow.png", "moved.png", "early.jpg"]
    assert lines[3]["status"] == "failed" and "would become the same file" in lines[3]["error"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert names("out") == ["early.perco", "moved.perco", "slow.perco"]


def test_a_name_that_leaves_no_room_for_the_suffix_fails_alone(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POLL_SECONDS", "REST", "SETTLED_SECONDS", "UNKNOWN_SECONDS"):
        monkeypatch.setattr(watch, name, 0)
    for folder in ("in", "out"):
        Path(folder).mkdir()
    photo.save("in/a.png")
    photo.save(f"in/{'x' * 251}.png")
    tasks = itertools.islice(watch.watch(Request(["in"], "out")), 2)
    found = [done for done in batch.convert(tasks, Settings(thumbnails=False)) if isinstance(done, batch.Result)]
    failed = [done.error for done in found if done.status == "failed"]
    assert names("out") == ["a.perco"] and len(failed) == 1 and os.strerror(errno.ENAMETOOLONG) in failed[0]


@pytest.mark.parametrize("name", ["in", "in[1]"])
def test_a_folder_that_vanishes_for_a_moment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("POLL_SECONDS", "REST", "SETTLED_SECONDS", "UNKNOWN_SECONDS"):
        monkeypatch.setattr(watch, constant, 0)
    rests = iter(range(40))

    def sleep(_: float) -> None:
        if next(rests, None) is None:
            raise InterruptedError

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    folder = Path(name)
    folder.mkdir()
    (folder / "a.png").touch()
    tasks = watch.watch(Request([name], "out"), "overwrite")
    assert next(tasks).source == folder / "a.png"
    for size in range(2):
        folder.rename("away")
        gone = next(tasks)
        assert gone.source == folder and "this folder cannot be read" in gone.problem
        Path("away").rename(folder)
        Path(folder, "b.png").write_bytes(bytes(size))
        assert next(tasks).source == folder / "b.png"
    folder.rename("away")
    next(tasks)
    with pytest.raises(InterruptedError):  # it was told once
        next(tasks)


def test_a_look_that_takes_long_is_followed_by_a_long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            raise InterruptedError

    times = iter([0.0, 0.01, 1.0, 3.0])
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(times), sleep=sleep))
    Path("in").mkdir()
    with pytest.raises(InterruptedError):
        next(watch.watch(Request(["in"], "out")))
    assert rests == [0.5, 20.0]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (BrokenPipeError(), []),
        (ModelUnavailable("there is none"), ["Error: there is none"]),
        (AssertionError("our fault"), ["AssertionError: our fault"]),  # below a traceback
    ],
)
def test_an_error_does_not_wait_for_the_networks(
    error: Exception, says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended, cli_convert._stoppable(cli_convert._Report(True, False, None)):
        raise error
    assert ended.value.code == 1 and capsys.readouterr().err.splitlines()[-1:] == says


def test_without_an_output_for_errors() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "gone.jpg", "out/"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1 and run.stdout == "1 failed\n"


def written_to(terminal: int) -> bytes:
    """All that comes to this end of a pseudo-terminal, until nobody has the other one; then it is closed, too."""
    written = b""
    with open(terminal, "rb", buffering=0) as ours, suppress(OSError):
        while part := ours.read(4096):
            written += part
    return written


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after this: of its codes, those that rich moves and erases by."""
    lines, row, column = [""], 0, 0
    for code, letter in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([^\x1b])", written):
        if letter == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter == "\r":
            column = 0
        elif letter:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
        elif code == "2K":
            lines[row] = ""
        elif code.endswith("A"):
            row -= int(code[:-1])
    return lines


def test_failures_in_a_watched_folder_stay_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with monkeypatch.context() as patch, open(theirs, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        report = cli_convert._Report(as_json=False, quiet=False, total=None)
        with report.progress:
            report.tell(Task(Path("bad.jpg"), Path("bad.perco")), "failed", error="no picture")
            report.tell(Task(Path("a.jpg"), Path("a.perco")), "written")
            report.thumbnailed(Path("a.perco"))
    assert [line for line in screen(written_to(ours).decode()) if line] == ["bad.jpg: no picture"]


def test_progress_in_a_terminal(photos: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, "in", "out", "--effort", "0"], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = written_to(ours)
    assert process.returncode == 1
    assert b"4/4" in shown and b"files" in shown and b"\x1b[" in shown


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may become another user")
def test_as_a_user_without_rights(photo: Image.Image, tmp_path: Path) -> None:
    home, shut = tmp_path / "home", tmp_path / "shut"
    home.mkdir()
    shut.mkdir()
    photo.save(home / "a.jpg")
    for path in (home, home / "a.jpg"):
        os.chown(path, 65534, 65534)
    # The interpreter of the tests may lie in a home that others may not enter.
    python = next((one for one in (sys.executable, "/usr/bin/python3") if _runs_for_others(one)), None)
    if python is None:
        pytest.skip("other users have no interpreter here that has what the tests have")
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": OUR_PATH}

    def run_as_nobody(*arguments: object) -> int:
        command = [python, "-m", "pillow_perco.cli", "convert", "--effort", "0", *map(str, arguments)]
        return subprocess.run(command, user=65534, group=65534, env=environment, cwd="/", check=False).returncode

    with reachable(tmp_path):
        assert run_as_nobody(home / "a.jpg", f"{home}/out/") == 0
        assert (home / "out" / "a.perco").stat().st_uid == 65534
        assert len(list((home / ".cache" / "thumbnails").rglob("*.png"))) == 4
        assert run_as_nobody(home / "a.jpg", shut / "x.perco") == 1
        closed = home / "closed"
        closed.mkdir(mode=0o700)
        assert run_as_nobody("-r", home, f"{home}/all/") == 1  # for one of its folders was not read
        assert {"a.perco"} <= {path.name for path in (home / "all").iterdir()}
    assert names(shut) == []


def _runs_for_others(python: str) -> bool:
    environment = {"PYTHONPATH": OUR_PATH}
    try:
        run = subprocess.run(
            [python, "-c", "import pillow_perco.cli, torch"], user=65534, env=environment, cwd="/", check=False
        )
    except OSError:
        return False
    return run.returncode == 0


def xmp_of(path: str) -> str:
    with Image.open(path) as image:
        found = image.info.get("xmp", b"")
    return found.decode() if isinstance(found, bytes) else str(found)


@pytest.mark.parametrize("target", ["b.jpg", "b.png", "b.webp", "b.tif", "b.avif"])
@pytest.mark.parametrize("source", ["a.jpg", "a.tif"])
def test_metadata_in_every_format(source: str, target: str, photo: Image.Image) -> None:
    xmp = "<x:xmpmeta xmlns:x='adobe:ns:meta/' tiff:Orientation='1'>Käuzchen</x:xmpmeta>".replace("'", '"')
    exif = Image.Exif()
    exif[0x010E] = "a barn owl"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    if source.endswith("tif"):
        exif[700] = xmp.encode()
    photo.save(source, exif=exif.tobytes(), xmp=xmp.encode())
    assert convert(source, "a.perco", "--keep-metadata").exit_code == 0
    assert convert("a.perco", target, "--keep-metadata").exit_code == 0
    with Image.open(target) as image:
        kept = image.getexif()
        assert image.size == (192, 128) and kept[0x010E] == "a barn owl"
        assert kept.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
    assert "Käuzchen" in xmp_of(target)
    with Image.open("a.perco") as image:
        assert {0x0100, 0x0111, 0x0117}.isdisjoint(image.getexif())  # where the bytes of a TIFF file were
        image.save("c.jpg", exif=image.info["exif"])
    with Image.open("c.jpg") as image:
        assert image.getexif()[0x010E] == "a barn owl"


def test_sources_of_several_frames_are_kept(photo: Image.Image) -> None:
    photo.save("a.gif", save_all=True, append_images=[photo.rotate(90)])
    result = convert("a.gif", "out/", "--delete-source")
    assert result.exit_code == 1 and "2 frames" in result.stderr and Path("a.gif").exists()
    assert "it was not converted; leave --delete-source out" in result.stderr
    assert convert("a.gif", "out/").exit_code == 0 and names("out") == ["a.perco"]


def test_what_comes_meanwhile_is_not_replaced(photo: Image.Image) -> None:
    photo.save("a.png")
    tasks = [Task(Path("a.png"), Path("a.perco"))]
    Path("a.perco").write_bytes(b"precious")
    (done,) = batch.convert(tasks, Settings(thumbnails=False))
    assert isinstance(done, batch.Result) and "is there already" in done.error
    assert Path("a.perco").read_bytes() == b"precious"


@pytest.mark.parametrize(("skip", "status"), [(False, "failed"), (True, "skipped")])
def test_what_comes_at_the_last_moment_is_not_replaced(
    skip: bool, status: str, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save("a.png")
    tasks = [Task(Path("a.png"), Path("a.perco"))]
    monkeypatch.setattr(os, "fsync", lambda _: Path("a.perco").write_bytes(b"precious"))
    settings = Settings(effort=0, thumbnails=False, skip_existing=skip, delete_source=True)
    (done,) = batch.convert(tasks, settings)
    assert isinstance(done, batch.Result) and done.status == status
    assert ("--overwrite replaces it" in done.error) != skip
    assert Path("a.perco").read_bytes() == b"precious" and names(".") == ["a.perco", "a.png"]
    monkeypatch.setattr(batch_files, "read_photo", lambda *_: pytest.fail("it was read"))
    (done,) = batch.convert(tasks, settings)
    assert isinstance(done, batch.Result) and done.status == status


def test_two_names_of_one_file_are_not_written_one_over_the_other(photo: Image.Image) -> None:
    """As A.perco and a.perco are on some file systems; here, by a link that comes between the two."""
    for name in ("a.png", "b.png"):
        photo.save(name)

    def tasks() -> Iterator[Task]:
        yield Task(Path("a.png"), Path("a.perco"))
        wait_for(lambda: Path("a.perco").exists() and not Path("a.png").exists())
        Path("b.perco").hardlink_to("a.perco")
        yield Task(Path("b.png"), Path("b.perco"))

    found = list(batch.convert(tasks(), Settings(thumbnails=False, overwrite=True, delete_source=True)))
    assert sorted(done.error for done in found if isinstance(done, batch.Result)) == [
        "", "it would become the same file as a.png: rename one of them",
    ]  # fmt: skip
    assert Path("b.png").exists()


def test_captions_with_a_mark_before_them(photo: Image.Image) -> None:
    photo.save("a.png")
    Path("a.txt").write_text("a barn owl\n", encoding="utf-8-sig")
    photo.save("b.png")
    Path("b.txt").write_bytes("Käuzchen".encode("latin-1"))
    result = convert("a.png", "b.png", "out/")
    assert result.exit_code == 1 and "b.txt is not in UTF-8" in result.stderr and names("out") == ["a.perco"]
    Path("b.txt").write_text("x" * 4097)
    result = convert("b.png", "out/")
    assert result.exit_code == 1 and "b.txt has more than 4096 bytes" in result.stderr
    assert "--no-sidecars" in result.stderr and convert("b.png", "out/", "--no-sidecars").exit_code == 0
    Path("out/b.perco").unlink()
    with Image.open("out/a.perco") as image:
        assert image.info["perco"]["caption"] == "a barn owl"


def test_a_link_to_what_is_not_there_yet(photo: Image.Image) -> None:
    photo.save("a.png")
    Path("a.perco").symlink_to("elsewhere.perco")
    assert convert("a.png", "a.perco", "--overwrite").exit_code == 0
    assert Path("a.perco").is_symlink() and Path("elsewhere.perco").stat().st_size > 20

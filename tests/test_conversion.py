"""What a conversion is to do: names, trees, directions, and what is refused before anything is written."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from perco_engine.conversion import Request, plan
from perco_engine.errors import ConversionError
from perco_engine.printable import printable


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jpg", "in/b.PNG", "in/notes.txt", "in/.hidden.jpg", "in/sub/c.jpg", "in/.cache/d.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def planned(*sources: str, out: str = "out", to: str | None = None, recursive: bool = False) -> list[tuple[str, str]]:
    return [(str(task.source), str(task.target)) for task in plan(Request(sources, out, to, recursive))]


def test_folders_files_and_globs(tree: Path) -> None:
    flat = [("in/a.jpg", "out/a.perco"), ("in/b.PNG", "out/b.perco")]
    assert planned("in") == planned("in/a.jpg", "in/b.PNG") == planned("in/[ab].*") == flat
    assert planned("in", recursive=True) == [*flat, ("in/sub/c.jpg", "out/sub/c.perco")]
    assert planned("in/**/*.jpg") == [flat[0], ("in/sub/c.jpg", "out/sub/c.perco")]
    assert planned("in/a.jpg", "in/a.jpg", "in") == flat
    assert planned("in/a.jpg", out="x.perco") == [("in/a.jpg", "x.perco")]
    assert planned("in/a.jpg", out="x.perco/") == [("in/a.jpg", "x.perco/a.perco")]


def test_a_name_with_wildcards_that_is_there_is_a_file(tree: Path) -> None:
    Path("in/a[1].jpg").touch()
    Path("in/a1.jpg").touch()
    assert planned("in/a[1].jpg") == [("in/a[1].jpg", "out/a[1].perco")]


def test_names_do_not_pile_up_suffixes(tree: Path) -> None:
    for name in ("x/a.jpg.perco", "x/b.v2.perco", "y/c.perco.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert planned("x") == [("x/a.jpg.perco", "out/a.png"), ("x/b.v2.perco", "out/b.v2.png")]
    assert planned("x", to="JPG")[0] == ("x/a.jpg.perco", "out/a.jpg")
    assert planned("y") == [("y/c.perco.png", "out/c.perco")]


def test_the_direction_of_a_folder_with_both(tree: Path) -> None:
    Path("in/z.perco").touch()
    assert [source for source, _ in planned("in")] == ["in/a.jpg", "in/b.PNG"]
    assert planned("in", to="png") == [("in/z.perco", "out/z.png")]


def test_in_place_and_into_a_folder_below(tree: Path) -> None:
    assert planned("in", out="in")[0] == ("in/a.jpg", "in/a.perco")
    Path("in/out").mkdir()
    Path("in/out/e.jpg").touch()
    assert "in/out/e.jpg" not in [source for source, _ in planned("in", out="in/out", recursive=True)]


@pytest.mark.parametrize(
    ("sources", "options", "says"),
    [
        (["in/a.jpg", "in/a.png"], {}, "these would become one file: in/a.jpg and in/a.png"),
        (["in/b.PNG"], {"out": "other.jpg"}, "one of the two has to be a .perco file"),
        (["in/z.perco"], {"out": "in/z.perco"}, "is a .perco file already"),
        (["in/z.perco", "in/a.jpg"], {}, "say which to make, with --to"),
        (["in/z.perco", "in/../in/a.perco.jpg"], {"out": "in", "to": "perco"}, "already"),
        (["nothing*.jpg"], {}, "matches nothing"),
        (["empty"], {}, "nothing to convert"),
        (["in"], {"to": "docx"}, "cannot be written as .docx"),
        (["in"], {"out": "in/a.jpg"}, "is no folder"),
        (["in"], {"out": "new.perco"}, "is no folder"),
        (["in/a.jpg"], {"out": "new.pngg"}, "no picture format"),
        (["in/a.jpg"], {"out": "x.perco", "to": "png"}, "name one of them"),
    ],
)
def test_what_is_refused(tree: Path, sources: list[str], options: dict[str, str], says: str) -> None:
    Path("in/z.perco").touch()
    Path("in/a.png").touch()
    Path("empty").mkdir()
    with pytest.raises(ConversionError, match=re.escape(says)):
        planned(*sources, **options)  # type: ignore[arg-type]


def test_a_source_is_not_written_over_by_another_name(tree: Path) -> None:
    Path("in/x.perco").touch()
    Path("link.png").symlink_to("in/x.perco")
    with pytest.raises(ConversionError, match="would be written over"):
        planned("in/x.perco", out="link.png")


def test_names_as_text() -> None:
    assert printable("a\nb\x1b[2J") == "a\\nb\\x1b[2J"
    assert printable(os.fsdecode(b"\xff.jpg")) == "\\xff.jpg"
    assert printable("Käse #1 100%.jpg") == "Käse #1 100%.jpg"


def test_captions_beside_photos_are_no_sources(tree: Path) -> None:
    Path("in/a.txt").touch()
    assert planned("in/a*") == planned("in/a.txt", "in/a.jpg") == [("in/a.jpg", "out/a.perco")]
    assert planned("in/notes.txt") == [("in/notes.txt", "out/notes.txt.perco")]  # whose failure is told


def test_globs_do_not_go_round_in_circles(tree: Path) -> None:
    for link in ("loop", "again"):
        Path("in", link).symlink_to(".")
    assert planned("in/**/*.jpg") == [("in/a.jpg", "out/a.perco"), ("in/sub/c.jpg", "out/sub/c.perco")]
    assert planned("in/**/sub/**/*.jpg") == [("in/sub/c.jpg", "out/sub/c.perco")]
    nested = ("in/sub/c.jpg", "out/sub/c.perco")
    assert nested in planned("in/**", to="perco") and nested in planned("in/**", to="perco", recursive=True)
    assert nested in planned("in/*", to="perco", recursive=True)


def test_a_glob_of_folders_is_of_folders(tree: Path) -> None:
    assert planned("in/*/", recursive=True) == [("in/sub/c.jpg", "out/sub/c.perco")]
    with pytest.raises(ConversionError, match="nothing to convert"):
        planned("in/*/")
    assert planned("in/**/", recursive=True) == planned("in", recursive=True)


def test_a_glob_names_what_an_earlier_run_has_made(tree: Path) -> None:
    Path("in/a.perco").touch()
    both = ["in/a.jpg", "in/b.PNG", "in/a.perco"]
    assert planned(*both, out="in", to="perco") == [("in/a.jpg", "in/a.perco"), ("in/b.PNG", "in/b.perco")]
    Path("in/z.perco").touch()
    Path("in/z.png").touch()
    with pytest.raises(ConversionError, match=r"has to be a \.perco file"):  # z.png may be the original
        planned("in/z.png", "in/z.perco", out="in", to="png")
    with pytest.raises(ConversionError, match="say which to make"):  # a.perco may be the only original
        planned(*both, out="in")
    assert [task.problem for task in plan(Request(["in/gone.jpg", "in/z.perco.jpg"], "in", "perco"))] == [
        "there is no such file", "there is no such file",
    ]  # fmt: skip


def test_what_nobody_may_look_at_is_told_with_the_others(tree: Path) -> None:
    Path("in/loop.jpg").symlink_to("loop.jpg")
    tasks = plan(Request(["in/a.jpg", "in/loop.jpg", "in/typo.jpg", f"in/{'x' * 300}.jpg"], "out"))
    assert [task.problem for task in tasks[:3]] == ["", "", "there is no such file"]
    assert tasks[3].problem == f"{'x' * 300}.perco: {os.strerror(errno.ENAMETOOLONG)}"
    assert plan(Request(["in/typo.jpg"], "x.perco"))[0].problem == "there is no such file"


def test_targets_that_cannot_be_made_are_told_before(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems() -> list[str]:
        return [task.problem for task in plan(Request(["in"], "out", recursive=True))]

    assert problems() == ["", "", ""]
    Path("out").mkdir()
    Path("out/a.perco").touch()
    Path("out/sub").touch()
    assert problems() == ["", "", "out/sub is no folder"]
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    assert problems() == ["", "nothing can be written in the folder out", "out/sub is no folder"]
    Path("out/sub").unlink()
    assert problems()[2] == "nothing can be written in the folder out"


def test_mpo_files_are_photos(tree: Path) -> None:
    Path("in/d.MPO").touch()
    assert ("in/d.MPO", "out/d.perco") in planned("in")


def test_one_file_by_two_names(tree: Path) -> None:
    assert planned("in/a.jpg", str(Path("in/a.jpg").absolute()), "in/sub/../a.jpg") == [("in/a.jpg", "out/a.perco")]


def test_names_that_end_in_no_suffix_of_a_picture(tree: Path) -> None:
    Path("in/2024 10.30.15").touch()
    Path("in/2024 10.30.20").touch()
    assert [target for _, target in planned("in/2024*")] == ["out/2024 10.30.15.perco", "out/2024 10.30.20.perco"]


def test_a_format_by_its_other_name(tree: Path) -> None:
    Path("in/z.perco").touch()
    assert planned("in/z.perco", out="z.jpg", to="jpeg") == [("in/z.perco", "z.jpg")]


def test_a_folder_that_cannot_be_read_is_told_and_says_nothing_of_the_direction(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tree / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    (task,) = plan(Request([str(tree / "closed")], "out"))
    assert task.encodes and task.source == tree / "closed" and "cannot be read (Permission denied)" in task.problem
    tasks = plan(Request([str(tree)], "out/", recursive=True))
    assert [one.source.name for one in tasks if one.problem] == ["closed"] and len(tasks) > 1

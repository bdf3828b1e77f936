"""The arrows of the design, and that opening is free."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import perco_engine
import pillow_perco

ENGINE = Path(perco_engine.__file__).parent
PLUGIN = Path(pillow_perco.__file__).parent


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules that a source file names in import statements, relative ones resolved."""
    package = (
        [path.parent.parent.name, path.parent.name]
        if path.parent.parent.name in ("perco_engine",)
        else [path.parent.name]
    )
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", files(ENGINE), ids=lambda path: str(path.relative_to(ENGINE)))
def test_the_engine_knows_neither_the_plugin_nor_the_command_line(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"pillow_perco", "click"}


@pytest.mark.parametrize("path", files(ENGINE / "bitstream"), ids=lambda path: path.name)
def test_bytes_know_no_networks(path: Path) -> None:
    allowed = {"bitstream", "errors", "rates", "codes"}
    assert not {n for n in imports(path) if n.split(".")[0] in ("torch", "diffusers", "transformers", "PIL")}
    assert {n.split(".")[1] for n in imports(path) if n.startswith("perco_engine.")} <= allowed


@pytest.mark.parametrize("path", files(ENGINE / "models"), ids=lambda path: path.name)
def test_models_know_neither_bytes_nor_pipeline(path: Path) -> None:
    assert {n.split(".")[1] for n in imports(path) if n.startswith("perco_engine.")} <= {"models", "rates", "errors"}


@pytest.mark.parametrize("name", ["errors", "rates", "codes"])
def test_the_lowest_layer_imports_next_to_nothing(name: str) -> None:
    ours = {n for n in imports(ENGINE / f"{name}.py", top_level_only=True) if n.startswith("perco_engine")}
    assert not ours


@pytest.mark.parametrize(
    "path",
    [path for path in files(ENGINE) if path.parent.name not in ("training", "evaluation")],
    ids=lambda path: str(path.relative_to(ENGINE)),
)
def test_nothing_imports_training_or_evaluation(path: Path) -> None:
    assert not {name for name in imports(path) if {"training", "evaluation"} & set(name.split("."))}


@pytest.mark.parametrize(("one", "other"), [("training", "evaluation"), ("evaluation", "training")])
def test_training_and_evaluation_leave_each_other_alone(one: str, other: str) -> None:
    assert not {path.name: name for path in files(ENGINE / one) for name in imports(path) if other in name.split(".")}


def test_only_the_captioner_knows_caption_models_and_only_when_it_is_used() -> None:
    def knows(path: Path, **options: bool) -> bool:
        return any("Blip2For" in name or "ImageTextToText" in name for name in imports(path, **options))

    assert [path.name for path in files(ENGINE, PLUGIN) if knows(path)] == ["captioner.py"]
    assert not knows(ENGINE / "captioner.py", top_level_only=True)


def test_no_module_has_two_ideas_in_it() -> None:
    assert {path.name: n for path in files(ENGINE, PLUGIN) if (n := len(path.read_text().splitlines())) > 450} == {}
    assert not [path for path in files(ENGINE, PLUGIN) if path.stem in ("utils", "helpers", "misc")]


def test_importing_and_opening_leave_torch_alone(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    photo.save(path, caption="a barn owl")
    code = (
        "import sys, pillow_perco\nfrom PIL import Image\n"
        "image = Image.open(sys.argv[1])\n"
        "assert image.size == (192, 128) and image.info['perco']['caption'] == 'a barn owl'\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'torchac', 'numpy'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_reading_a_photo_leaves_torch_alone() -> None:
    code = (
        "import sys\nfrom PIL import Image\nfrom perco_engine.picture_files import read_photo\n"
        "with Image.open(sys.argv[1]) as opened:\n    assert read_photo(opened, True).image.mode == 'RGB'\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, PLUGIN / "demo.jpg"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {path.parent for path in files(ENGINE, PLUGIN) if path.name == "__init__.py"}
    named = {".".join(folder.relative_to(ENGINE.parent).parts) for folder in found}
    assert set(settings["packages"]) == named | {"pillow_perco.integrations"}


def test_public_names() -> None:
    assert perco_engine.__all__ == [
        "Codes", "Engine", "FamilyEngine", "Metadata", "PercoError", "PercoPipeline", "__version__", "get_engine",
    ]  # fmt: skip
    assert pillow_perco.__all__ == ["OpenerOptions", "__version__", "register_perco_opener", "save"]
    for module in (perco_engine, pillow_perco):
        assert all(getattr(module, name) is not None for name in module.__all__)

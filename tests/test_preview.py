"""Small pictures without torch: held against the pipeline that decodes them with it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pillow_perco  # noqa: F401
from perco_engine import get_engine, preview, preview_networks, weights
from perco_engine.errors import (
    BitstreamError,
    InvalidModel,
    LimitExceeded,
    NotFinite,
    PreviewUnavailable,
    UnsupportedRatePoint,
)
from perco_engine.model_folder import load_component
from perco_engine.store import install, preview_colours

PUBLISHED = Path(__file__).parent / "parity" / "pipeline_tiny" / "pipeline"


def reference(model: str | Path, data: bytes, reduction: int) -> np.ndarray:
    """What the pipeline decodes, (rows, columns, 3) in 0..255, not rounded."""
    engine = get_engine(model, "cpu")
    codes = engine.codes(data)
    indices = [torch.from_numpy(grid)[None] for grid in codes.indices]
    small = engine.pipeline.decode_preview(indices, codes.height_px, codes.width_px, reduction)
    return np.asarray(small[0].permute(1, 2, 0) * 255)


@pytest.mark.parametrize("size", [(192, 128), (101, 77), (8, 9), (1, 1)])
@pytest.mark.parametrize("bpp", [0.002, 0.03, 0.13])
def test_it_is_what_the_pipeline_decodes(photo: Image.Image, size: tuple[int, int], bpp: float) -> None:
    data = get_engine().encode(photo.resize(size), bpp=bpp)
    for reduction in (2, 4, 8):
        ours = np.asarray(preview.decode(data, reduction), np.float32)
        theirs = reference("embedded", data, reduction)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 0.6  # rounding to whole levels is 0.5 of it


def test_other_ladders_have_other_shapes(tiny_model: Path, photo: Image.Image) -> None:
    data = get_engine(tiny_model, "cpu").encode(photo)
    for reduction in (2, 4, 8):
        ours = np.asarray(preview.decode(data, reduction), np.float32)
        assert np.abs(ours - reference(tiny_model, data, reduction)).max() < 0.6


def test_a_render_has_the_right_shape_and_is_never_enlarged(photo: Image.Image) -> None:
    data = get_engine().encode(photo)
    assert preview.render(data, 64).size == (64, 43)
    assert preview.render(data, 1024).size == (192, 128)
    assert preview.render(get_engine().encode(photo.resize((300, 2))), 100).size == (100, 1)


def test_a_render_looks_like_the_picture(photo: Image.Image) -> None:
    engine = get_engine()
    data = engine.encode(photo, bpp=0.13)
    decoded = np.asarray(engine.decode(data).resize((96, 64), Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(preview.render(data, 96), np.float32) - decoded).mean() < 6


def test_networks_of_large_pictures_run_coarsely(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for places to be fitted in, and the right picture outside of them too."""
    wide = photo.resize((1600, 200), Image.Resampling.BICUBIC)
    data = get_engine().encode(wide, bpp=0.13)
    latents = 200 * 25
    maker = preview.previewer(weights.find("embedded"))
    exact = np.asarray(preview.render(data, 100), np.float32)
    for most, halvings, nearness in ((5e9, 0, 0), (3e9, 1, 9), (1e9, 2, 20)):
        monkeypatch.setattr(preview, "MOST_MULTIPLICATIONS", most)
        assert maker._halvings(5, latents) == halvings
        error = np.abs(np.asarray(preview.render(data, 100), np.float32) - exact).mean()
        assert error <= nearness
    assert maker._halvings(5, 10**9) == preview.COARSEST


def test_opacity(photo: Image.Image) -> None:
    see_through = photo.convert("RGBA")
    see_through.paste((0, 0, 0, 0), (0, 0, 96, 128))
    data = get_engine().encode(see_through)
    for picture in (preview.render(data, 96), preview.decode(data, 2)):
        assert picture.mode == "RGBA" and picture.size == (96, 64)
        alpha = np.asarray(picture.getchannel("A"))
        assert alpha[:, :40].max() < 16 and alpha[:, 56:].min() > 239


def test_what_is_too_large_is_refused(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data = get_engine().encode(photo)
    monkeypatch.setattr(preview, "MAX_PIXELS", 192 * 128 - 1)
    with pytest.raises(LimitExceeded, match="192x128"):
        preview.render(data, 64)
    monkeypatch.setattr(preview, "MOST_EXACT_PIXELS", 192 * 128 - 1)
    with pytest.raises(PreviewUnavailable):
        preview.decode(data, 2)


def test_truncated_files(photo: Image.Image) -> None:
    data = get_engine().encode(photo, bpp=0.13)
    with pytest.raises(BitstreamError):
        preview.decode(data[:-100], 2)
    assert preview.decode(data[:-100], 2, allow_truncated=True).size == (96, 64)


def test_draft_and_thumbnail_leave_torch_alone(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.perco"
    path.write_bytes(get_engine().encode(photo.resize((400, 300))))
    code = (
        "import sys, pillow_perco\nfrom PIL import Image\nimage = Image.open(sys.argv[1])\n"
        "image.thumbnail((64, 64))\nimage.save(sys.argv[2])\n"
        "print(image.size, sorted({'torch', 'diffusers'} & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "x.png"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "(64, 48) []"
    with Image.open(path) as whole:
        whole.load()
        expected = np.asarray(whole.resize((64, 48)), np.float32)
    with Image.open(tmp_path / "x.png") as small:
        assert np.abs(np.asarray(small, np.float32) - expected).mean() < 5


def test_colours_of_an_imported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    monkeypatch.setenv("PERCO_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_seen", {})  # other tests may have used the same weights where they lie
    installed = install.import_folder(PUBLISHED, name="tiny")
    colours = np.load(installed.folder / preview.COLOURS)
    assert colours.dtype == np.uint8 and colours.ndim == 2 and colours.shape[1] == 3
    assert installed.fingerprint == weights.fingerprint(PUBLISHED)  # which files name, and previews must not change
    data = get_engine("tiny", "cpu").encode(photo)
    assert preview.render(data, 64).size == (64, 43)
    with pytest.raises(PreviewUnavailable):
        preview.decode(data, 2)
    (installed.folder / preview.COLOURS).unlink()
    preview.previewer.cache_clear()
    with pytest.raises(PreviewUnavailable, match="import it again"):
        preview.render(data, 64)


def test_colours_are_of_what_the_autoencoder_decodes() -> None:
    """With random weights the codes say next to nothing of colours: at least their mean must be the decoded ones'."""
    vae = load_component(PUBLISHED, "vae", ["diffusers", "AutoencoderKL"], torch.float32)
    hyper_enc = load_component(PUBLISHED, "hyper_enc", ["", "ElicHyperEncoder"], torch.float32)
    colours = preview_colours.fit(vae, hyper_enc)
    noise = preview_colours.photo_like(4, vae.config.latent_channels, 32)
    with torch.no_grad():
        indices = hyper_enc(noise).indices
        decoded = vae.decode(noise / vae.config.scaling_factor).sample / 2 + 0.5
    assert (colours[indices].mean((0, 1, 2)) - decoded.mean((0, 2, 3))).abs().max() < 0.05


def test_the_fit_finds_an_affine_map() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    fitted = preview_colours.least_squares(x, 2 * x[:, :2] + 5)
    assert torch.allclose(fitted(torch.tensor([[1.0, -1.0, 9.0]])), torch.tensor([[7.0, 3.0]]), atol=0.03)


def test_a_file_of_another_rate_than_its_weights(photo: Image.Image, tmp_path: Path) -> None:
    model = replace(weights.find("embedded"), rate_point=1)
    data = get_engine().encode(photo, bpp=0.03)
    with pytest.raises(UnsupportedRatePoint, match=r"of 0\.03 bpp, and the weights that it names, .* 0\.008"):
        preview.Previewer(model).codes(data)
    assert preview.Previewer(replace(model, rate_point=2)).codes(data).rate_point == 2


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"cfg_ss": 64}', '{"cfg_ss": 0, "cfg_cs": 64}', '{"cfg_ss": 64, "cfg_cs": 0}', '{"a":' * 100_000,
        '{"cfg_ss": Infinity, "cfg_cs": 64}', '{"grids": 3}', '{"grids": []}', '{"grids": [[8]]}', None,
    ],
)  # fmt: skip
def test_a_hyper_encoder_without_a_rate_is_told(text: str | None, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "damaged"))
    config = folder / "hyper_enc" / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(InvalidModel, match=str(folder)):
        preview.Previewer(weights.Model("damaged", folder, 0))
    with pytest.raises(InvalidModel, match=str(folder)):
        preview_networks.PreviewNetworks(folder)


def test_weights_that_give_no_numbers_are_no_black_picture(
    tiny_model: Path, photo: Image.Image, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "damaged"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["synthesis.bias"][:] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    engine = get_engine(folder)
    data = engine.encode(photo)
    with pytest.raises(NotFinite, match="install the model's weights again"):
        preview.decode(data, 2)
    with pytest.raises(NotFinite, match="install the model's weights again"):
        preview.render(data, 64)
    with pytest.raises(NotFinite, match="decoder went out of the range"):
        engine.decode(data, max_size_px=60)

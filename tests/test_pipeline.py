"""PercoPipeline: parity with the reference, model folders, sizes, batches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from perco_engine import sampling
from perco_engine.choice import choose
from perco_engine.errors import InvalidModel, ModelUnavailable, NotFinite
from perco_engine.models.autoencoder import PatchAutoencoder
from perco_engine.models.ladder import HyperLadder
from perco_engine.models.unet import UNet2DConditionModel
from perco_engine.pipeline import PercoPipeline

PARITY = Path(__file__).parent / "parity" / "pipeline_tiny"
FOLDER = PARITY / "pipeline"


@pytest.fixture(scope="module")
def published() -> PercoPipeline:
    """A folder as the reference publishes it, with tiny components."""
    return PercoPipeline.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def textless() -> PercoPipeline:
    """Tiny random components of the embedded model's kinds."""
    torch.manual_seed(0)
    vae = PatchAutoencoder(latent_channels=4, width=20, depth=1)
    ladder = HyperLadder(latent_channels=4, grids=((64, 16), (16, 32)), width=8).eval()
    for module in ladder.modules():
        if hasattr(module, "initted"):  # codebooks that k-means would otherwise still have to fill
            torch.nn.init.normal_(module.embed)
            module.initted.fill_(True)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D", local_features_channels=5, add_local_features=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return PercoPipeline(
        vae.eval(), ladder, unet.eval(), scheduler, default_num_inference_steps=1, default_guidance_scale=1.0
    )


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(PARITY / "io.safetensors")
    return tensors


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    texts: list[str] = json.loads((PARITY / "io.json").read_text())["prompts"]
    return texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the published folder, to be spoilt."""
    shutil.copytree(FOLDER, tmp_path / "model")
    return tmp_path / "model"


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """Smooth random pictures (batch, 3, height, width) in -1..1."""
    coarse = torch.rand(batch, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_encoding_equals_the_reference(published: PercoPipeline, io: dict[str, Tensor]) -> None:
    image = io["image"] * 2 - 1
    close(published.encode_latents(image), io["latents"])
    indices = published.encode_image(image)
    assert len(indices) == 1
    assert torch.equal(indices[0], io["indices"].long())
    close(published.local_features(indices, 128, 192), io["z_hat"])


@torch.no_grad()
def test_text_equals_the_reference(published: PercoPipeline, io: dict[str, Tensor], prompts: list[str]) -> None:
    tokens = published.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokens, io["token_ids"].long())
    close(published.encode_prompt(prompts), io["text_embeds"])


@pytest.mark.parametrize(("steps", "guidance_scale"), [(20, 3.0), (5, 3.0), (5, 1.0)])
def test_decoding_equals_the_reference(
    published: PercoPipeline, io: dict[str, Tensor], prompts: list[str], steps: int, guidance_scale: float
) -> None:
    name = f"s{steps}_g{guidance_scale:.0f}"
    latents = published(
        prompt=prompts[0],
        local_features=io["z_hat"],
        height=128,
        width=192,
        latents=io[f"x_T_{name}"],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    close(latents, io[f"latents_0_{name}"], 1e-3)
    close(published.decode_latents(latents, 128, 192).permute(0, 2, 3, 1), io[f"decoded_{name}"], 1e-3)


def test_pndm_equals_the_reference(published: PercoPipeline, io: dict[str, Tensor], prompts: list[str]) -> None:
    scheduler = PNDMScheduler.from_config(published.scheduler.config, skip_prk_steps=True)
    pipeline = PercoPipeline(**{**published.components, "scheduler": scheduler})
    for _ in range(2):  # the scheduler's state must not outlive a call
        latents = pipeline(
            prompt=prompts[0], local_features=io["z_hat"], latents=io["x_T_s20_g3"], output_type="latent"
        ).images
        close(latents, io["latents_0_pndm_s20_g3"], 1e-3)


def test_a_published_folder_on_stable_diffusion_1_is_switched_to_v_prediction(
    io: dict[str, Tensor], prompts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(PARITY / "pipeline", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    stable_diffusion_1 = {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stable_diffusion_1))
    pipeline = PercoPipeline.from_pretrained(folder)
    latents = pipeline(
        prompt=prompts[0], local_features=io["z_hat"], latents=io["x_T_s20_g3"], output_type="latent"
    ).images
    close(latents, io["latents_0_pndm_s20_g3"], 1e-3)


def test_seeded_decoding_from_indices_equals_the_reference(
    published: PercoPipeline, io: dict[str, Tensor], prompts: list[str]
) -> None:
    seed = json.loads((PARITY / "io.json").read_text())["seed"]
    images = published.decode_indices(
        [io["indices"]], 128, 192, prompt=prompts[1], generator=generator(seed), output_type="np"
    )
    close(torch.from_numpy(images), io["decoded_seeded"], 1e-3)


@pytest.mark.parametrize("size", [(1, 1), (7, 65), (33, 31)])
def test_any_size(published: PercoPipeline, textless: PercoPipeline, size: tuple[int, int]) -> None:
    for pipeline in (published, textless):
        indices = pipeline.encode_image(picture(*size))
        shapes = pipeline.hyper_enc.rate_points[-1].shapes(size[1], size[0])
        assert tuple(tuple(codes.shape[1:]) for codes in indices) == shapes
        (image,) = pipeline.decode_indices(indices, *size, num_inference_steps=1, generator=generator(0))
        assert isinstance(image, Image.Image)
        assert image.size == (size[1], size[0])


def test_padding_keeps_coarse_indices_on_their_squares(published: PercoPipeline) -> None:
    """One index of this model stands for 32 x 32 pixels, so 33 x 65 pixels are decoded as 64 x 96."""
    assert published.latent_size(33, 65) == (8, 12)
    assert published.encode_image(picture(33, 65))[0].shape == (1, 2, 3)


def test_a_batch_gives_what_each_picture_gives_alone(
    published: PercoPipeline, textless: PercoPipeline, prompts: list[str]
) -> None:
    for pipeline in (published, textless):
        images = picture(40, 56, batch=2)
        indices = pipeline.encode_image(images)
        options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
        together = pipeline.decode_indices(
            indices, 40, 56, prompt=prompts, generator=[generator(1), generator(2)], **options
        )
        for k in range(2):
            alone = pipeline.encode_image(images[k : k + 1])
            assert all(torch.equal(a, b[k : k + 1]) for a, b in zip(alone, indices, strict=True))
            decoded = pipeline.decode_indices(alone, 40, 56, prompt=prompts[k], generator=generator(k + 1), **options)
            close(decoded, together[k : k + 1])


def test_levels_of_a_ladder(textless: PercoPipeline) -> None:
    image = picture(48, 80)
    fine = textless.encode_image(image)
    coarse = textless.encode_image(image, level=0)
    assert [tuple(codes.shape) for codes in fine] == [(1, 1, 2), (1, 3, 5)]
    assert len(coarse) == 1
    assert torch.equal(coarse[0], fine[0])
    assert textless.local_features(coarse, 48, 80).shape == (1, 5, 6, 10)


def test_no_steps_decode_the_estimate(textless: PercoPipeline) -> None:
    features = textless.local_features(textless.encode_image(picture(20, 24)), 20, 24)
    options: dict[str, Any] = {"local_features": features, "height": 20, "width": 24, "num_inference_steps": 0}
    assert torch.equal(textless(output_type="latent", **options).images, features[:, :4])
    assert textless(output_type="np", **options).images.shape == (1, 20, 24, 3)


def test_the_same_seed_gives_the_same_picture_and_another_one_another(textless: PercoPipeline) -> None:
    indices = textless.encode_image(picture(32, 32))
    first, again, other = (
        np.asarray(textless.decode_indices(indices, 32, 32, num_inference_steps=2, generator=generator(seed))[0])
        for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_calls_that_do_not_fit(published: PercoPipeline, textless: PercoPipeline) -> None:
    features = torch.zeros(2, 320, 1, 1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"local_features": None}, "local_features"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": -1}, "from 0 to 999"),
        ({"num_inference_steps": 1.5}, "from 0 to 999"),
        ({"num_inference_steps": 1000}, "from 0 to 999"),  # one less than were trained: they are counted from 1 on
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_scale": float("inf")}, "guidance scale"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"prompt": ["a", "b", "c"]}, "3 prompts for 2"),
        ({"generator": [generator(0)]}, "1 generators for 2"),
        ({"latents": torch.zeros(2, 4, 5, 4), "height": 32, "width": 32}, "latents"),
        ({"height": 0, "width": 32}, "1x1"),
        ({"height": 33, "width": 32}, "32x33 pixels have 2 x 1 local features, not 1 x 1"),
        ({"local_features": torch.zeros(2, 5, 1, 1)}, r"shape \(b, 320, r, c\), not \(2, 5, 1, 1\)"),
        ({"local_features": torch.zeros(320, 1, 1)}, r"shape \(b, 320, r, c\), not \(320, 1, 1\)"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            published(**{"local_features": features, "num_inference_steps": 1, **options})
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        published.encode_image(torch.zeros(3, 8, 8))
    for level in (-1, 2, 1.0):
        with pytest.raises(ValueError, match="level must be an integer from 0 to 1"):
            textless.encode_image(picture(8, 8), level)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 grids"):
        textless.local_features([torch.zeros(1, 1, 1, dtype=torch.int64)] * 3, 8, 8)
    with pytest.raises(ValueError, match="shape"):
        published.local_features([torch.zeros(1, 2, 1, dtype=torch.int64)], 8, 8)
    with pytest.raises(ValueError, match="codebook"):
        published.local_features([torch.full((1, 1, 1), 999)], 8, 8)
    with pytest.raises(ValueError, match="together"):
        PercoPipeline(**{**published.components, "tokenizer": None})


def test_round_trip_of_a_text_model(published: PercoPipeline, io: dict[str, Tensor], tmp_path: Path) -> None:
    published.save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    again = PercoPipeline.from_pretrained(tmp_path)
    options: dict[str, Any] = {"prompt": "a river", "num_inference_steps": 2, "output_type": "pt"}
    first, second = (
        pipeline(local_features=io["z_hat"], generator=generator(1), **options).images
        for pipeline in (published, again)
    )
    close(first, second)


def test_round_trip_of_a_textless_model(textless: PercoPipeline, tmp_path: Path) -> None:
    textless.save_pretrained(tmp_path)
    again = PercoPipeline.from_pretrained(tmp_path)
    assert again.text_encoder is None
    assert again.tokenizer is None
    assert (again.config.default_num_inference_steps, again.config.default_guidance_scale) == (1, 1.0)
    image = picture(24, 40)
    indices = textless.encode_image(image)
    assert all(torch.equal(a, b) for a, b in zip(again.encode_image(image), indices, strict=True))
    first, second = (
        pipeline.decode_indices(indices, 24, 40, generator=generator(1), output_type="pt")
        for pipeline in (textless, again)
    )
    close(first, second)


def test_half_precision_weights_are_loaded_as_asked(published: PercoPipeline) -> None:
    assert all(p.dtype == torch.float32 for p in published.unet.parameters())  # float16 on disk
    pipeline = PercoPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16
    image = pipeline.decode_indices(
        pipeline.encode_image(picture(16, 16)), 16, 16, num_inference_steps=1, output_type="pt"
    )
    assert image.dtype == torch.float32


def test_loads_shards_without_accelerate_and_draws_no_progress_bar(
    published: PercoPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    published.save_pretrained(tmp_path, max_shard_size="500KB")
    monkeypatch.setattr("perco_engine.model_folder.is_accelerate_available", lambda: False)
    again = PercoPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(value, published.unet.state_dict()[key]) for key, value in again.unet.state_dict().items())
    assert capfd.readouterr() == ("", "")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def pickle_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()


def pickle_text_encoder(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), folder / "text_encoder" / "pytorch_model.bin")
    weights.unlink()


def truncate_weights(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled U-Net": (pickle_weights, "pickled"),
    "pickled text encoder": (pickle_text_encoder, "pickled"),
    "truncated weights": (truncate_weights, "cannot load"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "cannot read"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), "cannot read"),
    "index not an object": (lambda f: (f / "model_index.json").write_text("[]"), "JSON object"),
    "null component": (lambda f: edit_json(f / "model_index.json", hyper_enc=[None, None]), "names no hyper_enc"),
    "no tokenizer": (lambda f: edit_json(f / "model_index.json", tokenizer=None), "together"),
    "component of a wrong form": (lambda f: edit_json(f / "model_index.json", vae="AutoencoderKL"), "module, class"),
    "unknown class": (lambda f: edit_json(f / "model_index.json", vae=["os", "system"]), "does not know"),
    "wrong default": (lambda f: edit_json(f / "model_index.json", default_guidance_scale="3"), "guidance"),
    "missing component": (lambda f: shutil.rmtree(f / "vae"), "no folder vae"),
    "missing configuration": (lambda f: (f / "unet" / "config.json").unlink(), "cannot load"),
    "other shapes": (lambda f: edit_json(f / "hyper_enc" / "config.json", cfg_cs=64), "hyper_enc"),
    "other rate": (lambda f: edit_json(f / "hyper_enc" / "config.json", cfg_ss=64), "hyper_enc"),
    "too few layers": (lambda f: edit_json(f / "vae" / "config.json", layers_per_block=2), "do not fit"),
    "an adapter": (lambda f: (f / "text_encoder" / "adapter_config.json").write_text("{}"), "an adapter"),
    "weights elsewhere": (
        lambda f: edit_json(f / "text_encoder" / "config.json", transformers_weights="x"),
        "elsewhere",
    ),
    "other text encoder": (lambda f: edit_json(f / "text_encoder" / "config.json", num_hidden_layers=3), "do not fit"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_folder(folder: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(folder)
    with pytest.raises(InvalidModel, match=message):
        PercoPipeline.from_pretrained(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="no model folder"):
        PercoPipeline.from_pretrained(tmp_path / "nothing")


def test_small_pictures_have_one_tile(published: PercoPipeline, textless: PercoPipeline) -> None:
    assert (published.tile_latents, published.vae_tile_latents, published.overlap_latents) == (96, 96, 32)
    assert textless.tile_latents == 512


def test_large_pictures_go_in_tiles_that_stay_in_their_places(
    published: PercoPipeline, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures with captions of their own, in tiles of 96 pixels: together or alone, they are the same pictures.

    Tiles change what the networks see, so the result is not that of the whole; but near to it, as the codes lead both.
    """
    images = picture(96, 224, batch=2)
    indices = published.encode_image(images)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    generators = [generator(1), generator(2)]
    whole = published.decode_indices(indices, 96, 224, prompt=prompts, generator=generators, **options)
    monkeypatch.setattr(published, "tile_latents", 12)
    monkeypatch.setattr(published, "overlap_latents", 8)
    generators = [generator(1), generator(2)]
    tiled = published.decode_indices(indices, 96, 224, prompt=prompts, generator=generators, **options)
    monkeypatch.setattr("perco_engine.sampling.LATENTS_AT_ONCE", 1)  # one tile at a time
    for k in range(2):
        alone = published.decode_indices(
            [indices[0][k : k + 1]], 96, 224, prompt=prompts[k], generator=generator(k + 1), **options
        )
        close(alone, tiled[k : k + 1])
    difference = (tiled - whole).abs()
    assert difference.max() > 1e-3
    assert difference.mean() < 0.3 * (tiled - tiled.flip(-1)).abs().mean()


def test_tiles_that_would_cut_codes_are_refused(published: PercoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "tile_latents", 42)
    with pytest.raises(ValueError, match="multiples of 4"):
        published(local_features=torch.zeros(1, 320, 6, 6), num_inference_steps=1)


@torch.no_grad()
def test_the_autoencoder_s_tiles(published: PercoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a tile the plain autoencoder; beyond it the same latents each time, as near as random weights let them."""
    image = picture(128, 256)
    whole = published.encode_latents(image)
    close(whole, published.vae.encode(image).latent_dist.mean * 0.18215, 1e-6)
    decoded = published.decode_latents(whole, 128, 256)
    monkeypatch.setattr(published, "vae_tile_latents", 16)
    monkeypatch.setattr(published, "overlap_latents", 8)
    latents, again = published.encode_latents(image), published.encode_latents(image)
    assert torch.equal(latents, again)
    assert latents.shape == (1, 4, 16, 32)
    assert 0 < (latents - whole).abs().mean() < 0.35 * whole.std()
    tiled = published.decode_latents(whole, 122, 255)
    assert tiled.shape == (1, 3, 122, 255)
    assert (tiled - decoded[..., :122, :255]).abs().mean() < 0.35 * decoded.std()
    two = published.decode_latents(torch.cat([whole, whole.flip(-1)]), 128, 256)
    close(two[:1, :, :122, :255], tiled, 1e-5)


def test_captions_are_encoded_once(prompts: list[str]) -> None:
    pipeline = PercoPipeline.from_pretrained(FOLDER)
    encoded: list[int] = []
    pipeline.text_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    with torch.inference_mode():
        first = pipeline.encode_prompt([*prompts, prompts[0], ""])
    assert encoded == [1, 1, 1]
    assert torch.equal(pipeline.encode_prompt([prompts[0], ""]), first[[2, 3]])
    assert encoded == [1, 1, 1]
    assert not pipeline.encode_prompt(prompts).is_inference()
    pipeline.encode_prompt([f"caption {k}" for k in range(64)])
    pipeline.encode_prompt(["", "caption 0", "caption 63"])
    assert len(encoded) == 3 + 64
    pipeline.encode_prompt(prompts[:1])  # the one that was not used for longest had to go
    assert len(encoded) == 3 + 64 + 1


def test_whole_pictures_make_the_previews_where_there_is_no_shorter_way(
    published: PercoPipeline, prompts: list[str]
) -> None:
    indices = published.encode_image(picture(40, 56))
    options: dict[str, Any] = {"prompt": prompts[:1], "num_inference_steps": 1}
    whole = published.decode_indices(indices, 40, 56, generator=generator(3), output_type="pt", **options)
    preview = published.decode_preview(indices, 40, 56, 8, generator=generator(3), **options)
    close(preview, whole.unflatten(2, (5, 8)).unflatten(4, (7, 8)).mean((3, 5)))


def test_numbers_that_are_none_are_told(published: PercoPipeline, folder: Path) -> None:
    """Damaged weights, or 16 bits too few, would otherwise show black pictures and write codes of nothing."""
    pipeline = PercoPipeline.from_pretrained(folder)
    pipeline.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match=r"U-Net went out of the range of torch\.float32: install"):
        pipeline(local_features=torch.zeros(1, 320, 1, 1), num_inference_steps=1)
    next(iter(pipeline.hyper_enc.backbone.parameters())).data[0] = float("nan")
    with pytest.raises(NotFinite, match=r"hyper-encoder went out of the range"):
        pipeline.encode_image(picture(64, 64))
    pipeline.vae.to(torch.bfloat16).quant_conv.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match=r"encoder went out .* take dtype=torch\.float32, or install"):
        pipeline.encode_image(picture(64, 64))


def test_guidance_that_leads_out_of_the_range_of_numbers_blames_no_weights(
    published: PercoPipeline, prompts: list[str]
) -> None:
    with pytest.raises(NotFinite, match=r"guidance scale of 1e\+38 .* take a smaller one"):
        published(
            prompt=prompts[:1], local_features=torch.zeros(1, 320, 1, 1), num_inference_steps=2, guidance_scale=1e38
        )


def test_a_ladder_of_numbers_that_are_none_is_told() -> None:
    """The first code would be the nearest to all of them."""
    ladder = HyperLadder(4, [(8, 8)], width=32)
    ladder.levels[0].metric.fill_(float("inf"))
    with pytest.raises(NotFinite, match="hyper-encoder"):
        choose(ladder, None, torch.randn(1, 4, 8, 8), None)


def test_noise_is_what_it_is_whatever_torch_s_defaults_are() -> None:
    expected = sampling.draw_noise((2, 3), torch.Generator().manual_seed(7))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = sampling.draw_noise((2, 3), torch.Generator().manual_seed(7))
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)

"""PercoPipeline: a picture to the indices of its hyper-latent, and indices to a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .bitstream.prior import Prior
from .choice import choose
from .errors import InvalidModel, ModelUnavailable
from .latent_tiles import ATTENTION_TILE, CONVOLUTION_TILE, OVERLAP, LatentTiles
from .model_folder import OPTIONAL, load_folder, progress_bars_off
from .models.autoencoder import PatchAutoencoder
from .options import check_guidance_scale, whole_number
from .prompts import PromptEmbeddings
from .rates import LATENT_PX
from .sampling import check_finite, check_steps, denoise, draw_noise


class PercoPipeline(DiffusionPipeline):
    """A PerCo codec: the autoencoder, the hyper-encoder, the U-Net and its scheduler, and a text encoder if it has one.

        encode_image   picture ─> pad ─> vae.encode ─> latents ─> hyper_enc ─> indices
        decode_indices indices ─> hyper_enc.local_features ─> local features ──┐
                       caption ─> tokenizer ─> text_encoder ─> embeddings ───┐ │
                       generator ─> noise ─> scheduler ┌────────────────────────────┐
                                             latents ─>│ unet(latents, t, text, lf) │─> vae.decode ─> crop ─> picture
                                                   ^   └─────────────┬──────────────┘
                                                   └── scheduler <───┘  once a denoising step

    vae: AutoencoderKL (its posterior's mean is used: one picture gives one file) or PatchAutoencoder.
    hyper_enc: a HyperEncoder or a HyperLadder.       unet: a UNet2DConditionModel with local features.
    scheduler: DDIMScheduler or PNDMScheduler, of any prediction_type; never changed by a call, so calls may overlap.
    text_encoder, tokenizer: CLIP's, or both None: then captions are not looked at and there is no guidance.
    default_num_inference_steps, default_guidance_scale: what a call takes that does not say.

    Pictures have any size from 1x1: they are padded by repeating the last row and column to a multiple of 8 pixels
    (of the square that one index stands for, where the local features are coarser than the latents, so that the two
    grids stay aligned), and cropped after decoding.

    Large pictures go through the U-Net in tiles that are blended in every step (latent_tiles.py), and through
    AutoencoderKL in tiles and picture by picture, so that memory stays bounded.  Attributes, in latents a side:
    tile_latents (of the U-Net: 96, or 512 where it has no attention), vae_tile_latents (of AutoencoderKL: 96; the
    PatchAutoencoder cuts tiles of its own), overlap_latents (32).

    Raises ValueError for a text encoder without a tokenizer or the reverse, and for defaults out of range.

    Source: Careil et al., ICLR 2024 (arXiv 2310.10325), section 3; Körber et al., arXiv 2409.20255.
    """

    _optional_components: ClassVar[list[str]] = list(OPTIONAL)

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["hyper_enc"]  # small, and used by more than its forward

    def __init__(
        self,
        vae: Any,
        hyper_enc: Any,
        unet: Any,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        default_num_inference_steps: int = 20,
        default_guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("text_encoder and tokenizer go together: give both or neither")
        check_steps(default_num_inference_steps, unet, scheduler)
        check_guidance_scale(default_guidance_scale)
        self.register_modules(
            vae=vae,
            hyper_enc=hyper_enc,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps, default_guidance_scale=default_guidance_scale
        )
        self.set_progress_bar_config(disable=True)
        attends = any(isinstance(module, Attention) for module in unet.modules())
        self.tile_latents = ATTENTION_TILE if attends else CONVOLUTION_TILE
        self.vae_tile_latents = ATTENTION_TILE
        self.overlap_latents = OVERLAP
        if not isinstance(vae, PatchAutoencoder):
            vae.enable_slicing()
        self._embeddings = PromptEmbeddings(text_encoder, tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> Self:
        """Loads a model folder from this machine: our own, or one as the reference published it.

        Weights come from safetensors alone, and classes from COMPONENT_CLASSES alone, whatever modules the folder's
        model_index.json names.  A published folder's scheduler is switched to v-prediction where it is not yet.

        Raises ModelUnavailable where there is no such folder, InvalidModel where a component is missing, of a class
        that is not known, pickled, or has other weights than its configuration asks for.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelUnavailable(f"there is no model folder {folder}")
        loaded = load_folder(folder, torch_dtype)
        try:
            return cls(**loaded)
        except (TypeError, ValueError) as error:
            raise InvalidModel(f"{folder / 'model_index.json'}: {error}") from error

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str | None = None) -> None:
        """Writes a model folder that from_pretrained reads; weights as safetensors in the components' dtypes.

        Where the networks were loaded from is not written along.  Nor is the prior, which engines have and pipelines
        do not: copy prior/prior.safetensors (`bitstream.prior.PRIOR_FILE`) too, without which files are a third larger.

        max_shard_size: bytes, or as in "5GB", that no weights file is to exceed; None: diffusers' default.
        """
        with progress_bars_off():
            super().save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
        for file in Path(folder).glob("*/config.json"):
            config = json.loads(file.read_bytes())
            if "_name_or_path" in config:
                del config["_name_or_path"]
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The components that have weights, by name."""
        return {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}

    @property
    def padding_multiple_px(self) -> int:
        """What the sides of a picture are padded to a multiple of, in pixels."""
        return LATENT_PX * int(self.hyper_enc.downsampling_factor)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of a picture of height x width pixels.

        Raises ValueError unless both are at least 1.
        """
        if height < 1 or width < 1:
            raise ValueError(f"a picture has at least 1x1 pixels, not {width}x{height}")
        multiple = self.padding_multiple_px
        rows, columns = (math.ceil(side / multiple) * multiple // LATENT_PX for side in (height, width))
        return rows, columns

    @torch.no_grad()
    def encode_latents(self, image: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in -1..1 to scaled latents (b, c, *latent_size(h, w)); no randomness.

        Raises ValueError for another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"pictures must have the shape (b, 3, h, w), not {tuple(image.shape)}")
        image = self.pad(image.to(self._execution_device, self.vae.dtype))
        if isinstance(self.vae, PatchAutoencoder):
            latents: Tensor = self.vae.encode(image).latents
        else:
            rows, columns = self.latent_size(*image.shape[-2:])
            tiles = LatentTiles(rows, columns, self.vae_tile_latents, self.overlap_latents)
            latents = tiles.blend(lambda tile: self.vae.encode(tile).latent_dist.mean, image)
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    def pad(self, image: Tensor) -> Tensor:
        """Pictures (b, 3, h, w), the last row and column repeated, as the autoencoder takes them."""
        height, width = image.shape[-2:]
        rows, columns = self.latent_size(height, width)
        padding = (0, columns * LATENT_PX - width, 0, rows * LATENT_PX - height)
        return F.pad(image, padding, mode="replicate")

    @torch.no_grad()
    def encode_image(
        self, image: Tensor, level: int | None = None, prior: Prior | None = None, thrift: float = 1.0
    ) -> tuple[Tensor, ...]:
        """Pictures (b, 3, h, w) in -1..1 to the indices of their hyper-latent.

        level: index into hyper_enc.rate_points; None is the highest.
        prior: what files are written with: a ladder's coarsest codes are then chosen by its bits too (choice.py).
        thrift: how many times as much as usual a bit of a ladder's codes costs.

        Returns a tuple of grids (b, r_k, c_k) int64, coarse to fine, of the shapes that the rate point gives for w x h.

        Raises ValueError for pictures of another shape, and a level that there is not.
        """
        if level is not None:
            level = whole_number("level", level, 0, len(self.hyper_enc.rate_points) - 1)
        latents = self.encode_latents(image)
        check_finite(latents, "encoder", self.vae)
        latents = latents.to(self._execution_device, self.hyper_enc.dtype)
        indices = choose(self.hyper_enc, prior, latents, level, thrift=thrift)
        self.maybe_free_model_hooks()
        return indices

    @torch.no_grad()
    def local_features(self, indices: Sequence[Tensor], height: int, width: int) -> Tensor:
        """The local features of pictures of height x width pixels: the inverse of encode_image, up to the codebook.

        indices: grids (b, r_k, c_k) as encode_image returns them.

        Raises ValueError where an index is not in its codebook or a grid has another shape than its rate point gives.
        """
        point = next((p for p in self.hyper_enc.rate_points if len(p.grids) == len(indices)), None)
        if point is None:
            raise ValueError(f"this model has no rate point of {len(indices)} grids")
        for grid, shape, codes in zip(point.grids, point.shapes(width, height), indices, strict=True):
            if tuple(codes.shape[1:]) != shape:
                raise ValueError(f"a grid of codes has the shape {tuple(codes.shape[1:])} where {shape} is due")
            if codes.min() < 0 or codes.max() >= grid.codebook_size:
                raise ValueError(f"a code is outside of its codebook of {grid.codebook_size}")
        grids = tuple(codes.to(self._execution_device) for codes in indices)
        features: Tensor = self.hyper_enc.local_features(grids, self.latent_size(height, width))
        return features

    def decode_indices(self, indices: Sequence[Tensor], height: int, width: int, **options: Any) -> Any:
        """Indices, as encode_image returns them, to pictures of height x width pixels.

        options: those of a call (prompt, num_inference_steps, guidance_scale, generator, output_type, ...).
        """
        features = self.local_features(indices, height, width)
        return self(local_features=features, height=height, width=width, **options).images

    @torch.no_grad()
    def decode_preview(
        self, indices: Sequence[Tensor], height: int, width: int, reduction: int, **options: Any
    ) -> Tensor:
        """Indices to small pictures by the shortest way: the estimate in the local features, without the U-Net.

        reduction: 2, 4 or 8.  Returns (b, 3, ceil(height/reduction), ceil(width/reduction)) float32 in 0..1.
        Where the model has no estimate, or its autoencoder no such way, whole pictures are decoded, with the options
        of a call, and reduced.
        """
        if self.unet.config.add_local_features and isinstance(self.vae, PatchAutoencoder):
            features = self.local_features(indices, height, width)
            estimate = features[:, : self.unet.config.out_channels] / self.vae.config.scaling_factor
            sample = self.vae.decode_preview(estimate, reduction).float()
            check_finite(sample, "decoder", self.vae)
            self.maybe_free_model_hooks()
            small = sample[..., : -(-height // reduction), : -(-width // reduction)]
            preview: Tensor = (small / 2 + 0.5).clamp(0, 1)
            return preview
        whole = self.decode_indices(indices, height, width, **options, output_type="pt")
        reduced: Tensor = F.avg_pool2d(whole, reduction, ceil_mode=True, count_include_pad=False)
        return reduced

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Captions to text embeddings (b, tokens, cross_attention_dim), kept for the next call (prompts.py)."""
        return self._embeddings(prompts, self._execution_device).to(self.unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        local_features: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Decodes b pictures.

        prompt: a caption, for all pictures, or one for each; not looked at where the model has no text encoder.
        local_features: (b, channels, r, c).
        height, width: of the pictures, in pixels; by default those that the latents, or the local features, cover.
        latents: (b, c, *latent_size(height, width)), the pure noise to start from; by default drawn from `generator`.
        num_inference_steps: denoising steps; 0 decodes the estimate in the local features without the U-Net.
        guidance_scale: classifier-free guidance, in use above 1: the branch without text keeps the local features.
        generator: of the CPU, one for all pictures or one for each; a picture's own generator gives it the noise that
            it would get alone.
        output_type: "pil", "np" (b, h, w, 3) in 0..1, "pt" (b, 3, h, w) in 0..1, or "latent" (b, c, ...), not cropped.

        Returns `.images`.  Raises ValueError for arguments that do not fit each other or the model.
        """
        if local_features is None:
            raise ValueError("local_features are needed: a PerCo model decodes pictures, it does not invent them")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, not {output_type!r}")
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        steps = check_steps(steps, self.unet, self.scheduler)
        scale = check_guidance_scale(scale)
        channels = self.unet.config.local_features_channels
        if local_features.ndim != 4 or local_features.shape[1] != channels:
            raise ValueError(
                f"local features must have the shape (b, {channels}, r, c), not {tuple(local_features.shape)}"
            )
        batch_size = len(local_features)
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch_size:
            raise ValueError(f"{len(prompts)} prompts for {batch_size} pictures")
        if latents is not None:
            covered = [side * LATENT_PX for side in latents.shape[-2:]]
        else:
            covered = [side * self.padding_multiple_px for side in local_features.shape[-2:]]
        height = covered[0] if height is None else height
        width = covered[1] if width is None else width
        shape = (batch_size, self.unet.config.in_channels, *self.latent_size(height, width))
        factor = int(self.hyper_enc.downsampling_factor)
        if tuple(side * factor for side in local_features.shape[-2:]) != shape[-2:]:
            raise ValueError(
                f"{width}x{height} pixels have {shape[-2] // factor} x {shape[-1] // factor} local features, "
                f"not {' x '.join(map(str, local_features.shape[-2:]))}"
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")

        local_features = local_features.to(self._execution_device, self.unet.dtype)
        if steps == 0:
            estimate = local_features[:, : self.unet.config.out_channels]
            latents = F.interpolate(estimate, size=shape[-2:], mode="nearest")
        else:
            noise = draw_noise(shape, generator) if latents is None else latents
            text = None if self.text_encoder is None else self.encode_prompt(prompts)
            guided = text is not None and scale > 1
            without_text = self.encode_prompt([""] * batch_size) if guided else None
            latents = denoise(self, noise, local_features, text, without_text, steps, scale)
            check_finite(latents, "U-Net", self.unet)
        images: Any = latents
        if output_type != "latent":
            pictures = self.decode_latents(latents, height, width)
            check_finite(pictures, "decoder", self.vae)
            images = to_output(pictures, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def decode_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Scaled latents (b, c, *latent_size(height, width)) to pictures (b, 3, height, width) float32 in 0..1."""
        latents = latents.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor
        if isinstance(self.vae, PatchAutoencoder):
            sample = self.vae.decode(latents).sample
        else:
            tiles = LatentTiles(latents.shape[-2], latents.shape[-1], self.vae_tile_latents, self.overlap_latents)
            sample = tiles.blend(lambda tile: self.vae.decode(tile).sample, latents)
        pictures: Tensor = (sample[..., :height, :width].float() / 2 + 0.5).clamp(0, 1)
        return pictures


def to_output(pictures: Tensor, output_type: str) -> Any:
    """Pictures (b, 3, h, w) in 0..1 as "pt", "np" or "pil"."""
    if output_type == "pt":
        return pictures
    array = pictures.permute(0, 2, 3, 1).cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array

"""Photos that are coded while training: what they look like, and what they lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from ..errors import InvalidSettings, NotFinite
from ..picture_files import UNREADABLE
from ..pipeline import PercoPipeline
from ..prompts import embed
from ..tensors import to_tensor
from .captions import Captioned
from .journal import Journal
from .objective import PercoObjective, draw
from .photos import middle
from .settings import Data, FolderData, PercoSd, ValidationSettings, WebdatasetData
from .sources import Source, open_source

LEVELS = 8
"""Draws of noise, spread over its levels, that the loss of a photo is the mean of."""


def open_photos(when: ValidationSettings, data: Data) -> Source:
    """The photos that validation takes its own from.  Raises InvalidSettings where there are none."""
    if when.folder is not None:
        if not when.folder.is_dir():
            raise InvalidSettings(f"validation.folder: there is no folder {when.folder}")
        try:
            return open_source(FolderData(source="folder", folder=when.folder), "train")
        except InvalidSettings as error:
            raise InvalidSettings(f"validation.folder: there is no picture in {when.folder}") from error
    assert not isinstance(data, WebdatasetData)  # which needs a folder: settings.contradictions
    try:
        return open_source(data, "held-out")
    except InvalidSettings as error:
        raise InvalidSettings(f"validation: {error}; or name another folder in validation.folder") from error


class Validation:
    """A few photos, the same each time, with the same noise.

    photos: squares of the size that is trained on.
    """

    def __init__(self, when: ValidationSettings, photos: list[Image.Image], captions: list[str]) -> None:
        self.when, self.photos, self.captions = when, photos, captions

    @classmethod
    def of(cls, settings: PercoSd, captions: Captioned) -> Validation | None:
        """The first readable photos of the folder, or of the held-out ones.  Raises InvalidSettings without any."""
        when = settings.validation
        if when is None:
            return None
        source = open_photos(when, settings.data)
        photos, told = list[Image.Image](), list[str]()
        for number, name in enumerate(source.names):
            if len(photos) == when.photos:
                break
            try:
                photo, sidecar = middle(source.read(number), settings.resolution), source.sidecar(number)
            except UNREADABLE:
                continue
            # Another folder's photo may have the name of one that is trained on.
            key = name if when.folder is None else f"{when.folder.name}/{name}"
            photos.append(photo)
            told += captions([name], [sidecar], to_tensor([photo]), [key])
        if not photos:
            raise InvalidSettings("validation: none of the photos can be read")
        return cls(when, photos, told)

    @torch.no_grad()
    def run(
        self, pipeline: PercoPipeline, objective: PercoObjective, averaged: EMAModel | None,
        weights: list[nn.Parameter], accelerator: Any, journal: Journal, step: int,
    ) -> None:  # fmt: skip
        """Codes the photos with the averaged weights, if there are any, and tells of it.  Leaves no trace."""
        if averaged is not None:
            averaged.store(weights)
            averaged.copy_to(weights)
        objective.eval()
        try:
            with accelerator.autocast():
                pictures = [self._coded(pipeline, k) for k in range(len(self.photos))]
                losses = [self._loss(pipeline, objective, k, accelerator.device) for k in range(len(self.photos))]
        except NotFinite as error:
            journal.tell(f"step {step}: the photos of validation were not coded ({error})")
            return
        finally:
            objective.train()
            if averaged is not None:
                averaged.restore(weights)
        originals = [np.asarray(photo) for photo in self.photos]
        errors = [np.square(one.astype(float) - other).mean() for one, other in zip(pictures, originals, strict=True)]
        psnr = float(np.mean([10 * np.log10(255**2 / max(error, 1e-9)) for error in errors]))
        journal.write(step, {"psnr": psnr, "diffusion": float(np.mean(losses))}, "validation")
        sides = (np.concatenate(pair, axis=1) for pair in zip(originals, pictures, strict=True))
        journal.images(step, {f"validation/{k}": side for k, side in enumerate(sides)})

    def _coded(self, pipeline: PercoPipeline, number: int) -> np.ndarray:
        """A photo, encoded and decoded."""
        photo = self.photos[number]
        indices = pipeline.encode_image(to_tensor([photo]))
        (picture,) = pipeline.decode_indices(
            indices, photo.height, photo.width, prompt=self.captions[number],
            num_inference_steps=self.when.inference_steps, guidance_scale=self.when.guidance_scale,
            generator=torch.Generator().manual_seed(number),
        )  # fmt: skip
        return np.asarray(picture)

    def _loss(self, pipeline: PercoPipeline, objective: PercoObjective, number: int, device: torch.device) -> float:
        """A photo's denoising error, the mean over noise levels that are the same each time."""
        pixels = to_tensor([self.photos[number]]).to(device).repeat(LEVELS, 1, 1, 1)
        latents = pipeline.encode_latents(pixels).float()
        draws = draw([number * LEVELS + k for k in range(LEVELS)], latents.shape[1:])
        draws.level.copy_((torch.arange(LEVELS) + 0.5) / LEVELS)
        text: Tensor | None = None
        if pipeline.text_encoder is not None:
            text = embed(pipeline.text_encoder, pipeline.tokenizer, [self.captions[number]] * LEVELS, device).float()
        _, figures = objective(latents, text, draws.to(device), pixels)
        return float(figures["diffusion"])

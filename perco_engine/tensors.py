"""RGB pictures to what the networks take, and back."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as (b, 3, h, w) float32 in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in 0..1 as RGB pictures."""
    levels = (pixels * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]

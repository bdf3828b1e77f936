"""Writes the conformance cases anew, with the embedded model of this checkout.  See README.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perco_engine import bitstream, get_engine
from perco_engine.bitstream import Header
from perco_engine.codes import Metadata

HERE = Path(__file__).parent
PHOTO = HERE.parent.parent / "pillow_perco" / "demo.jpg"

CASES: dict[str, tuple[str, tuple[int, int, int, int], dict[str, Any]]] = {
    # name: purpose, the part of the demo photo (left, top, width, height), save options
    "lowest-rate": ("a plain file: 12 bytes beside the hyper-latent", (256, 0, 512, 512), {"bpp": 0.002}),
    "highest-rate": ("all six grids", (320, 64, 256, 192), {"bpp": 0.13}),
    "odd-size": ("sides that no grid divides", (320, 64, 203, 131), {"bpp": 0.03}),
    "one-pixel": ("the smallest picture", (100, 100, 1, 1), {"bpp": 0.13}),
    "one-row": ("an extreme aspect ratio", (0, 200, 700, 1), {"bpp": 0.008}),
    "caption-and-seed": ("a caption and an explicit seed", (320, 64, 256, 192),
                         {"bpp": 0.008, "caption": "A barn owl looks into the camera — 猫頭鷹", "seed": 77}),
    "metadata": ("EXIF, ICC and XMP blocks", (320, 64, 128, 128),
                 {"bpp": 0.008, "metadata": Metadata(b"MM\x00*\x00\x00\x00\x08" + bytes(6), b"profile" * 9, b"<x/>")}),
    "alpha": ("an opacity mask", (320, 64, 192, 128), {"bpp": 0.008}),
}  # fmt: skip


def describe(header: Header) -> dict[str, Any]:
    """What a header says, as JSON can hold it."""
    return {
        "registry_id": header.model.registry_id,
        "fingerprint": header.model.fingerprint.hex(),
        "width_px": header.width_px,
        "height_px": header.height_px,
        "rate_point": header.rate_point,
        "by_prior": header.by_prior,
        "seed": header.seed,
        "caption": header.caption,
        "exif": header.metadata.exif.hex(),
        "icc_profile": header.metadata.icc_profile.hex(),
        "xmp": header.metadata.xmp.hex(),
        "sizes_bytes": dict(header.sizes_bytes),
    }


def main() -> None:
    engine = get_engine()
    photo = Image.open(PHOTO).convert("RGB")
    for name, (purpose, (left, top, width, height), options) in CASES.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        image = photo.crop((left, top, left + width, top + height))
        if name == "alpha":
            image.putalpha(Image.radial_gradient("L").resize(image.size))
        data = engine.encode(image, effort=0, **options)
        (folder / "input.perco").write_bytes(data)
        (folder / "header.json").write_text(json.dumps(describe(bitstream.read_header(data)), indent=1) + "\n")
        np.savez_compressed(folder / "indices.npz", *engine.codes(data).indices)
        engine.decode(data).save(folder / "reference.png", optimize=True)
        case = {"purpose": purpose, "max_mean_difference": 0.5, "licence": "public domain (photo by Tim Sträter)"}
        (folder / "case.json").write_text(json.dumps(case, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

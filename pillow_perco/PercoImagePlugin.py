"""The Pillow plugin: .perco files open and save like any other picture.

Opening reads the header; the networks run when pixels are asked for.  Errors are translated here, once: a file of
another format is a SyntaxError (Pillow then tries its next plugin), everything else that is wrong with a file is an
OSError that says what to do, and a wrong value of a save parameter is a ValueError.
"""

import functools
import io
from dataclasses import dataclass, replace
from typing import IO, Any

from PIL import ExifTags, Image, ImageFile

from perco_engine.bitstream import Header, read_header
from perco_engine.bitstream.header import MAGIC
from perco_engine.codes import EXIF_PREFIX, MIME_TYPE, Metadata, is_of_other_pixels
from perco_engine.errors import InvalidModel, NotAPercoFile, PercoError, PreviewUnavailable, full_text
from perco_engine.files import read_perco
from perco_engine.options import check_guidance_scale, check_metadata, check_seed, whole_number

REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True)
class OpenerOptions:
    """How pixels are made; the same meanings and defaults as `Engine.decode`, and `get_engine` for the device.

    Raises ValueError for a wrong value; whether there is such a device is seen when pixels are asked for.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            whole_number("steps", self.steps, 0)
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.seed is not None:
            check_seed(self.seed)


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


class PercoImageFile(ImageFile.ImageFile):
    """A .perco file: size, mode and info from its header, pixels when they are asked for.

    `info["perco"]` tells what the file says: model, rate point and its nominal bpp, the real bits per pixel of the
    file, caption, seed, and how many bytes each part takes.
    """

    format = "PERCO"
    format_description = "PerCo perceptually compressed image"

    def __init__(self, *args: Any, options: OpenerOptions | None = None) -> None:
        self._options = options or OpenerOptions()
        super().__init__(*args)

    def _open(self) -> None:
        assert self.fp is not None
        self._file = read_perco(self.fp)
        try:
            header = read_header(self._file, allow_truncated=ImageFile.LOAD_TRUNCATED_IMAGES)
        except NotAPercoFile as error:
            raise SyntaxError(str(error)) from error
        except PercoError as error:
            raise OSError(str(error)) from error
        self._size = header.width_px, header.height_px
        self._full_size = self._size
        self._model, self._rate_point = header.model, header.rate_point
        self._mode = "RGBA" if header.has_alpha else "RGB"
        self.info["perco"] = describe(header, len(self._file))
        for name in ("exif", "icc_profile", "xmp"):
            if block := getattr(header.metadata, name):
                self.info[name] = EXIF_PREFIX + block if name == "exif" else block
        self._set_tile()

    def _set_tile(self) -> None:
        self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, self.mode)]

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Prepares a decode at 1/2, 1/4 or 1/8 of the size, if that leaves at least `size`: much faster."""
        if not self.tile or size is None or self.size != self._full_size:
            return None
        width, height = self.size
        scale = next((r for r in REDUCTIONS if width >= r * size[0] and height >= r * size[1]), 1)
        self._size = -(-width // scale), -(-height // scale)
        self._reduction = scale
        self._set_tile()
        return self.mode, (0, 0, width / scale, height / scale)

    def load_seek(self, pos: int) -> None:
        """Keeps Pillow from mapping the file into memory as if its bytes were pixels."""

    def load(self) -> Any:
        """Decodes the pixels on first use.  Raises OSError, with what to do, if the file or its model prevents that."""
        if self.tile:
            if self._im is not None:
                _ = self.im  # of a picture that was closed: raises, before seconds of work are spent on it
            size = self.size
            try:
                picture = self._decode_small() if size != self._full_size else None
                if picture is None:
                    picture = self._decode()
            except (PercoError, ValueError) as error:  # a ValueError: the opener's options are not for this model
                raise OSError(str(error)) from error
            except (RuntimeError, MemoryError) as error:
                raise OSError(
                    f"the networks failed: {full_text(error)}; decode at a smaller size, or on another device"
                ) from error
            if picture.size != size:
                picture = picture.resize(size)
            if picture.mode != self.mode:  # of a cut file whose opacity mask is broken
                picture = picture.convert(self.mode)
            if self.fp and self._exclusive_fp:
                self.fp.close()
            self.fp = io.BytesIO(picture.tobytes())
        return super().load()

    def _decode(self) -> Image.Image:
        """The picture, by the engine; where `draft` was called, not much larger than that."""
        from perco_engine.engine import get_engine_for

        options = self._options
        engine = get_engine_for(self._model, options.device, rate_point=self._rate_point)
        return engine.decode(
            self._file,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            max_size_px=max(self.size) if self.size != self._full_size else None,
            allow_truncated=ImageFile.LOAD_TRUNCATED_IMAGES,
        )

    def _decode_small(self) -> Image.Image | None:
        """The picture at the size that `draft` chose, without torch; None where only the engine can give it."""
        from perco_engine import preview

        try:
            return preview.decode(self._file, self._reduction, allow_truncated=ImageFile.LOAD_TRUNCATED_IMAGES)
        except (PreviewUnavailable, InvalidModel):
            return None


def describe(header: Header, size_bytes: int) -> dict[str, Any]:
    """What a header says, in plain values: the contents of `info["perco"]`."""
    from perco_engine import weights

    spec = weights.registered(header.model.registry_id)
    points = spec.rate_points if spec else ()
    registry_id = header.model.registry_id
    unregistered = f"unknown model number {registry_id}" if registry_id else header.model.fingerprint.hex()
    return {
        "model": spec.name if spec else unregistered,
        "width": header.width_px,
        "height": header.height_px,
        "rate_point": header.rate_point,
        "bpp": points[header.rate_point].bpp if header.rate_point < len(points) else None,
        "bits_per_pixel": 8 * size_bytes / (header.width_px * header.height_px),
        "caption": header.caption,
        "seed": header.seed,
        "bytes": {**header.sizes_bytes, "total": size_bytes},
    }


def encode(image: Image.Image, options: dict[str, Any]) -> bytes:
    """The picture as a .perco file, by the save parameters in `options`; those that are not ours are left alone.

    Raises ValueError for a wrong value, OSError if the model is not available.
    """
    from perco_engine import get_engine, pixels

    exif = options.get("exif") or b""
    if isinstance(found := options.get("exif"), Image.Exif):  # which counts its own tags alone, and not its blocks'
        others = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)
        exif = found.tobytes() if len(found) or any(map(found.get_ifd, others)) else b""
    xmp = options.get("xmp") or b""
    blocks = {
        "exif": exif.removeprefix(EXIF_PREFIX) if isinstance(exif, bytes) else exif,
        "icc_profile": options.get("icc_profile") or b"",
        "xmp": xmp.encode() if isinstance(xmp, str) else xmp,
    }
    metadata = check_metadata(Metadata(**blocks))
    caption = options.get("caption")
    if not isinstance(caption, str | None):
        raise ValueError(f"caption must be of type str, not {caption!r}")
    profile = metadata.icc_profile
    if is_of_other_pixels(profile):  # of what was grey, say, and is stored as RGB
        image, metadata = pixels.to_srgb(image, profile), replace(metadata, icc_profile=b"")
    try:
        engine = get_engine(options.get("model") or "embedded", options.get("device"))
        return engine.encode(
            image,
            bpp=options.get("bpp"),
            max_bytes=options.get("max_bytes"),
            caption=caption,
            captioner=options.get("captioner"),
            seed=options.get("seed"),
            effort=options.get("effort"),
            best_of=1 if options.get("best_of") is None else options["best_of"],
            alpha=True if options.get("alpha") is None else options["alpha"],
            metadata=metadata,
        )
    except ValueError:
        raise
    except PercoError as error:
        raise OSError(str(error)) from error
    except MemoryError as error:
        raise OSError("there is not enough memory to encode this picture: reduce it") from error
    except RuntimeError as error:
        raise OSError(f"the picture was not encoded: {error}") from error


def _save(image: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    # Taken away, where another thread that saves the same picture would find it, and keep it.  Before this is called
    # Pillow itself mixes up the options of threads that save one picture to paths: pillow_perco.save does not.
    options, image.encoderinfo = image.encoderinfo, {}
    fp.write(encode(image, options))


def register(options: OpenerOptions | None = None) -> None:
    """Registers the format with Pillow; again with other options: from then on those hold."""
    factory = functools.partial(PercoImageFile, options=options) if options else PercoImageFile
    Image.register_open(PercoImageFile.format, factory, _accept)
    Image.register_save(PercoImageFile.format, _save)
    Image.register_extension(PercoImageFile.format, ".perco")
    Image.register_mime(PercoImageFile.format, MIME_TYPE)


register()

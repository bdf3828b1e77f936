"""The files at both ends of a batch: what a picture is read from, and when that may be removed."""

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from . import files, picture_files
from .batch_networks import Item, Networks, Settings
from .bitstream import read_header
from .bitstream.chunks import MAX_CAPTION_BYTES
from .conversion import Task
from .printable import printable


def read_photo(task: Task, settings: Settings, take: Callable[[int], None]) -> Item:
    """A photo to encode.  take: is called with its pixels before they are decoded, and may wait until there is room.

    Raises OSError, ValueError, and whatever Pillow's plugins raise for what cannot be read.
    """
    state = _state(task.source)
    with Image.open(task.source) as opened:
        if opened.format == "PERCO":
            raise ValueError("this is a .perco file already, whatever its name says")
        # Of an MPO file the others are smaller copies, or for another eye.
        if settings.delete_source and opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
            raise ValueError(
                f"it has {frames} frames or pages, and a .perco file holds one: it was not converted; leave "
                f"--delete-source out to convert its first"
            )
        pixels = opened.width * opened.height
        take(pixels)
        photo = picture_files.read_photo(opened, settings.keep_metadata)
    caption = settings.caption
    if caption is None and settings.sidecars:
        caption = _sidecar_caption(task.source)
    size = photo.image.size
    return Item(task, pixels, size, state, size, photo.image, caption=caption, metadata=photo.metadata)


def _sidecar_caption(photo: Path) -> str | None:
    """The text beside a photo, if any.  Raises OSError, and ValueError for what no caption can be."""
    text = picture_files.sidecar_caption(photo)
    if text and len(text.encode()) > MAX_CAPTION_BYTES:
        named = printable(picture_files.sidecar(photo))
        raise ValueError(f"{named} has more than {MAX_CAPTION_BYTES} bytes: shorten this caption, or say --no-sidecars")
    return text


def read_perco(task: Task, take: Callable[[int], None]) -> Item:
    """A .perco file to decode.  take: as for a photo.  Raises OSError, BitstreamError."""
    state = _state(task.source)
    data = files.read_perco_file(task.source)
    header = read_header(data)
    size = header.width_px, header.height_px
    take(size[0] * size[1])
    key = (*size, header.model, header.rate_point)
    return Item(task, size[0] * size[1], size, state, key, data=data, metadata=header.metadata)


def _state(path: Path) -> os.stat_result:
    """Size and times of a file.  Raises OSError unless it is a regular one: others might never end."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError("this is no file")
    return state


def check_written(item: Item, networks: Networks) -> None:
    """Reads the target back from the disk.  Raises OSError unless it may take the source's place."""
    size = item.size
    try:
        written = item.task.target.read_bytes()
        if written == item.data and item.task.encodes:
            networks.check(written)
        elif written == item.data:
            with Image.open(io.BytesIO(written)) as picture:
                picture.load()
                size = picture.size
    except Exception as error:  # Pillow's plugins raise errors of many kinds
        raise OSError("written, but could not be read back: the source was kept") from error
    if written != item.data:
        raise OSError("what was written reads differently: the source was kept")
    if size != item.size:
        raise OSError(f"the written picture has {size[0]}x{size[1]} pixels: the source was kept")


def remove_source(item: Item) -> None:
    """Raises OSError where the source is gone already, was changed since it was read, or cannot be removed."""
    try:
        now = _state(item.task.source)
        if (now.st_size, now.st_mtime_ns) == (item.state.st_size, item.state.st_mtime_ns):
            item.task.source.unlink()
            return
    except FileNotFoundError as error:
        raise FileNotFoundError("written; the source is gone") from error
    except OSError as error:
        raise OSError(f"written; the source could not be removed ({error.strerror or error})") from error
    raise OSError("written; the source was changed meanwhile, and was kept")

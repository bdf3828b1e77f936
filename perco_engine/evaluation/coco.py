"""MS-COCO-30k, the set of the published numbers, as PerCo (SD) selects it.

Its list of file names is every third picture of train2017 in the order of the names, 30,000 of them, from
000000000009.jpg to 000000442539.jpg.  (So it was found to be where it was compared, at its beginning and its end.)
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import EvaluationError

COUNT = 30_000
EVERY = 3
LAST = "000000442539.jpg"


def select(annotations: Path, count: int = COUNT) -> dict[str, str]:
    """The file names of the selection, in order, and the caption of each that has the lowest number.

    annotations: MS-COCO's captions_train2017.json.

    Raises EvaluationError if it is not such a file, or 30,000 are asked for and the last is not the published one.
    """
    try:
        told = json.loads(annotations.read_bytes())
        names = {image["id"]: image["file_name"] for image in told["images"]}
        captions = {
            caption["image_id"]: caption["caption"].strip()
            for caption in sorted(told["annotations"], key=lambda caption: -caption["id"])
        }
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"{annotations} does not hold MS-COCO captions ({error!r})") from error
    chosen = sorted(names, key=lambda number: names[number])[::EVERY][:count]
    if count == COUNT and (len(chosen) < COUNT or names[chosen[-1]] != LAST):
        raise EvaluationError(
            f"{annotations} does not give MS-COCO-30k, whose last picture is {LAST}: take captions_train2017.json"
        )
    return {names[number]: captions.get(number, "") for number in chosen}


def gather(annotations: Path, photos: Path, out: Path, count: int = COUNT) -> Iterator[str]:
    """Puts the selection into the folder `out`: each photo (a hard link, or a copy), and its caption beside it as .txt.

    photos: the folder train2017.  Yields the name of each photo, and for one that is missing raises FileNotFoundError.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, caption in select(annotations, count).items():
        target = out / Path(name).name
        if not target.exists():
            try:
                os.link(photos / name, target)
            except FileNotFoundError:
                raise
            except OSError:  # another file system
                beside = target.with_name(target.name + ".partial")
                shutil.copyfile(photos / name, beside)
                beside.replace(target)
        target.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        yield name

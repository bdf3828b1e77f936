"""The captioner "tags": names of classes, what it says of a known picture, and of one that it is unsure of."""

import pytest
import torch
from PIL import Image, ImageDraw

from perco_engine import tags
from perco_engine.captioner import get_captioner
from perco_engine.engine import get_engine


@pytest.fixture(scope="module")
def crossword() -> Image.Image:
    image = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(image)
    for y in range(15):
        for x in range(15):
            black = (x * 7 + y * 3) % 5 == 0 or (x * y) % 7 == 3
            draw.rectangle((x * 20, y * 20, x * 20 + 19, y * 20 + 19), "black" if black else "white", "black")
    return image


def test_the_names_stand_where_the_network_has_them() -> None:
    names = tags.labels()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[24], names[918], names[999]) == (
        "tench", "great grey owl", "crossword puzzle", "toilet tissue",
    )  # fmt: skip


def test_what_is_probable_is_said() -> None:
    seen = torch.zeros(1000)
    seen[[24, 21, 7]] = torch.tensor([0.4, 0.3, 0.26])
    assert tags.caption(seen) == "great grey owl, kite"
    seen[21] = 0.1
    assert tags.caption(seen) == "great grey owl, cock"
    assert tags.caption(seen / 4) == "great grey owl"


def test_it_says_what_it_sees(crossword: Image.Image, capsys: pytest.CaptureFixture[str]) -> None:
    captioner = get_captioner("tags", "cpu")
    assert captioner == tags.TagCaptioner("cpu")
    assert captioner([crossword, crossword.convert("L").resize((500, 90))]) == ["crossword puzzle"] * 2
    assert captioner([]) == [] and capsys.readouterr().out == ""


def test_a_file_has_no_caption_unless_it_is_asked_for(crossword: Image.Image) -> None:
    from perco_engine import bitstream

    engine = get_engine()
    silent, told = engine.encode(crossword), engine.encode(crossword, captioner="tags")
    assert (bitstream.read_header(silent).caption, bitstream.read_header(told).caption) == ("", "crossword puzzle")

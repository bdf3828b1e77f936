"""The engine: batches, limits, the cache, and what it says when something is wrong."""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perco_engine import get_engine, lite0, rates, weights
from perco_engine.bitstream.header import checksum
from perco_engine.codes import Metadata
from perco_engine.devices import BUILDING, WeightsCache, best_device, best_dtype, budget_bytes, usable_device
from perco_engine.engine import Engine, _reduction
from perco_engine.errors import (
    BudgetTooSmall,
    InvalidModel,
    LimitExceeded,
    ModelUnavailable,
    NotFinite,
    TruncatedFile,
    UnsupportedRatePoint,
)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_batches_give_what_singles_give(photo: Image.Image, noise: Image.Image, tiny_model: Path) -> None:
    engine = get_engine(tiny_model)
    images = [photo, noise, photo.transpose(Image.Transpose.ROTATE_180), noise.convert("L")]
    together = engine.encode_batch(images, bpp=1)
    assert together == [engine.encode(image, bpp=1) for image in images]
    decoded = engine.decode_batch(together)
    assert [image.size for image in decoded] == [image.size for image in images]
    assert max(difference(a, engine.decode(b)) for a, b in zip(decoded, together, strict=True)) <= 1


def test_rates_of_one_batch_may_differ(photo: Image.Image, tiny_model: Path) -> None:
    engine = get_engine(tiny_model)
    files = [engine.encode(photo, bpp=point.bpp) for point in engine.rate_points]
    assert len({len(data) for data in files}) == 3
    for together, data in zip(engine.decode_batch(files), files, strict=True):
        assert difference(together, engine.decode(data)) <= 1


def test_the_seed_is_the_file_s_unless_another_is_asked_for(photo: Image.Image, tiny_model: Path) -> None:
    engine = get_engine(tiny_model)
    plain, seeded = engine.encode(photo), engine.encode(photo, seed=5)
    assert len(seeded) == len(plain) + 1
    assert engine.decode(plain, seed=5).tobytes() == engine.decode(seeded).tobytes() != engine.decode(plain).tobytes()


def test_best_of_stores_the_seed_of_the_nearest_picture(
    photo: Image.Image, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = get_engine(tiny_model)
    plain = engine.encode(photo, bpp=1)
    errors = [
        float(np.square(np.asarray(engine.decode(plain, seed=k), float) - np.asarray(photo, float)).mean())
        for k in range(16)
    ]
    data = engine.encode(photo, bpp=1, best_of=16)
    assert len(set(errors)) == 16
    assert engine.codes(data).seed == errors.index(min(errors)) > 0
    assert len(data) == len(plain) + 1
    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode_seeds", None)  # for no other seed would fit
        assert engine.encode(photo, bpp=1, best_of=16, max_bytes=len(plain)) == plain


def test_every_file_of_a_batch_may_have_its_own_seed(photo: Image.Image, tiny_model: Path) -> None:
    engine = get_engine(tiny_model)
    data = engine.encode(photo, bpp=1)
    both = engine.decode_batch([data, data], seed=[3, 4])
    assert [difference(picture, engine.decode(data, seed=k)) <= 1 for picture in both for k in (3, 4)] == [
        True, False, False, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="1 seeds for 2 files"):
        engine.decode_batch([data, data], seed=[3])


@pytest.mark.parametrize(
    "options", [{"best_of": 0}, {"best_of": 130}, {"best_of": True}, {"best_of": 2.0}, {"best_of": 2, "seed": 1}]
)
def test_wrong_best_of_is_a_value_error(options: dict[str, Any], photo: Image.Image, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="best_of"):
        get_engine(tiny_model).encode(photo, **options)


def test_codes_are_those_of_the_engine_s_own_model(photo: Image.Image, tiny_model: Path) -> None:
    engine = get_engine()
    with pytest.raises(ModelUnavailable, match=f"of another model, {tiny_model.name!r}"):
        engine.codes(get_engine(tiny_model).encode(photo, effort=0))
    data = bytearray(engine.encode(photo, effort=0))
    data[5] += 1
    with pytest.raises(ModelUnavailable, match="model number"):
        engine.codes(bytes(data[:-2]) + checksum(bytes(data[:-2])))


def test_max_size_px_is_the_longer_side(photo: Image.Image) -> None:
    engine = get_engine()
    data = engine.encode(photo.resize((640, 400)))
    assert [engine.decode(data, max_size_px=n).size for n in (640, 1000, 320, 100, 40, 1)] == [
        (640, 400), (640, 400), (320, 200), (100, 62), (40, 25), (1, 1),
    ]  # fmt: skip


def test_a_huge_picture_is_refused(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    engine = get_engine()
    data = engine.encode(photo)
    monkeypatch.setattr("perco_engine.engine.MAX_PIXELS", 192 * 128 - 1)
    with pytest.raises(LimitExceeded, match="MAX_PIXELS"):
        engine.decode(data)


def test_an_absurd_size_costs_nothing() -> None:
    body = b"\x93PCo\x14\x0a\xff\xfe\xff\xfe" + bytes(20)
    with pytest.raises(LimitExceeded):
        get_engine().decode(body + checksum(body))
    body = b"\x93PCo\x14\x0a\xff\xfe\x07\xff" + bytes(20)
    with pytest.raises(TruncatedFile):
        get_engine().decode(body + checksum(body))


def test_a_rate_point_that_the_model_does_not_have() -> None:
    body = b"\x93PCo\x17\x0a\x00\x07\x00\x07\x00"
    with pytest.raises(UnsupportedRatePoint, match="rate point 7"):
        get_engine().decode(body + checksum(body))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"steps": value}, "steps must be an integer of at least 0") for value in (-1, 1.5, True)),
        ({"steps": 1001}, "1000"), ({"max_size_px": 0}, "max_size_px must be an integer of at least 1"),
        ({"guidance_scale": -1.0}, "the guidance scale must be"),
        *(({"seed": value}, "seed must be an integer from 0") for value in (-3, 2**32, 2**70)),
    ],
)  # fmt: skip
def test_wrong_decode_options_are_value_errors(options: dict[str, float], says: str, photo: Image.Image) -> None:
    engine = get_engine()
    with pytest.raises(ValueError, match=says):
        engine.decode(engine.encode(photo), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": "no"}, "alpha must be of type bool"), ({"alpha": 0}, "alpha must be of type bool"),
        ({"metadata": {"exif": b""}}, "metadata must be of type Metadata"),
        ({"metadata": b"x"}, "metadata must be of type Metadata"),
        ({"metadata": Metadata(xmp="x")}, "xmp must be bytes"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_encode_options_are_told_before_the_networks_run(
    options: dict[str, Any], says: str, photo: Image.Image, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = get_engine(tiny_model)
    monkeypatch.setattr(engine, "indices", None)
    with pytest.raises(ValueError, match=says):
        engine.encode(photo, **options)


def test_what_is_no_picture_or_no_bytes_is_a_type_error(photo: Image.Image, tiny_model: Path) -> None:
    engine = get_engine(tiny_model)
    with pytest.raises(TypeError, match=r"one of Pillow's \(Image\.fromarray makes them\), not ndarray"):
        engine.encode(np.asarray(photo))  # type: ignore[arg-type]
    data = engine.encode(photo)
    expected = engine.decode(data).tobytes()
    for same in (bytearray(data), memoryview(data)):
        assert engine.decode(same).tobytes() == expected  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytes-like object is required, not 'str'"):
        engine.decode("x.perco")  # type: ignore[arg-type]


@pytest.mark.parametrize("bpp", [1.0, 1e16, 1e300, 10**30])
def test_more_bits_than_there_are_is_the_highest_rate(bpp: float) -> None:
    assert rates.nearest(rates.EMBEDDED, bpp) == 5


def test_nothing_fits_is_a_value_error_of_its_own(photo: Image.Image) -> None:
    with pytest.raises(BudgetTooSmall):
        get_engine().encode(photo, max_bytes=5)


def test_opacity_grows_coarser_before_the_picture_is_given_up(photo: Image.Image) -> None:
    engine = get_engine()
    image = photo.copy()
    image.putalpha(Image.radial_gradient("L").resize(photo.size))
    rich, poor = engine.encode(image), engine.encode(image, max_bytes=60)
    masks = [engine.codes(data).alpha for data in (rich, poor)]
    assert masks[0] is not None and masks[1] is not None
    assert masks[0].log2_scale == 3 < masks[1].log2_scale
    assert len(poor) <= 60


def test_a_coarser_mask_brings_the_levels_back(photo: Image.Image) -> None:
    engine, image = get_engine(), photo.copy()
    image.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192), np.uint8)))
    lowest = engine.encode(image, bpp=0.002)
    codes = engine.codes(engine.encode(image, max_bytes=len(lowest) - 1))
    assert codes.alpha is not None and codes.alpha.log2_scale == 4 and codes.rate_point == 1


def test_a_larger_budget_gives_no_lower_rate_and_no_coarser_mask(photo: Image.Image, tiny_model: Path) -> None:
    engine, image = get_engine(tiny_model), photo.copy()
    image.putalpha(Image.radial_gradient("L").resize(photo.size))
    found = []
    for budget in range(44, 400, 8):
        codes = engine.codes(engine.encode(image, max_bytes=budget, effort=0))
        assert codes.alpha is not None
        found.append((codes.rate_point, -codes.alpha.log2_scale))
    assert found == sorted(found)
    assert found[0] == (0, -6) and found[-1] == (2, -3) and (1, -3) in found
    assert (1, -6) not in found  # too coarse for one more level


def test_engines_are_loaded_once_even_from_several_threads(tiny_model: Path) -> None:
    cache = WeightsCache(budget_bytes=1 << 30)
    found: list[object] = []
    model = weights.find(tiny_model)
    load = functools.partial(Engine, model, torch.device("cpu"), torch.float32)
    threads = [threading.Thread(target=lambda: found.append(cache.get("tiny", load))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(engine) for engine in found}) == 1
    assert get_engine(tiny_model) is get_engine(tiny_model)


def test_two_models_that_are_loaded_at_once_leave_torch_as_it_was(tiny_model: Path) -> None:
    """diffusers, accelerate and transformers change it for the whole process while they build networks."""
    register, dtype = torch.nn.Module.register_parameter, torch.get_default_dtype()
    cpu, begin = torch.device("cpu"), threading.Barrier(3)
    failed: list[BaseException] = []

    def load(act: Callable[[], object]) -> None:
        try:
            begin.wait(60)
            act()
        except BaseException as error:
            failed.append(error)

    engines = [functools.partial(Engine, weights.find(name), cpu, torch.bfloat16) for name in (tiny_model, "embedded")]
    acts = [*engines, functools.partial(lite0._Network, cpu)]
    threads = [threading.Thread(target=load, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == [] and not any(thread.is_alive() for thread in threads)
    assert torch.nn.Module.register_parameter is register and torch.get_default_dtype() == dtype
    assert torch.nn.Linear(1, 1).weight.device == cpu


def ends_well(act: Callable[[], object]) -> bool:
    """Whether a process that is forked here does this, and gets something true from it."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if act() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def is_free() -> bool:
    """Whether another thread may build networks."""
    free = threading.Event()

    def build() -> None:
        with BUILDING:
            free.set()

    threading.Thread(target=build, daemon=True).start()
    return free.wait(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_waits_for_networks_that_another_thread_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, finish, built = threading.Event(), threading.Event(), threading.Event()

    def build() -> None:
        with BUILDING:
            begun.set()
            finish.wait(10)
            time.sleep(0.1)
            built.set()

    thread = threading.Thread(target=build)
    thread.start()
    begun.wait(10)
    monkeypatch.setattr("perco_engine.devices.FORK_WAITS_SECONDS", 0.01)
    assert ends_well(is_free) and not built.is_set()  # not for ever, for the builder may wait for the thread that forks
    monkeypatch.undo()
    finish.set()
    assert ends_well(lambda: built.is_set() and is_free())
    thread.join()
    assert is_free()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_thread_that_builds_networks_may_fork() -> None:
    with BUILDING:
        assert ends_well(is_free)
    assert is_free()
    try:
        with BUILDING:
            child = os.fork()
    finally:
        if not child:
            os._exit(sys.exc_info()[0] is not None or not is_free())
    assert os.waitpid(child, 0)[1] == 0 and is_free()


def test_the_engine_that_was_not_used_for_longest_goes_first(tiny_model: Path) -> None:
    model, cpu = weights.find(tiny_model), torch.device("cpu")
    cache = WeightsCache(budget_bytes=0)
    first = cache.get("first", lambda: Engine(model, cpu, torch.float32))
    size = first.size_bytes
    cache.budget_bytes = size
    second = cache.get("second", lambda: Engine(model, cpu, torch.bfloat16))
    assert cache.size_bytes == second.size_bytes
    assert cache.get("first", lambda: Engine(model, cpu, torch.float32)) is not first
    cache.clear()
    assert cache.size_bytes == 0


def test_a_model_that_takes_long_to_load_keeps_nobody_waiting(tiny_model: Path) -> None:
    cache, started, finish = WeightsCache(budget_bytes=1 << 30), threading.Event(), threading.Event()
    engine = get_engine(tiny_model)

    def load_slowly() -> Engine:
        started.set()
        assert finish.wait(10)
        return engine

    slow = threading.Thread(target=lambda: cache.get("slow", load_slowly))
    slow.start()
    assert started.wait(10)
    assert cache.get("fast", lambda: engine) is engine and cache.size_bytes == engine.size_bytes
    finish.set()
    slow.join()
    assert cache.size_bytes == 2 * engine.size_bytes
    cache.drop("slow")
    cache.drop("never there")
    assert cache.size_bytes == engine.size_bytes


def test_bf16_shows_the_same_picture(photo: Image.Image) -> None:
    data = get_engine().encode(photo, bpp=0.17)
    engine = get_engine(dtype=torch.bfloat16)
    assert engine.dtype == engine.pipeline.unet.dtype == torch.bfloat16
    full, half = get_engine().decode(data), engine.decode(data)
    assert np.abs(np.asarray(full).astype(int) - np.asarray(half).astype(int)).mean() < 4


def test_devices_and_dtypes_that_cannot_be(tiny_model: Path) -> None:
    for device in ("toaster", "cuda:77", "meta"):
        with pytest.raises(ValueError, match=f"the device '{device}' cannot be used here .*leave it out"):
            get_engine(tiny_model, device)
    for dtype in ("float16", 3, torch.int8):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float16"):
            get_engine(tiny_model, dtype=dtype)  # type: ignore[arg-type]


def test_the_memory_budget_is_a_number() -> None:
    assert budget_bytes("8000000000") == 8_000_000_000
    with pytest.raises(ValueError, match="PERCO_MEMORY_BUDGET is a number of bytes"):
        budget_bytes("8GB")


def test_the_default_device_and_dtype() -> None:
    assert best_dtype(torch.device("cpu")) == torch.float32
    assert get_engine().device.type == best_device().type
    assert get_engine().device == usable_device(str(get_engine().device))


def test_model_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model_index\.json"):
        get_engine(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InvalidModel, match="vae"):
        get_engine(tmp_path)


def test_a_linked_component_has_the_fingerprint_of_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in tiny_model.iterdir():
        (linked / part.name).symlink_to(part)
    assert weights.fingerprint(linked) == weights.fingerprint(tiny_model)


def test_the_fingerprint_is_of_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copied = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    assert weights.find(copied).fingerprint == weights.find(tiny_model).fingerprint
    largest = max(copied.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"\x01")
    assert weights.fingerprint(copied) != weights.fingerprint(tiny_model)


def test_a_model_in_the_home_folder_is_found_by_its_fingerprint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    import shutil

    data = get_engine(tiny_model).encode(photo)
    monkeypatch.setattr(weights, "_seen", {})
    monkeypatch.setenv("PERCO_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="fingerprint"):
        get_engine().decode(data)
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    assert get_engine().decode(data).size == photo.size


def test_a_published_checkpoint_folder_is_a_model_like_any_other(photo: Image.Image) -> None:
    engine = get_engine(Path(__file__).parent / "parity" / "pipeline_tiny" / "pipeline")
    image = photo.resize((70, 45))
    data = engine.encode(image, caption="a river")
    assert len(engine.rate_points) == 1
    with_text, other_text = (engine.decode(d, steps=2) for d in (data, engine.encode(image, caption="a fox")))
    assert with_text.size == (70, 45)
    assert with_text.tobytes() != other_text.tobytes()
    assert engine.decode(data, steps=2, guidance_scale=1.0).tobytes() != with_text.tobytes()
    assert engine.decode(data, steps=2, max_size_px=20).size == (20, 13)
    assert get_engine().decode(data, steps=2).tobytes() == with_text.tobytes()
    with pytest.raises(ValueError, match="at least 1 denoising step"):
        engine.decode(data, steps=0)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [((4001, 3001), 2001, 2), ((4001, 3001), 2002, 1), ((4000, 3000), 2000, 2), ((100, 801), 101, 8), ((9, 9), 9, 1)],
)
def test_the_shortest_way_that_leaves_as_many_pixels_as_are_asked_for(
    size: tuple[int, int], most: int, expected: int
) -> None:
    assert _reduction(*size, most) == expected
    assert -(-max(size) // expected) >= most


def test_coarse_codes_of_numbers_that_are_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the prior helps to choose, too: the first code would be the nearest to all of them."""
    engine = get_engine()
    rung = engine.pipeline.hyper_enc.levels[0]
    monkeypatch.setattr(rung, "encode", lambda latents, _: torch.full_like(latents[..., ::8, ::8], torch.nan))
    with pytest.raises(NotFinite, match="hyper-encoder"):
        engine.encode(Image.new("RGB", (64, 64)), bpp=0.002, effort=0)

"""Memory on the device: whether a model fits, where its networks lie, and what is said when it did not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perco_engine import get_engine
from perco_engine.devices import weights_bytes
from perco_engine.engine import Engine
from perco_engine.errors import NotEnoughMemory, OffloadUnavailable
from perco_engine.memory import GIB, Placement, is_offloaded, is_out_of_memory, needs_offload, working_bytes
from perco_engine.pipeline import PercoPipeline

PUBLISHED = Path(__file__).parent / "parity" / "pipeline_tiny" / "pipeline"


def absurd(*_: Any) -> None:
    """Asks for a petabyte."""
    torch.empty(1 << 50)


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_offload_is_for_what_does_not_fit() -> None:
    assert not needs_offload(weights=2 * GIB, working=2 * GIB, free=4 * GIB)
    assert needs_offload(weights=2 * GIB, working=2 * GIB, free=4 * GIB - 1)


def test_what_a_model_needs() -> None:
    pipeline = PercoPipeline.from_pretrained(PUBLISHED)
    count = sum(
        p.numel() for name in ("unet", "vae", "hyper_enc", "text_encoder") for p in getattr(pipeline, name).parameters()
    )
    assert weights_bytes(*pipeline.networks.values()) == 4 * count
    assert working_bytes(pipeline) == 27 * 8 * 96 * 96 * 32 * 4 + GIB // 2
    pipeline.vae_tile_latents = 512  # now the autoencoder needs more than the U-Net
    assert working_bytes(pipeline) == int(6.1 * 4096 * 4096 * 16) * 4 + GIB // 2
    half = PercoPipeline.from_pretrained(PUBLISHED, torch.bfloat16)
    assert weights_bytes(*half.networks.values()) == 2 * count


def test_every_way_of_running_out_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        absurd()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
    for failed in ("create a memory object", "create a primitive", "execute a primitive"):
        assert is_out_of_memory(RuntimeError(f"could not {failed}"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the matmul primitive."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_running_out_of_memory_says_what_takes_less(tiny_model: Path, photo: Image.Image) -> None:
    engine = get_engine(tiny_model, "cpu")
    data = engine.encode(photo)
    hook = engine.pipeline.unet.register_forward_pre_hook(absurd)
    try:
        with pytest.raises(
            NotEnoughMemory,
            match=r"decode 1 picture of 192x128 .* on cpu: try decoding it smaller \(max_size_px=96; perco decode "
            r"--max-size 96\), or .*bfloat16",
        ):
            engine.decode(data)
        with pytest.raises(NotEnoughMemory, match=r"2 pictures of 192x128 .* try fewer pictures at once"):
            engine.decode_batch([data, data])
        assert engine.decode(data, max_size_px=96).size == (96, 64)
    finally:
        hook.remove()
    assert engine.decode(data).size == (192, 128)  # the engine is of use again
    hook = engine.pipeline.hyper_enc.levels[0].encoder.register_forward_pre_hook(absurd)
    try:
        with pytest.raises(NotEnoughMemory, match=r"encode 1 picture of 192x128 pixels on cpu: try a smaller picture"):
            engine.encode(photo)
    finally:
        hook.remove()


def test_memory_for_a_search(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody asks for it the error names what does without; else the codes that are there already are kept."""
    engine = get_engine()
    plain = engine.encode(photo, bpp=0.03, effort=0)
    monkeypatch.setattr("perco_engine.search._search_tile", absurd)
    monkeypatch.setattr("perco_engine.search.USUAL_PIXELS", 1 << 20)
    with pytest.raises(NotEnoughMemory, match=r"search for codes of 1 picture .*: try effort=0, or a smaller picture"):
        engine.encode(photo, bpp=0.03, effort=2)
    assert engine.encode(photo, bpp=0.03) == plain


def test_nothing_is_searched_for_with_networks_that_come_and_go(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("perco_engine.search.USUAL_PIXELS", 1 << 20)
    engine = get_engine(device="cpu", offload=True)
    assert engine.encode(photo, bpp=0.03) == get_engine(device="cpu").encode(photo, bpp=0.03, effort=0)
    with pytest.raises(ValueError, match="leave effort out, or take offload=False"):
        engine.encode(photo, bpp=0.03, effort=2)


def test_no_other_failure_is_called_a_lack_of_memory(tiny_model: Path, photo: Image.Image) -> None:
    engine = get_engine(tiny_model, "cpu")
    data = engine.encode(photo)
    hook = engine.pipeline.unet.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    try:
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            engine.decode(data)
    finally:
        hook.remove()


def test_offloaded_networks_give_the_same_pictures(tiny_model: Path, photo: Image.Image) -> None:
    pytest.importorskip("accelerate")
    for model in (tiny_model, PUBLISHED):
        plain, offloaded = get_engine(model, "cpu"), get_engine(model, "cpu", offload=True)
        assert offloaded is not plain
        assert is_offloaded(offloaded.pipeline) and not is_offloaded(plain.pipeline)
        assert offloaded is get_engine(model, "cpu", offload=True)
        data = offloaded.encode(photo, caption="a river")
        assert data == plain.encode(photo, caption="a river")
        for options in ({"steps": 2}, {"steps": 1}, {"steps": 1, "max_size_px": 48}):
            assert same(offloaded.decode(data, **options), plain.decode(data, **options))


def test_offload_without_accelerate(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perco_engine.memory.is_accelerate_available", lambda: False)
    pipeline = PercoPipeline.from_pretrained(tiny_model)
    with pytest.raises(OffloadUnavailable, match="pip install accelerate"):
        Placement(offload=True).put(pipeline, torch.device("cpu"))
    Placement().put(pipeline, torch.device("cpu"))


def test_compiled_networks_are_the_u_net_and_the_decoder(tiny_model: Path, photo: Image.Image) -> None:
    """Without a compiler at hand: what is to be compiled is marked so, and runs."""
    plain, compiled = get_engine(tiny_model, "cpu"), get_engine(tiny_model, "cpu", compile=True)
    marked = [name for name, module in _modules(compiled) if module._compiled_call_impl is not None]
    assert marked == ["unet", "vae.decoder"]
    data = plain.encode(photo)
    with torch.compiler.set_stance("force_eager"):
        assert same(compiled.decode(data), plain.decode(data))
    with pytest.raises(ValueError, match="exclude each other"):
        get_engine(tiny_model, "cpu", compile=True, offload=True)


def _modules(engine: Engine) -> list[tuple[str, torch.nn.Module]]:
    return [
        (f"{part}.{name}".rstrip("."), module)
        for part in ("hyper_enc", "unet", "vae")
        for name, module in engine.pipeline.components[part].named_modules()
    ]

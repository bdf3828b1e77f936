"""Freed memory goes back to the system, and a conversion sees to it."""

import os
import sys
from pathlib import Path

import pytest

from perco_engine import batch_networks, heap
from perco_engine.batch_networks import Item, Networks, Settings
from perco_engine.conversion import Task

MB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_gaps_in_the_heap_are_given_back() -> None:
    blocks = [b"x" * 100_000 for _ in range(2000)]
    # What lies last keeps the heap from being cut by itself.
    last = blocks.pop()
    before = resident_bytes()
    del blocks
    if not heap.release():
        pytest.skip("not with this C library")
    assert before - resident_bytes() > 150 * MB
    assert last


def test_the_networks_give_back_after_so_many_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released = []
    monkeypatch.setattr(heap, "release", lambda: released.append(1))
    monkeypatch.setattr(batch_networks, "RELEASE_PIXELS", 1000)
    networks = Networks(Settings())
    monkeypatch.setattr(networks, "_run", lambda batch: None)
    item = Item(Task(tmp_path, tmp_path), 400, (20, 20), tmp_path.stat(), ())
    counts = []
    for _ in range(6):
        networks.run([item])
        counts.append(len(released))
    assert counts == [0, 0, 1, 1, 1, 2]

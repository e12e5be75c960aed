"""Claims about the memory that is kept while an autoencoder works on a CPU."""

import gc

import psutil
import pytest
import torch

from dojo.run import heap

CPU = torch.device("cpu")


class Library:
    """In place of glibc."""

    def __init__(self) -> None:
        self.settings: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, name: int, value: int) -> int:
        self.settings[name] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    return library


def test_settings_end_with_the_block_also_when_it_fails(library: Library) -> None:
    def fail() -> None:
        with heap.kept(CPU):
            assert library.settings == {-4: 0, -1: 2**31 - 1}
            assert not library.trimmed
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert library.settings == {-4: 65536, -3: 32 * 2**20, -1: 64 * 2**20}
    assert library.trimmed == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_MAX_", "8"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000")],
)
def test_what_the_environment_says_stays(
    library: Library, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # says nothing of what is kept
    with heap.kept(CPU):
        assert library.settings
    library.settings.clear()
    monkeypatch.setenv(name, value)
    with heap.kept(CPU):
        pass
    assert not library.settings


def test_nothing_is_set_for_a_gpu_nor_where_there_is_no_glibc(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    with heap.kept(torch.device("cuda")):
        pass
    assert not library.settings
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept(CPU):
        pass
    monkeypatch.undo()
    monkeypatch.setattr("sys.platform", "darwin")
    heap._glibc.cache_clear()
    assert heap._glibc() is None
    heap._glibc.cache_clear()


@pytest.mark.skipif(heap._glibc() is None, reason="without glibc nothing is kept")
def test_freed_memory_stays_within_the_block_and_goes_after_it() -> None:
    def resident() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    def grown() -> float:
        return (resident() - before) / 2**20

    for _ in range(2):  # the second time as the first
        before = resident()
        with heap.kept(CPU):
            held = torch.ones(96 * 2**20, dtype=torch.uint8)
            del held
            assert grown() > 80
        assert grown() < 40


def test_numbers_do_not_hang_on_it() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.GroupNorm(4, 32), torch.nn.Conv2d(32, 8, 3)
    )
    pixels = torch.rand(4, 3, 96, 96)
    with torch.no_grad():
        before = network(pixels)
        with heap.kept(CPU):
            for _ in range(3):
                assert torch.equal(network(pixels), before)
        assert torch.equal(network(pixels), before)

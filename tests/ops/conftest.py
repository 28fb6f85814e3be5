"""What holds for every test of the ops: poisoned memory, and tiles of a size that an interpreter can scan."""

from collections.abc import Iterator

import pytest
import torch

from tlcr.ops import _library


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory shows as NaN where it is read. In this mode torch fills what it
    allocates, in C++ too, with NaN or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter scans in Python, token by token and over the whole tile, however short the row.

    The small tile has even short rows take several. tests/ops/test_triton.py runs the real ones.
    """
    if _library.has_triton() and _library.interpreting():
        from tlcr.kernels import gae

        for name, size in (("TILE", 16), ("SHORTEST", 8), ("PACKED_TILE", 8), ("GROUP", 4)):
            monkeypatch.setattr(gae, name, size)

"""The emulator finds what it is there to find, and its halves are torch's."""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import EMULATOR, compile_emulated

NONE, NO_BARRIER, SOME_MISS_THE_BARRIER, TWO_BARRIERS, SOME_LANES_MISS_THE_SHUFFLE, MISALIGNED = range(6)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    compile_emulated(path, [EMULATOR / "faults.cu", EMULATOR / "conversions.cpp"], flags=["-shared", "-fPIC"])
    library = ctypes.CDLL(str(path))
    library.emulator_fault.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, fault: int, order: int) -> tuple[Tensor, str]:
    """The result and the emulator's message."""
    values, result = torch.randn(64), torch.full((64,), 7.0)
    library.emulator_set_order(order)
    status = library.run_with_fault(fault, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(result.data_ptr()))
    message = library.emulator_fault().decode()
    assert (status != 0) == bool(message)
    mine = values.flip(0)
    return result - (mine + mine.view(-1, 2).flip(1).view(-1)), message


@pytest.mark.parametrize("order", range(4))
def test_a_kernel_without_fault(faulty: ctypes.CDLL, order: int) -> None:
    error, message = run(faulty, NONE, order)
    assert message == "" and not error.any()


def test_a_missing_barrier_shows_in_the_result(faulty: ctypes.CDLL) -> None:
    for order in range(4):
        error, message = run(faulty, NO_BARRIER, order)
        # Shared memory that nobody has written is NaN.
        assert message == "" and error.isnan().any()


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SOME_MISS_THE_BARRIER, "waits for .*faults.cu:.* and not all that it waits for come"),
        (TWO_BARRIERS, "some threads wait for .*faults.cu:.*, others for .*faults.cu:"),
        (SOME_LANES_MISS_THE_SHUFFLE, "waits for shuffle and not all that it waits for come"),
        (MISALIGNED, "a load is not aligned in thread"),
    ],
)
def test_a_fault_is_named(faulty: ctypes.CDLL, fault: int, message: str, order: int) -> None:
    with pytest.raises(AssertionError, match=message):
        found = run(faulty, fault, order)[1]
        assert not found, found


def test_halves_are_torch_s(faulty: ctypes.CDLL) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    from_bfloat16, from_half = torch.empty(1 << 16), torch.empty(1 << 16)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (bits, from_bfloat16, from_half)]
    faulty.convert_back(1 << 16, *pointers)
    for got, dtype in ((from_bfloat16, torch.bfloat16), (from_half, torch.float16)):
        assert torch.equal(got.nan_to_num(12345.0), bits.view(dtype).float().nan_to_num(12345.0))

    # Every half, what lies between it and the next, and the ties; then any float.
    eps = torch.finfo(torch.float32).eps
    between = [x + d * eps * x for x in (from_half, from_bfloat16) for d in (-1, 1)]
    ties = [(x[1:] + x[:-1]) / 2 for x in (from_half, from_bfloat16)]
    random = torch.randint(-(1 << 31), 1 << 31, (100_000,)).to(torch.int32).view(torch.float32)
    values = torch.cat([from_half, from_bfloat16, *between, *ties, random]).contiguous()
    to_bfloat16, to_half = (torch.empty(values.numel(), dtype=torch.int16) for _ in range(2))
    faulty.convert(values.numel(), *(ctypes.c_void_p(x.data_ptr()) for x in (values, to_bfloat16, to_half)))
    for got, dtype in ((to_bfloat16, torch.bfloat16), (to_half, torch.float16)):
        halves, wanted = got.view(dtype), values.to(dtype)
        assert torch.equal(halves.isnan(), wanted.isnan())
        numbers = ~wanted.isnan()
        assert torch.equal(got[numbers], wanted.view(torch.int16)[numbers])

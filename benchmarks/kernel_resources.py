"""What the Triton kernels take of a GPU, read from PTX and binaries: registers, spills, shared memory and how many
programs a multiprocessor holds; and how many accesses of a thread to global memory move 16 bytes. Needs no GPU.

    python -m benchmarks.kernel_resources                    # every kernel and dtype for the targets that are tested
    python -m benchmarks.kernel_resources --targets 90 --dtypes float32

The functions of `tlcr.kernels` run as ever, on tensors without data, but where they would launch a kernel it is
compiled for the target instead, by the same path, and so with the same types, options and specialisation. Exits with
status 1 if a kernel spills registers to memory.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tlcr.kernels import adamw, gae, layers, ppo_loss, reward

TARGETS = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Long rows; rows that begin anywhere; and for float32 also short rows, of which a program takes several, and few rows.
SHAPES = ((1024, 4096), (1024, 4095), (1024, 128), (8, 131072))
SHAPES_OF_ALL = SHAPES[:2]
# Of an H100; the kernels ask whether there are fewer rows.
MULTIPROCESSORS = 132
# What the programs on a multiprocessor share: bytes of shared memory by target, and the same on all of them.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, WARPS, PROGRAMS = 64 * 1024, 64, 32


class Resources(NamedTuple):
    """What one program of a compiled kernel takes."""

    kernel: str
    call: str
    """The first call that launches it."""
    shape: str
    dtype: str
    target: int
    warps: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes of shared memory."""
    programs: int
    """That a multiprocessor holds at once."""
    wide: int
    """Loads and stores in the program that move 16 bytes of global memory a thread."""
    narrow: int
    """Those that move less."""


class _Target:
    """A driver that only names the target GPU, which is enough to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(capability: int, **launch_options: Any) -> Iterator[list[Any]]:
    """In this context, launching a kernel only compiles it for the target and adds the result to the list.

    Options of Triton's launch, such as `maxnreg`, can be added or replaced.
    """
    if not isinstance(gae._gae_kernel.aligned, JITFunction):
        raise SystemExit("the kernels are interpreted; unset TRITON_INTERPRET to compile them")
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options | launch_options))

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    asked, gae.multiprocessors = gae.multiprocessors, lambda device: MULTIPROCESSORS
    try:
        yield compiled
    finally:
        JITFunction.run, gae.multiprocessors = launch, asked


def calls(dtype: torch.dtype, batch: int = 1024, length: int = 4096) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel, with all its parts; what can be left out only makes it smaller."""
    mask = torch.empty(batch, length, dtype=torch.bool, device="meta")
    x = torch.empty(batch, length, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")

    def reward_of(classes: int, discrete: bool) -> Tensor:
        logits = x.new_empty(batch, length, classes)
        return reward.fused_reward(logits, mask, x, 0.1, x.new_empty(batch), 1.0, 1.0, 1.0, discrete, 0.0)

    def gae_of(packed: bool) -> tuple[Tensor, Tensor]:
        if packed:
            return gae.fused_gae(x.flatten(), x.flatten(), mask.flatten(), 1.0, 0.95, True, cu_seqlens)
        return gae.fused_gae(x, x, mask, 1.0, 0.95, True, None)

    def loss_of(per_sequence: bool) -> tuple[Tensor, Tensor, Tensor]:
        policy = (x, x, x, mask, 0.2, 0.2, 3.0)
        rest = (x, x, x, 0.2, 1.0, x, 0.1, x, 0.1)
        loss, statistics, row_weights = ppo_loss.ppo_loss(*policy, *rest, per_sequence, None, None)
        ppo_loss.ppo_loss_backward(loss, row_weights, *policy, *rest, True, True, True, True)
        return loss, statistics, row_weights

    def step() -> None:
        weights, moments = x.bfloat16(), x.float()
        lists = [weights], [weights], [moments], [moments], [weights.to(torch.int16)]
        adamw.adamw_step(*lists, 0.1, 0.9, 0.95, 1e-8, 0.1, 1)

    def norm() -> None:
        y, scales = layers.rms_norm(x, x[0], 1e-5)
        layers.rms_norm_backward(y, x, x[0], scales)

    def gate() -> None:
        layers.gated_silu_backward(layers.gated_silu(x, x), x, x)

    yield "adamw_step", step
    yield "rms_norm", norm
    yield "gated_silu", gate
    yield "fused_reward, 2 classes", lambda: reward_of(2, False)
    yield "fused_reward, 3 classes, discrete", lambda: reward_of(3, True)
    yield "fused_gae, padded", lambda: gae_of(False)
    yield "fused_gae, packed", lambda: gae_of(True)
    yield "ppo_loss, token", lambda: loss_of(False)
    yield "ppo_loss, sequence", lambda: loss_of(True)


def resources(targets: tuple[int, ...] = TARGETS, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Resources]:
    """What every kernel takes on every target: each variant once, however many calls launch it."""
    found: dict[tuple[str, int], Resources] = {}
    for target, dtype, shape in itertools.product(targets, dtypes, SHAPES):
        if dtype != torch.float32 and shape not in SHAPES_OF_ALL:
            continue
        for name, call in calls(dtype, *shape):
            with compiling(target) as compiled:
                call()
            for kernel in compiled:
                if (kernel.hash, target) not in found:
                    labels = name, "{} x {}".format(*shape), str(dtype)[6:]
                    found[kernel.hash, target] = read(kernel, labels, target)
    return list(found.values())


def read(kernel: Any, labels: tuple[str, str, str], target: int) -> Resources:
    """What a compiled kernel takes, from the tables in its binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    moved = accesses(kernel.asm["ptx"])
    return Resources(
        kernel.name.strip("_"),
        *labels,
        target,
        warps,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared,
        resident(target, warps, usage["REG"], shared),
        sum(size == 16 for size in moved),
        sum(size != 16 for size in moved),
    )


def accesses(ptx: str) -> list[int]:
    """The bytes that each load and store of global memory in a program moves for a thread."""
    found = re.findall(r"\b(?:ld|st)\.global(?:\.[a-zA-Z_:0-9]+?)*?(?:\.v([248]))?\.[bfsu](\d+)\b", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def resident(target: int, warps: int, registers: int, shared: int) -> int:
    """How many programs a multiprocessor holds at once."""
    # Registers come by 256 to a warp, from the quarter that runs it; every program has another KiB of shared memory.
    of_warp = (registers * 32 + 255) // 256 * 256
    by_registers = 4 * (REGISTERS // 4 // of_warp) // warps
    return min(PROGRAMS, WARPS // warps, by_registers, SHARED_BYTES[target] // (shared + 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities: 80 90 100")
    parser.add_argument("--dtypes", nargs="+", default=[str(dtype)[6:] for dtype in DTYPES])
    options = parser.parse_args()
    found = resources(tuple(options.targets), tuple(getattr(torch, name) for name in options.dtypes))
    row = "{:<17} {:<33} {:<12} {:<9} {:>6} {:>6} {:>10} {:>8} {:>7} {:>9} {:>5} {:>7}\n"
    lines = [row.format(*Resources._fields)]
    lines += [row.format(*one._replace(target=f"sm_{one.target}")) for one in found]  # type: ignore[arg-type]
    sys.stdout.write(f"triton {triton.__version__}\n" + "".join(lines))
    return 1 if any(one.spilled for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())

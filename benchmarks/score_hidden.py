"""`score_hidden` over sizes of its chunk, beside its bare matrix products, in time and memory.

    python -m benchmarks.score_hidden --device cuda                         # 16384 tokens, H = 4096, V = 128256
    python -m benchmarks.score_hidden --shape 512 64 4096 --chunks 64 256   # a CPU

For every chunk: the forward pass beside one product, and the backward pass of a trained head and of a frozen one beside
the two or three products that it consists of, as time over theirs; and the memory beside inputs and results, as
measured and as `scratch_of` has it. The first row is the chunk that `score_hidden` chooses. The products are torch's,
in the dtype of the inputs and with results in that dtype, which none of the passes may round to.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.clocks import Clocks, CPUClocks, GPUClocks, calls
from benchmarks.record import clean_commit, record
from tlcr.ops import scoring
from tlcr.ops.scratch import scratch_of

TARGET = (16_384, 4096, 128_256)
CHUNKS = (256, 512, 768, 1024, 1536, 2048, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", type=int, nargs=3, default=TARGET, metavar=("N", "H", "V"))
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each chunk's rounds, about")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    commit = clean_commit() if options.json else ""
    clocks: Clocks = GPUClocks() if options.device == "cuda" else CPUClocks()
    dtype = DTYPES[options.dtype]
    vocabulary = options.shape[2]
    own = scoring.default_chunk(vocabulary, torch.float32, torch.device(options.device), with_reference=False)
    chunks = dict.fromkeys((own, *options.chunks))
    rows = [measured(clocks, tuple(options.shape), dtype, options.device, chunk, options.seconds) for chunk in chunks]
    Console().print(table(rows))
    if options.json:
        made_of = record(
            "score_hidden",
            rows,
            commit=commit,
            clocks=clocks.descriptions,
            device=options.device,
            peak=clocks.peak_description,
        )
        options.json.write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")


def measured(
    clocks: Clocks, shape: tuple[int, int, int], dtype: torch.dtype, device: str, chunk: int, seconds: float
) -> dict[str, Any]:
    """One row: seconds by the main clock, and bytes."""
    tokens, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, device=device)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    direction = torch.randn(tokens, device=device)
    arguments = hidden, weight, ids, None, None, None, None, 1.0, None, chunk
    forward = functools.partial(torch.ops.tlcr.score_hidden, *arguments)
    _, entropy, _, kl, stats, ref_stats = forward()
    kept = direction, None, None, *arguments, entropy, kl, stats, ref_stats
    frozen, trained = ((*kept, True, wants_weight, False) for wants_weight in (False, True))

    rows = min(tokens, max(1, 2**29 // vocabulary // hidden.element_size()))
    part = torch.randn(rows, vocabulary, dtype=dtype, device=device)
    products: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: hidden[:rows] @ weight.t(),
        "hidden": lambda: part @ weight,
        "weight": lambda: part.t() @ hidden[:rows],
    }
    works: dict[str, Callable[[], object]] = {
        "forward": forward,
        "backward, frozen head": functools.partial(torch.ops.tlcr.score_hidden_backward, *frozen),
        "backward": functools.partial(torch.ops.tlcr.score_hidden_backward, *trained),
    }
    timed = clocks.alternate({name: calls(work) for name, work in (products | works).items()}, seconds=seconds)
    found = {name: timing[clocks.main].median for name, timing in timed.items()}
    bare = {name: found[name] * tokens / rows for name in products}
    against = {
        "forward": bare["logits"],
        "backward, frozen head": bare["logits"] + bare["hidden"],
        "backward": sum(bare.values()),
    }
    outputs = {
        "forward": 4 * tokens * 4,
        "backward, frozen head": hidden.nbytes,
        "backward": hidden.nbytes + weight.nbytes,
    }
    wanted = {
        "forward": scratch_of("tlcr::score_hidden", arguments, on_cpu=device == "cpu"),
        "backward, frozen head": scratch_of("tlcr::score_hidden_backward", frozen, on_cpu=device == "cpu"),
        "backward": scratch_of("tlcr::score_hidden_backward", trained, on_cpu=device == "cpu"),
    }
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "chunk_tokens": chunk,
        "passes": {
            name: {
                "seconds": found[name],
                "seconds_of_products": against[name],
                "scratch_bytes": clocks.peak(calls(work)) - outputs[name],
                "scratch_bytes_of_formula": wanted[name],
            }
            for name, work in works.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    tokens, width, vocabulary = rows[0]["shape"]
    title = f"N={tokens} H={width} V={vocabulary} {rows[0]['dtype']}"
    made = Table(box=SIMPLE, pad_edge=False, title=title, title_justify="left")
    names = tuple(rows[0]["passes"])
    made.add_column("chunk_tokens", justify="right")
    for name in names:
        made.add_column(f"{name}: ms", justify="right")
        made.add_column("over products", justify="right")
        made.add_column("scratch MiB (formula)", justify="right")
    for row in rows:
        cells = [str(row["chunk_tokens"])]
        for name in names:
            one = row["passes"][name]
            cells += [f"{1e3 * one['seconds']:.1f}", f"{one['seconds'] / one['seconds_of_products']:.2f}x"]
            cells += [f"{one['scratch_bytes'] / 2**20:.0f} ({one['scratch_bytes_of_formula'] / 2**20:.0f})"]
        made.add_row(*cells)
    return made


if __name__ == "__main__":
    main()

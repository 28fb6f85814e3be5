"""How long score_tokens takes on one thread of a CPU, beside what one would write in torch, eager and compiled.

    python benchmarks/cpu_scoring.py
    python benchmarks/cpu_scoring.py --rows 32 --dtype bfloat16 --rounds 21 --json scoring.json
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_scoring.py

Four cases: log-probability and entropy, and with a reference also its log-probability and the exact KL, forward (with
no gradient asked for) and backward (from gradients of log-probability, entropy and KL to the logits, after a forward
that is not timed). Processor time, not wall-clock; the rivals take turns. No wrong answer is timed: every result and
gradient is first compared with float64 on a few rows, and the table shows the error. "read" and "copy" are what the
memory costs: one sum over each logits tensor that is read, and for backward one copy of the logits to fresh memory.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cpu_time import alternate, machine, table, write_json
from rich.console import Console
from torch import Tensor

from tlcr import ops

Score = Callable[..., tuple[Tensor, ...]]

CHECKED_ROWS = 4
# Of the largest true value. Sums over V in float32, and gradients rounded to half precision, stay well below.
LARGEST_ERROR = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """What one would write: half precision widened, then log-softmax and sums over the vocabulary."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p, at = torch.log_softmax(logits, dim=-1), token_ids.unsqueeze(-1)
    p = log_p.exp()
    logprobs, entropy = log_p.gather(-1, at).squeeze(-1), -(p * log_p).sum(dim=-1)
    if ref_logits is None:
        return logprobs, entropy
    ref_logits = ref_logits.to(logits.dtype)
    log_q = torch.log_softmax(ref_logits, dim=-1)
    return logprobs, entropy, (p * (log_p - log_q)).sum(dim=-1), log_q.gather(-1, at).squeeze(-1)


def shifted(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """The same with fewer passes over the vocabulary: the form that torch.compile was found to do best with."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    at = token_ids.unsqueeze(-1)
    z = logits - logits.amax(dim=-1, keepdim=True)
    p = z.exp()
    total = p.sum(dim=-1)
    log_sum = total.log()
    logprobs, entropy = z.gather(-1, at).squeeze(-1) - log_sum, log_sum - (p * z).sum(dim=-1) / total
    if ref_logits is None:
        return logprobs, entropy
    ref_logits = ref_logits.to(logits.dtype)
    ref_z = ref_logits - ref_logits.amax(dim=-1, keepdim=True)
    ref_log_sum = ref_z.exp().sum(dim=-1).log()
    kl = (p * (z - ref_z)).sum(dim=-1) / total - log_sum + ref_log_sum
    return logprobs, entropy, kl, ref_z.gather(-1, at).squeeze(-1) - ref_log_sum


def tlcr_scores(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    scores = ops.score_tokens(logits, token_ids, ref_logits=ref_logits, impl="cpp")
    if scores.kl is None or scores.ref_logprobs is None:
        return scores.logprobs, scores.entropy
    return scores.logprobs, scores.entropy, scores.kl, scores.ref_logprobs


def forward(score: Score, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return score(*inputs)


def ready_backward(score: Score, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Runs the forward pass; what is returned runs the backward pass."""
    logits = inputs[0].detach().requires_grad_()
    results = score(logits, *inputs[1:])[: len(grads)]
    return lambda: torch.autograd.grad(results, logits, grads)[0]


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).abs().max() / true.abs().max())


def check(name: str, score: Score, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest error of the results and of the gradient on a few rows, against float64."""
    wide = tuple(x[:CHECKED_ROWS].double() if x.is_floating_point() else x[:CHECKED_ROWS] for x in inputs)
    wide_grads = tuple(g[:CHECKED_ROWS].double() for g in grads)
    found = {
        "forward": max(
            error(got[:CHECKED_ROWS], true)
            for got, true in zip(forward(score, inputs), forward(plain, wide), strict=True)
        ),
        "backward": error(
            ready_backward(score, inputs, grads)()[:CHECKED_ROWS], ready_backward(plain, wide, wide_grads)()
        ),
    }
    bound = LARGEST_ERROR[inputs[0].dtype]
    if not all(value <= bound for value in found.values()):
        raise SystemExit(f"{name} is wrong, and so not timed: relative errors {found}, wanted at most {bound:g}")
    return found


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One entry for each case and rival."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    logits = torch.randn(args.rows, args.vocabulary)
    ref_logits = (logits + 0.3 * torch.randn_like(logits)).to(dtype)
    logits = logits.to(dtype)
    token_ids = torch.randint(args.vocabulary, (args.rows,))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    all_grads = tuple(torch.randn(3, args.rows, dtype=real))
    rivals: dict[str, Score] = {
        "tlcr": tlcr_scores,
        "torch.compile": torch.compile(plain, dynamic=False),
        "compile, shifted": torch.compile(shifted, dynamic=False),
        "eager": plain,
    }

    entries: list[dict[str, object]] = []
    for given, inputs, grads in (
        ("policy", (logits, token_ids), all_grads[:2]),
        ("policy and reference", (logits, token_ids, ref_logits), all_grads),
    ):
        errors = {name: check(name, score, inputs, grads) for name, score in rivals.items()}
        read = [x for x in inputs if x.is_floating_point()]
        cases = {
            "forward": {name: partial(partial, forward, score, inputs) for name, score in rivals.items()}
            | {"read": partial(partial, lambda tensors: [x.sum() for x in tensors], read)},
            "backward": {name: partial(ready_backward, score, inputs, grads) for name, score in rivals.items()}
            | {"copy": partial(partial, logits.clone)},
        }
        for direction, of_direction in cases.items():
            timings = alternate(of_direction, args.rounds)
            for name, timing in timings.items():
                entries.append(
                    {
                        "case": f"{given}, {direction}",
                        "implementation": name,
                        "error": errors[name][direction] if name in errors else None,
                        "ratio": timing.median / timings["tlcr"].median,
                        **timing._asdict(),
                    }
                )
    return entries


def show(entries: list[dict[str, object]], args: argparse.Namespace, where: dict[str, object]) -> None:
    console = Console()
    title = f"score_tokens, {args.rows} x {args.vocabulary} {args.dtype}, one thread, {args.rounds} rounds"
    console.print(table(title, entries, milliseconds=".2f", ratio=".2f"))
    median = {entry["case"]: entry["median"] for entry in entries if entry["implementation"] == "tlcr"}
    for direction in ("forward", "backward"):
        both, one = median[f"policy and reference, {direction}"], median[f"policy, {direction}"]
        console.print(f"{direction} with reference and KL, over twice the policy alone: {both / (2 * one):.2f}")
    console.print(where)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=128, help="tokens to score")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--rounds", type=int, default=11, help="how often each is timed, after one that is not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for everything that was measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # torch.compile would find what it compiled for another ATEN_CPU_CAPABILITY, and run it, with wrong results.
    torch.compiler.config.force_disable_caches = True
    where, entries = machine(), measure(args)
    show(entries, args, where)
    write_json(args, where, entries)


if __name__ == "__main__":
    main()

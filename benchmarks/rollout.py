"""Tokens per second of a rollout by each engine, on a Llama with random weights whose answers differ in length.

    python -m benchmarks.rollout                                          135M, on a CPU some minutes
    python -m benchmarks.rollout --shape 1b --dtype bfloat16 --prompts 64 --batch 64

One token in --mean of the vocabulary ends an answer, so lengths are geometric, cut at --longest. The engines take
turns on the same prompts, after one short turn of each that is not counted; a turn is printed when it ends. What a row
says is medians over the turns. Processor time is the whole process's; on a GPU only the wall clock counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.ppo_step.task import SHAPES, Task, causal_lm, device, tokenizer_of
from tlcr.config.schema import ModelConfig, RolloutConfig
from tlcr.engines import Sampling, build_engine
from tlcr.models.inspection import attention_for
from tlcr.models.layers import fuse_layers


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    task = Task(shape=options.shape, dtype=options.dtype)
    policy = causal_lm(task, tokenizer_of(task))
    fuse_layers(policy)
    cfg = ModelConfig(path="", dtype=options.dtype, attn_implementation=options.attention)
    policy.set_attn_implementation(attention_for(cfg, type(policy), policy.config))
    vocabulary = policy.config.vocab_size
    ends = tuple(range(2, 2 + vocabulary // options.mean))
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 40, (options.prompts,), generator=generator).tolist()
    prompts = [torch.randint(ends[-1] + 1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "end_ids": ends, "pad_id": 0}
    how = Sampling(max_new_tokens=options.longest, batch_size=options.batch, **settings)
    short = Sampling(max_new_tokens=4, batch_size=options.batch, **settings)
    engines = {name: build_engine(RolloutConfig(engine=name), policy) for name in options.engines}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(-1, options.turns):
        for number, (name, engine) in enumerate(engines.items()):
            torch.manual_seed(100 * turn + number)
            processor, wall = time.process_time(), time.perf_counter()
            answers = [answer.ids_T.tolist() for answer in engine.sample(prompts, short if turn < 0 else how)]
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
            counted = [next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids)) for ids in answers]
            tokens = sum(counted)
            clock = wall if device().type == "cuda" else processor
            if turn >= 0:
                rates[name].append(tokens / clock)
                say(
                    f"turn {turn} {name}: {tokens} tokens, {min(counted)} to {max(counted)} an answer, {wall:.1f} s, "
                    f"{processor:.1f} s of processor time, {tokens / clock:.1f} tokens/s"
                )
    first = statistics.median(rates[options.engines[0]])
    for name, found in rates.items():
        rate = statistics.median(found)
        say(f"{name:10s} {rate:9.1f} tokens/s  {rate / first:.2f}x of {options.engines[0]}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=tuple(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="auto", help="model.attn_implementation")
    parser.add_argument("--engines", nargs="+", default=["generate", "paged"], choices=["generate", "static", "paged"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="answers under way at a time")
    parser.add_argument("--longest", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--mean", type=int, default=96, help="one token in so many ends an answer")
    parser.add_argument("--turns", type=int, default=2, help="counted turns of each engine")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()

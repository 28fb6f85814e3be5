"""How much of a PPO micro-batch is padding: rows that are prompt, answer and padding, beside two rectangles and packed.

    python -m benchmarks.padding

prints the share of columns that hold no token, for 64 answers of several lengths: even (prompts of 100 to 128 tokens,
answers of 200 to 256), exponential (means 80 and 180, to 256 and 512), log-normal (to 1024 and 2048). Two rectangles,
prompts padded on the left and answers on the right, is how a rollout is kept, and how most trainers score it. The last
columns cut by tokens (`ppo.micro_batch_tokens`) instead of rows; they have no limit of rows.

A second table has the places that a model computes for 24 answers, padded and packed (`ppo.packing`), and the processor
time of packed rows relative to that of padded ones: forward and backward pass of a small Llama with a head of values on
this CPU, both forms in alternation, the median of `--repeats` rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.microbatches import MicroBatch, MicroBatches, PaddedMicroBatch
from tlcr.types import Rollout

Lengths = tuple[np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--cuts", type=int, nargs="+", default=[1024, 4096], help="tokens of the second table")
    parser.add_argument("--timed-answers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are timed; 0: no second table")
    options = parser.parse_args()
    every = distributions(np.random.default_rng(0), options.answers)
    Console().print(shares_of_padding(every, options.rows, options.tokens))
    if options.repeats > 0:
        timed = distributions(np.random.default_rng(0), options.timed_answers)
        Console().print(packed_beside_padded(timed, options.cuts, options.repeats))


def shares_of_padding(every: dict[str, Lengths], of_rows: Sequence[int], of_tokens: Sequence[int]) -> Table:
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column("lengths")
    for rows in of_rows:
        made.add_column(f"{rows} rows: two", justify="right")
        made.add_column("one", justify="right")
    for tokens in of_tokens:
        made.add_column(f"{tokens} tokens: one", justify="right")
    for name, lengths in every.items():
        rollout = of_lengths(*lengths)
        shares = []
        for rows in of_rows:
            (parts,) = MicroBatches(rollout, rows=rows, tokens=10**9).split()
            shares += [padding_of_two(parts, lengths), padding_of_one(parts)]
        for tokens in of_tokens:
            shares.append(padding_of_one(MicroBatches(rollout, rows=None, tokens=tokens).split()[0]))
        made.add_row(name, *(f"{share:.0%}" for share in shares))
    return made


def packed_beside_padded(every: dict[str, Lengths], cuts: Sequence[int], repeats: int) -> Table:
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column("lengths")
    for name in ("tokens at most", "passes: padded", "packed", "places: padded", "packed", "CPU time: packed / padded"):
        made.add_column(name, justify="right")
    model = small_model()
    for name, lengths in every.items():
        rollout = of_lengths(*lengths)
        for tokens in cuts:
            padded, packed = (
                MicroBatches(rollout, rows=None, tokens=tokens, packed=packed).split()[0] for packed in (False, True)
            )
            seconds = [(seconds_of(model, padded), seconds_of(model, packed)) for _ in range(repeats + 1)][1:]
            places = [sum(part.ids_BL.numel() for part in parts) for parts in (padded, packed)]
            ratio = median(of_packed / of_padded for of_padded, of_packed in seconds)
            made.add_row(name, str(tokens), str(len(padded)), str(len(packed)), *map(str, places), f"{ratio:.2f}")
    return made


def small_model() -> ActorCritic:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return ActorCritic(LlamaForCausalLM(config), None).train()


def seconds_of(model: ActorCritic, parts: Sequence[MicroBatch]) -> float:
    """Processor time of a forward and a backward pass of each micro-batch."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    for part in parts:
        output = model(*part.tokens, temperature=1.0)
        (output.logprobs_N.sum() + output.values_N.sum()).backward()
    return time.process_time() - start


def distributions(random: np.random.Generator, answers: int) -> dict[str, Lengths]:
    """Lengths of prompts and of answers, by name."""

    def log_normal(most: int) -> np.ndarray:
        return np.clip(random.lognormal(np.log(most / 8), 0.9, answers).astype(int), 1, most)

    def exponential(mean: int, most: int) -> np.ndarray:
        return np.clip(random.exponential(mean, answers).astype(int), 1, most)

    return {
        "even": (random.integers(100, 129, answers), random.integers(200, 257, answers)),
        "exponential": (exponential(80, 256), exponential(180, 512)),
        "log-normal": (log_normal(1024), log_normal(2048)),
    }


def of_lengths(prompts_B: np.ndarray, answers_B: np.ndarray) -> Rollout:
    """A rollout of rows of these lengths, whose tokens are all alike."""
    prompt_mask_BP = torch.from_numpy(np.arange(prompts_B.max()) >= prompts_B.max() - prompts_B[:, None])
    mask_BT = torch.from_numpy(np.arange(answers_B.max()) < answers_B[:, None])
    names = ("",) * len(prompts_B)
    ended_B = torch.ones(len(prompts_B), dtype=torch.bool)
    return Rollout(names, names, prompt_mask_BP.long(), prompt_mask_BP, mask_BT.long(), mask_BT, ended_B)


def padding_of_one(parts: Sequence[MicroBatch]) -> float:
    tokens = sum(int(part.attention_mask_BL.sum()) for part in parts if isinstance(part, PaddedMicroBatch))
    return 1 - tokens / sum(part.ids_BL.numel() for part in parts)


def padding_of_two(parts: Sequence[MicroBatch], lengths: Lengths) -> float:
    """The same rows as two rectangles, each as wide as its longest row."""
    columns = sum(len(part.rows_B) * sum(of[part.rows_B].max() for of in lengths) for part in parts)
    return 1 - sum(of.sum() for of in lengths) / columns


if __name__ == "__main__":
    main()

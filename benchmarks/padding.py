"""How much of a PPO micro-batch is padding: rows that are prompt, answer and padding, beside two rectangles.

    python -m benchmarks.padding

prints the share of columns that hold no token, for 64 answers of several lengths: even (prompts of 100 to 128 tokens,
answers of 200 to 256), exponential (means 80 and 180, to 256 and 512), log-normal (to 1024 and 2048). Two rectangles,
prompts padded on the left and answers on the right, is how a rollout is kept, and how most trainers score it. The last
columns cut by tokens (`ppo.micro_batch_tokens`) instead of rows; they have no limit of rows.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tlcr.ppo.microbatches import MicroBatch, MicroBatches
from tlcr.types import Rollout

Lengths = tuple[np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args()
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column("lengths")
    for rows in options.rows:
        made.add_column(f"{rows} rows: two", justify="right")
        made.add_column("one", justify="right")
    for tokens in options.tokens:
        made.add_column(f"{tokens} tokens: one", justify="right")
    for name, lengths in distributions(np.random.default_rng(0), options.answers).items():
        rollout = of_lengths(*lengths)
        shares = []
        for rows in options.rows:
            (parts,) = MicroBatches(rollout, rows=rows, tokens=10**9).split()
            shares += [padding_of_two(parts, lengths), padding_of_one(parts)]
        for tokens in options.tokens:
            shares.append(padding_of_one(MicroBatches(rollout, rows=None, tokens=tokens).split()[0]))
        made.add_row(name, *(f"{share:.0%}" for share in shares))
    Console().print(made)


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


def padding_of_one(parts: list[MicroBatch]) -> float:
    return 1 - sum(int(part.attention_mask_BL.sum()) for part in parts) / sum(part.ids_BL.numel() for part in parts)


def padding_of_two(parts: list[MicroBatch], lengths: Lengths) -> float:
    """The same rows as two rectangles, each as wide as its longest row."""
    columns = sum(len(part.rows_B) * sum(of[part.rows_B].max() for of in lengths) for part in parts)
    return 1 - sum(of.sum() for of in lengths) / columns


if __name__ == "__main__":
    main()

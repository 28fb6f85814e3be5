"""Checkpoints of a bfloat16 model and its optimiser: whole, sharded, and sharded in the background.

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.checkpoints FOLDER

prints, for two processes on the CPU and a model of 50M parameters, medians over saves that take turns: seconds for
which the training waits, seconds until the checkpoint is complete and synced to disk, and its bytes, all together and
those of the largest file. Then the seconds to read each.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from tlcr.config.schema import ShardingConfig
from tlcr.training.background import BackgroundSave
from tlcr.training.checkpoint import Contents, contents, load_checkpoint, write_checkpoint
from tlcr.training.distributed import barrier, is_main_process, largest_of_processes, process_count
from tlcr.training.optim import build_optimizer, parameter_groups
from tlcr.training.sharding import plan, shard

WHOLE, SHARDED, BACKGROUND = "whole", "sharded", "sharded, in the background"


class Trained:
    """A model after a step, whole on every process or in shards."""

    def __init__(self, layers: int, *, sharded: bool) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
        config = LlamaConfig(vocab_size=16_384, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
        self.model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if sharded:
            shard(self.model, plan(ShardingConfig(kind="full")))
        self.optimizer = build_optimizer(parameter_groups(self.model, learning_rate=1e-6, weight_decay=0.0))
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.is_cut = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def contents(self) -> Contents:
        return contents(
            1,
            models={"model": self.model},
            optimizers={"adamw": self.optimizer},
            schedulers={},
            state={},
            tensors={},
            config={},
        )

    def load(self, path: Path) -> None:
        load_checkpoint(path, models={"model": self.model}, optimizers={"adamw": self.optimizer}, schedulers={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the disk to measure; what is written is deleted")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    trained = {WHOLE: Trained(options.layers, sharded=False), SHARDED: Trained(options.layers, sharded=True)}
    assert trained[SHARDED].is_cut and not trained[WHOLE].is_cut
    trained[BACKGROUND] = trained[SHARDED]
    folders = {name: options.folder / f"benchmark-{number}" for number, name in enumerate(trained)}
    waits: dict[str, list[float]] = {name: [] for name in trained}
    totals: dict[str, list[float]] = {name: [] for name in trained}
    reads: dict[str, list[float]] = {name: [] for name in trained}
    for _ in range(options.rounds):
        for name, one in trained.items():
            wait, total = _save(one, folders[name], in_background=name == BACKGROUND)
            waits[name].append(wait)
            totals[name].append(total)
            reads[name].append(_slowest(lambda one=one, name=name: one.load(folders[name] / "step-000001")))
    if is_main_process():
        console = Console(width=110)
        console.print(f"{trained[WHOLE].parameters / 1e6:.0f}M parameters in bfloat16, {process_count()} processes")
        table = Table("a checkpoint", box=SIMPLE)
        for column in ("training waits, s", "complete after, s", "MB", "largest file, MB", "reading, s"):
            table.add_column(column, justify="right")
        for name in trained:
            sizes = [file.stat().st_size for file in folders[name].rglob("*") if file.is_file()]
            seconds = (f"{median(times[name]):.2f}" for times in (waits, totals))
            amounts = (f"{amount / 1e6:.0f}" for amount in (sum(sizes), max(sizes)))
            table.add_row(name, *seconds, *amounts, f"{median(reads[name]):.2f}")
        console.print(table)
    barrier()
    if is_main_process():
        for folder in folders.values():
            shutil.rmtree(folder)


def _save(trained: Trained, folder: Path, *, in_background: bool) -> tuple[float, float]:
    """Seconds for which the slowest process waits, and until the checkpoint is complete."""
    background = BackgroundSave()
    begin: Callable[[], object] = lambda: background.begin(folder, trained.contents(), keep=1)  # noqa: E731
    if not in_background:
        begin = lambda: write_checkpoint(folder, trained.contents(), keep=1)  # noqa: E731
    wait = _slowest(begin)
    return wait, wait + _slowest(background.wait)


def _slowest(action: Callable[[], object]) -> float:
    barrier()
    began = time.perf_counter()
    action()
    seconds: Tensor = largest_of_processes(torch.tensor(time.perf_counter() - began, dtype=torch.float64))
    return seconds.item()


if __name__ == "__main__":
    main()

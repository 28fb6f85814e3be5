"""Memory and speed of PPO with whole models, with shards, with LoRA roles, and with both, measured on CPUs.

python -m benchmarks.scale_run             the table in docs/scale.md: a random model of SmolLM2-135M's shape, float32
python -m benchmarks.scale_run --repeats 3 --ways whole "LoRA roles"

Each way trains for two rounds in processes of its own; ways take turns, and figures are medians over the repeats. The
peak is that of a process from its start on (VmHWM of Linux, libraries and what tlcr computes with among it), before the
models are written. Tokens are those of the answers, over the seconds of the second round. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.scale import SHAPES, say
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_causal_lm, load_token_classifier
from tlcr.models.lora.roles import Roles
from tlcr.models.tokenizers import load_tokenizer
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import LoadedModel, build_reward_source
from tlcr.training.callbacks import Callback
from tlcr.training.distributed import barrier, process_index
from tlcr.training.sharding import plan, shard_all

ROOT = Path(__file__).parents[1]
LORA = {"lora.rank": 16}
SHARDED = {"sharding.kind": "full"}
WAYS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "whole": (1, {}),
    "sharded": (2, SHARDED),
    "LoRA roles": (1, LORA),
    "LoRA roles, sharded": (2, {**LORA, **SHARDED}),
}
"""Processes and settings of each way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--answers", type=int, default=4, help="of a round")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--work", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        way, folder = arguments.work
        train(config(Path(folder), arguments, WAYS[way][1]), Path(folder))
        return
    found: dict[str, list[list[dict[str, float]]]] = {way: [] for way in arguments.ways}
    with TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _repeat in range(arguments.repeats):
            for way in arguments.ways:
                found[way].append(measured(way, Path(folder), arguments))
                say(f"{way}: {found[way][-1]}")
    say("| way | processes | peak of a process, GB | of whole | tokens/s |")
    say("|---|---:|---:|---:|---:|")
    peaks = {way: statistics.median(max(of["peak"] for of in run) for run in runs) for way, runs in found.items()}
    for way, runs in found.items():
        share = f"{peaks[way] / peaks['whole']:.2f}" if "whole" in peaks else ""
        speed = statistics.median(run[0]["tokens_per_s"] for run in runs)
        say(f"| {way} | {WAYS[way][0]} | {peaks[way] / 1e9:.2f} | {share} | {speed:.1f} |")


def make_model(folder: Path) -> None:
    """Random weights of the 0.1B shape, and a tokenizer in which each word is a token."""
    shape = SHAPES["0.1B"]
    special = ["<pad>", "<s>", "</s>"]
    words = special + [f"w{i}" for i in range(shape["vocab_size"] - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=2048)).save_pretrained(folder / "model")


def config(folder: Path, arguments: argparse.Namespace, way: Mapping[str, Any]) -> RunConfig:
    settings = {
        "model.path": str(folder / "model"),
        "sft.enabled": False,
        "discriminator.path": str(folder / "model"),
        "data.max_prompt_tokens": 32,
        "rollout.max_new_tokens": arguments.tokens,
        "rollout.batch_size": arguments.answers,
        "ppo.updates": 2,
        "ppo.batch_size": arguments.answers,
        "ppo.minibatch_size": arguments.answers,
        "ppo.micro_batch_size": 2,
        "ppo.epochs": 1,
        "ppo.chunk_tokens": 32,
        "ppo.save_every": 0,
        **way,
    }
    return load_config(None, settings)


def measured(way: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What each process of one training says."""
    processes = WAYS[way][0]
    sizes = ["--answers", str(arguments.answers), "--tokens", str(arguments.tokens)]
    command = ["-m", "benchmarks.scale_run", *sizes, "--work", way, str(folder)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
    # Without the threshold glibc keeps what is freed, and the peak is not that of what is held.
    ours = {"ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "100000", "TLCR_PROGRESS": "0"}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **ours}
    for old in folder.glob("figures-*.json"):
        old.unlink()
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    return [json.loads((folder / f"figures-{i}.json").read_text(encoding="utf-8")) for i in range(processes)]


class Measured(Callback):
    """Writes this process's figures after the last round, and ends the process: what follows is not measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
            figures = {"peak": peak, "tokens_per_s": metrics["time/tokens_per_s"]}
            (self.folder / f"figures-{process_index()}.json").write_text(json.dumps(figures), encoding="utf-8")
            barrier()
            os._exit(0)  # threads of torch's groups may keep a process that ends by itself


def train(cfg: RunConfig, folder: Path) -> None:
    """The models as an arm of a run makes them; the discriminator's head is new."""
    sharding = plan(cfg.sharding)
    policy = load_causal_lm(cfg.model, sharding=sharding)
    if cfg.lora.trains("policy"):
        roles = Roles(policy, cfg.lora, seed=0)
        reference, discriminator = roles.reference, roles.classifier("discriminator", TWO_CLASSES, trained=False)
        value_model = roles.classifier("value", {0: "value"})
    else:
        reference = load_causal_lm(cfg.model, sharding=sharding)
        discriminator = load_token_classifier(policy, cfg.model, id2label=TWO_CLASSES)
        made = build_value_model(cfg.ppo, cfg.model, policy=policy)
        assert made is not None
        value_model = made
    actor_critic = ActorCritic(policy, value_model, chunk_tokens=cfg.ppo.chunk_tokens)
    shard_all([actor_critic, reference, discriminator], sharding)
    tokenizer = load_tokenizer(cfg.model)
    with TemporaryDirectory(dir=folder) as out:
        train_ppo(
            cfg,
            actor_critic=actor_critic,
            reference=reference,
            tokenizer=tokenizer,
            reward_source=build_reward_source(
                cfg.reward,
                policy_tokenizer=tokenizer,
                discriminator=LoadedModel(discriminator, tokenizer),
                data=cfg.data,
                seed=0,
                micro_batch_size=2,
            ),
            prompts=[" ".join(f"w{(97 * row + 31 * i) % 40000}" for i in range(24)) for row in range(16)],
            folder=out,
            seed=0,
            callbacks=[Measured(folder)],
        )


if __name__ == "__main__":
    main()

"""What PPO takes on each of several GPUs for models of 0.1B to 70B, by the estimates of ``tlcr doctor``.

python -m benchmarks.scale             the table of states in docs/scale.md, in seconds
python -m benchmarks.scale --peaks     simulated peaks too: minutes for 8B, half an hour for all

PPO with a discriminator on prompts and answers of 512 and 256 tokens, bfloat16, gradient checkpointing, logits in
chunks, eight answers in a forward pass. Nothing is downloaded or computed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import LlamaConfig

from tlcr.config.loading import load_config
from tlcr.config.schema import LoRAConfig, RunConfig, ShardingConfig
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta
from tlcr.experiment.memory import estimate_run, roles_of_a_process

# Shapes of SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B.
SHAPES = {
    "0.1B": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "1.2B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
WAYS = {
    "whole": (ShardingConfig(), LoRAConfig(), (1,)),
    "LoRA roles": (ShardingConfig(), LoRAConfig(rank=16), (1,)),
    "LoRA roles, 4 bits": (ShardingConfig(), LoRAConfig(rank=16, base_bits=4), (1,)),
    "full": (ShardingConfig(kind="full"), LoRAConfig(), (8, 16, 64)),
    "LoRA roles, full": (ShardingConfig(kind="full"), LoRAConfig(rank=16), (8, 16)),
    "hybrid": (ShardingConfig(kind="hybrid"), LoRAConfig(), (16, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SHAPES), metavar="SIZE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peaks", action="store_true", help="simulate the steps")
    arguments = parser.parse_args()
    say("| model | way | GPUs | states, GB a GPU |" + (" peak, GB a GPU | in |" if arguments.peaks else ""))
    say("|---|---|---:|---:|" + ("---:|---|" if arguments.peaks else ""))
    for size in arguments.sizes:
        with TemporaryDirectory() as folder:
            LlamaConfig(**SHAPES[size], max_position_embeddings=8192).save_pretrained(folder)
            cfg = config(Path(folder))
            architecture = Architecture(build_on_meta(cfg.model))
        for way, (sharding, lora, counts) in WAYS.items():
            for gpus in counts:
                of_way, machine = replace(cfg, sharding=sharding, lora=lora), Machine(gpu=True, processes=gpus)
                states = sum(role.total for role in roles_of_a_process(of_way, architecture, machine))
                line = f"| {size} | {way} | {gpus} | {states / 1e9:.1f} |"
                if arguments.peaks:
                    ppo = estimate_run(of_way, architecture, machine)[-1]
                    line += f" {ppo.total / 1e9:.1f} | {ppo.peak.name} |"
                say(line)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def config(folder: Path) -> RunConfig:
    settings = {
        "model.path": str(folder),
        "model.dtype": "bfloat16",
        "model.gradient_checkpointing": True,
        "sft.enabled": False,
        "discriminator.path": str(folder),
        "data.max_prompt_tokens": 512,
        "rollout.max_new_tokens": 256,
        "rollout.batch_size": 32,
        "ppo.batch_size": 512,
        "ppo.minibatch_size": 128,
        "ppo.micro_batch_size": 8,
        "ppo.chunk_tokens": 1024,
    }
    return load_config(None, settings)


if __name__ == "__main__":
    main()

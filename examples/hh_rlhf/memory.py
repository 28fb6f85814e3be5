"""The memory of the recipes in this folder, by the estimates of ``tlcr doctor``: writes the files memory_*.txt.

    python -m examples.hh_rlhf.memory                        # every file; minutes for each
    python -m examples.hh_rlhf.memory one_gpu two_nodes      # some of them

Nothing is downloaded, and no GPU is needed. Each file ends with the same estimates for a model of two layers, which a
test computes again: after a change to a recipe, or to what tlcr takes of the memory, it wants the files made anew.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from tlcr.cli.doctor import memory_table
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta
from tlcr.experiment.memory import Estimate, estimate_run

FOLDER = Path(__file__).parent
SHAPES = FOLDER / "llama-3.1-8b"
GPUS = {"one_gpu": 1, "one_node": 8, "two_nodes": 16}
LAYERS = 2
WIDTH = 80

# Shapes of TinyLlama-1.1B, Llama-3.2-3B and Llama-2-7B.
MODELS: dict[str, dict[str, object]] = {
    "TinyLlama-1.1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4},
    "Llama-3.2-3B": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
                     "tie_word_embeddings": True},
    "Llama-2-7B (the paper's)": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or [*GPUS, "models"]
    for name in names:
        text = models(None) + "\n" + models(LAYERS) if name == "models" else recipe(name, None) + recipe(name, LAYERS)
        (FOLDER / f"memory_{name}.txt").write_text(text, encoding="utf-8")


def recipe(name: str, layers: int | None) -> str:
    """The doctor's table of a recipe; layers: of the model, None for its own."""
    with TemporaryDirectory() as shapes:
        config = AutoConfig.from_pretrained(SHAPES)
        cfg, architecture = load(FOLDER / f"llama_8b_{name}.yaml", config, Path(shapes), layers)
        estimates = estimate_run(cfg, architecture, Machine(gpu=True, processes=GPUS[name]))
    title = "" if layers is None else f"\nThe same with {layers} layers:\n\n"
    return title + as_text(estimates, replace(cfg, model=replace(cfg.model, path=SHAPES.name)))


def as_text(estimates: Sequence[Estimate], cfg: RunConfig) -> str:
    """The doctor's table, without blanks at the ends of lines."""
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(memory_table(estimates, cfg))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().strip().splitlines())


def models(layers: int | None, names: Sequence[str] = tuple(MODELS)) -> str:
    """A Markdown table: models that are held whole on one GPU, by config.yaml, in GiB."""
    lines = [
        "| model | SFT | reward model | discriminator | PPO | PPO with `ppo.value_model: shared` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        with TemporaryDirectory() as shapes:
            config = LlamaConfig(**MODELS[name], max_position_embeddings=4096)
            cfg, architecture = load(FOLDER / "config.yaml", config, Path(shapes), layers)
            shared = replace(cfg, ppo=replace(cfg.ppo, value_model="shared"))
            machine = Machine(gpu=True)
            whole = {estimate.stage: estimate.total for estimate in estimate_run(cfg, architecture, machine)}
            less = estimate_run(shared, architecture, machine)[-1].total
        cells = [whole[stage] for stage in ("sft", "reward model", "discriminator", "ppo")]
        title = name if layers is None else f"{name}, {layers} layers"
        lines.append(f"| {title} | {' | '.join(f'{count / 2**30:.1f} GiB' for count in (*cells, less))} |")
    return "\n".join(lines) + "\n"


def load(path: Path, config: PreTrainedConfig, folder: Path, layers: int | None) -> tuple[RunConfig, Architecture]:
    """A config, and the architecture of ``config`` with so many layers; None: its own. ``folder`` gets its shapes."""
    if layers is not None:
        config.num_hidden_layers = layers
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    cfg = load_config(path, {"model.path": str(folder)})
    return cfg, Architecture(build_on_meta(cfg.model))


if __name__ == "__main__":
    main()

"""What the processes of ``tlcr run CONFIG --check`` do: the plan of a run, and the run in small."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.config.trials import trials_of
from tlcr.experiment import pipeline
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta, shards_of
from tlcr.experiment.rehearsal import in_small, processes_in_small
from tlcr.experiment.simulation import held_of_shards
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.miniature import WIDTH
from tlcr.models.positions import check_fits

__all__ = ["plan", "run"]

CONFIG = "small.yaml"


def plan(
    cfg: RunConfig, stages: list[str], processes: int, folder: Path, say: Callable[[str], None]
) -> tuple[int, int, int]:
    """Steps 2 to 5 of a check, up to the small run, whose model, data and config it writes.

    Args:
        cfg: the run.
        stages: that it has.
        processes: on as many GPUs.
        folder: where the small run is to be.
        say: is given each line.

    Returns:
        The processes of the small run, how many of them stand for a node, and the width of its model.

    Raises:
        TlcrError: what would stop the run.
    """
    transformers_logging.disable_progress_bar()
    architecture = Architecture(build_on_meta(cfg.model))
    for line in (*_architecture(cfg, architecture, processes), *_steps(cfg, stages, processes)):
        say(line)
    small, of_a_node = processes_in_small(cfg, processes)
    say(f"5. the same architecture, {WIDTH} wide, on {_several(small, 'CPU process', 'es')}: one step of each stage")
    config = in_small(cfg, architecture.model.config, folder, processes=small)
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    return small, of_a_node, WIDTH


def run(folder: Path, stages: list[str]) -> None:
    """Runs the stages small, one by one, on this process and those that share it.

    Args:
        folder: what ``plan`` filled.
        stages: the stages of the run.
    """
    torch.set_num_threads(1)
    logging.basicConfig(format="tlcr: %(message)s", level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    for stage in stages:
        pipeline.stage(load_config(folder / CONFIG), stage, resume=True)


def _architecture(cfg: RunConfig, architecture: Architecture, processes: int) -> Iterator[str]:
    model, machine = architecture.model, Machine(gpu=True, processes=processes)
    longest = cfg.data.max_prompt_tokens + max(cfg.data.max_answer_tokens, cfg.rollout.max_response_tokens)
    check_fits(model, longest, "a prompt with an answer, each as long as the config allows,")
    make_top_layers_bidirectional(model, cfg.discriminator.bidirectional_layers)
    layers = model.config.get_text_config().num_hidden_layers
    size = architecture.size.parameters
    yield f"2. model: {type(model).__name__}, {size / 1e9:.2f}B parameters in {layers} layers, on the meta device"
    shards = shards_of(cfg, machine)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if cfg.lora.rank is not None:
        size = architecture.adapter(cfg.lora)
        yield f"3. adapters: {size / 1e6:.1f}M parameters each, for {', '.join(cfg.lora.roles)}"
    if shards is None:
        if cfg.lora.rank is None:
            yield "3. shards: none, every process holds whole models"
    else:
        held, units = held_of_shards(model, shards, getattr(torch, cfg.sharding.reduce_dtype))
        groups = f" in {shards[0]} groups" if len(shards) > 1 else ""
        yield f"3. shards: {units} units among {processes} processes{groups}, {held / whole:.3f} of the model in each"


def _steps(cfg: RunConfig, stages: list[str], processes: int) -> Iterator[str]:
    yield "4. plan, for each process:"
    for stage in stages:
        if stage == "labels":
            continue
        settings = getattr(cfg, stage)
        batch = cfg.ppo.minibatch_size if stage == "ppo" else settings.batch_size
        share = math.ceil(batch / processes)
        passes = math.ceil(share / min(settings.micro_batch_size or share, share))
        what = "answers" if stage == "ppo" else "examples"
        line = f"   {stage.replace('_', ' ')}: a step is {share} of {batch} {what}, in {_several(passes, 'pass', 'es')}"
        if stage == "ppo":
            steps = cfg.ppo.batch_size // batch * cfg.ppo.epochs
            rounds = f"{_several(cfg.ppo.updates, 'round')} of {_several(steps, 'step')}"
            line += f"; {rounds} for {_several(len(trials_of(cfg)), 'policy', plural='policies')}"
        yield line


def _several(number: int, name: str, ending: str = "s", *, plural: str | None = None) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {plural or name + ending}"

"""What two processes check of sharded models, together. Started by test_sharding."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.launched import Checks
from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError
from tlcr.training import optim
from tlcr.training.distributed import process_count, process_index
from tlcr.training.optim import build_optimizer, clip_gradients, gradient_norm, parameter_groups, scale_gradients
from tlcr.training.sharding import Sharding, is_sharded, local, plan, shard

checks = Checks()
IDS_BL = torch.tensor([[5, 9, 30, 41, 17], [7, 44, 12, 60, 2]])


def lm(dtype: torch.dtype = torch.float64, **changes: object) -> LlamaForCausalLM:
    """31 words: no size is a multiple of two, so that shards are of different sizes."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 63, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 32, **sizes, **changes}
    return LlamaForCausalLM(LlamaConfig(**values)).to(dtype).eval()


def full(**options: object) -> Sharding:
    sharding = plan(ShardingConfig(kind="full", **options))
    assert sharding is not None
    return sharding


def two(dtype: torch.dtype = torch.float64, **changes: object) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The same model sharded, and whole on each process."""
    sharded = lm(dtype, **changes)
    shard(sharded, full())
    return sharded, lm(dtype, **changes)


def known(parameter: Tensor, step: int) -> Tensor:
    """A gradient of the parameter's whole shape, with numbers that depend on the step only."""
    size = torch.arange(parameter.numel(), dtype=torch.float64)
    return (torch.sin(0.7 * size + step) / 10).reshape(parameter.shape).to(parameter.dtype)


def give_gradients(model: nn.Module, step: int) -> None:
    for parameter in model.parameters():
        gradient = known(parameter, step)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def whole(tensor: Tensor) -> Tensor:
    """In float64 where it is of whole numbers: no backend sends an int16."""
    if not isinstance(tensor, DTensor):
        return tensor if tensor.is_floating_point() else tensor.double()
    return (tensor if tensor.is_floating_point() else tensor.double()).full_tensor()


def same(sharded: nn.Module, alone: nn.Module) -> None:
    for (name, ours), theirs in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(whole(ours.detach()), theirs.detach()), name


@checks
def each_process_holds_its_half(_: Path) -> None:
    sharded, alone = two()
    assert process_count() == 2 and is_sharded(sharded) and not is_sharded(alone)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    share = sum(local(p).numel() for p in sharded.parameters()) / sum(p.numel() for p in alone.parameters())
    assert 0.4 < share < 0.6


@checks
def a_layer_within_a_layer_is_a_unit_of_its_own(_: Path) -> None:
    model = lm()
    model._no_split_modules = ["LlamaMLP", "LlamaDecoderLayer"]
    shard(model, full())
    units = [name for name, module in model.named_modules() if is_sharded(module)]
    assert units == ["", *(f"model.layers.{i}{part}" for i in (0, 1) for part in ("", ".mlp"))]
    torch.testing.assert_close(model(IDS_BL).logits, lm()(IDS_BL).logits, rtol=1e-12, atol=1e-12)


@checks
def layers_that_share_a_parameter_are_refused(_: Path) -> None:
    model = lm()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj and model.layers.0.mlp.up_proj share a param"):
        shard(model, full())
    assert not any(map(is_sharded, model.modules()))


@checks
def a_model_that_names_no_layers_is_noted(_: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("tlcr").addHandler(handler)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shard(model, full())
    logging.getLogger("tlcr").removeHandler(handler)
    assert len(said) == 1 and said[0].startswith("Sequential names no layers")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@checks
def norms_and_factors_are_those_of_the_whole(_: Path) -> None:
    sharded, alone = two()
    for model in (sharded, alone):
        give_gradients(model, 0)
    norms = [gradient_norm(model.parameters()) for model in (sharded, alone)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for model in (sharded, alone):
        clip_gradients(model.parameters(), norms[1].item(), norms[1].item() / 3)
        scale_gradients(model.parameters(), 0.5)
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert torch.equal(whole(ours.grad), theirs.grad)
    # what is not finite on one process is seen by both
    if process_index() == 1:
        local(next(iter(sharded.parameters())).grad)[-1, -1] = torch.nan
    assert gradient_norm(sharded.parameters()).isnan()
    assert gradient_norm([]) == 0


@checks
def the_optimiser_takes_the_steps_of_one_process(_: Path) -> None:
    """Bit for bit, and in pieces: it is elementwise."""
    optim.PIECE = 100
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        sharded, alone = two(dtype, tie_word_embeddings=True)
        optimizers = [
            build_optimizer(parameter_groups(model, learning_rate=1e-2, weight_decay=0.1)) for model in (sharded, alone)
        ]
        numbers = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        assert numbers[0] == numbers[1]
        for step in range(3):
            for model, optimizer in zip((sharded, alone), optimizers, strict=True):
                give_gradients(model, step)
                optimizer.step()
        same(sharded, alone)
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            states = optimizers[0].state[ours], optimizers[1].state[theirs]
            assert states[0].keys() == states[1].keys()
            for name, value in states[0].items():
                assert isinstance(value, DTensor) == (name != "step")
                assert torch.equal(whole(value), whole(states[1][name])), (dtype, name)
                assert name == "step" or value.placements == (Shard(0),)


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))

"""What two processes check of PPO with roles over one sharded backbone, together. Started by test_sharding."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from tests.launched import Checks
from tests.ppo.helpers import PROMPTS, known_rollout, small_config, without_times
from tests.ppo.sharded import (
    Case,
    StopOneProcess,
    a_tokenizer,
    assert_same,
    lm,
    run_lm,
    score_all,
    update,
    whole,
)
from tlcr.config.schema import LoRAConfig, ModelConfig, PPOConfig, RunConfig, ShardingConfig
from tlcr.errors import CheckpointError
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.loading import load_causal_lm, load_token_classifier
from tlcr.models.lora.adapters import add_adapter, base_digest, own_parameters
from tlcr.models.lora.files import save_trained
from tlcr.models.lora.roles import Roles
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.models.stored import is_unread
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.run import PPOResult
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import CallableSource, DiscriminatorSource, RewardSource
from tlcr.rewards.sources.frozen_model import FrozenModel
from tlcr.training.distributed import barrier, is_main_process, on_main_process, process_index
from tlcr.training.metrics import read_metrics
from tlcr.training.sharding import Sharding, gathered, has_shards, local, plan, reshard, shard_all, shard_model

checks = Checks()
LORA = LoRAConfig(rank=3)
CLASSES = {0: "negative", 1: "positive"}
CASES = (
    Case("role"),
    Case("role", chunk=3, exact_kl=True),
    Case("role", checkpointing=True),
    Case("role", tied=True, chunk=3, checkpointing=True),
    Case("shared", exact_kl=True),
    Case("shared", tied=True, chunk=3, checkpointing=True),
    Case("whole", chunk=3),
    Case("whole", exact_kl=True, checkpointing=True),
)
"""Values by a role of their own, by a head on the policy, or by a model that is trained whole."""
LOW_IDS = "tests.ppo.helpers:reward_low_ids"


def full() -> Sharding:
    sharding = plan(ShardingConfig(kind="full"))
    assert sharding is not None
    return sharding


class Models:
    """Policy, values, reference and discriminator over one backbone; every adapter changes something."""

    def __init__(
        self, model: PreTrainedModel, *, values: str = "role", chunk: int | None = None, lora: LoRAConfig = LORA
    ) -> None:
        self.roles = Roles(model, lora, seed=0)
        value_model = None
        if values == "role":
            value_model = self.roles.classifier("value", {0: "value"})
        elif values == "whole":
            other = lm(2, Case(), model.dtype)
            value_model = build_value_model(PPOConfig(), ModelConfig(), policy=other)
        self.discriminator = self.roles.classifier("discriminator", CLASSES, trained=False)
        self.actor_critic = ActorCritic(self.roles.policy, value_model, chunk_tokens=chunk)
        self.reference = self.roles.reference
        move([*self.actor_critic.policy_parameters(), *self.actor_critic.value_parameters()])
        move(own_parameters(self.discriminator))

    def cut(self) -> Models:
        shard_all([self.actor_critic, self.reference, self.discriminator], full())
        return self

    @property
    def pair(self) -> tuple[ActorCritic, PreTrainedModel]:
        return self.actor_critic, self.reference


@torch.no_grad()
def move(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        places = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        parameter.add_(0.1 * torch.sin(places))


def models(case: Case, dtype: torch.dtype = torch.float64) -> Models:
    model = lm(1, case, dtype)
    if case.checkpointing:
        enable_gradient_checkpointing(model)
    return Models(model, values=case.values, chunk=case.chunk)


@checks
def an_update_is_that_of_one_process(_: Path) -> None:
    """Losses, norms and the gradient of every adapter and head; the base has none, and keeps its bits."""
    for case in CASES:
        ours, theirs = models(case).cut(), models(case)
        found = update(*ours.pair, case, alone=False)
        wanted = update(*theirs.pair, case, alone=True)
        assert_same(found, wanted, case)
        trained = {name for name, p in theirs.actor_critic.named_parameters() if p.requires_grad}
        assert found[1][0].keys() == trained and any("lora_A.policy" in name for name in trained)
        assert any("lora_A.value" in name for name in trained) == (case.values == "role")


@checks
def an_adapted_output_head_has_the_gradient_of_one_process(_: Path) -> None:
    lora = LoRAConfig(rank=3, targets=("all-linear", "lm_head"))
    for chunk in (None, 3):
        case = Case("role", chunk=chunk, exact_kl=True)
        ours, theirs = (Models(lm(1, case, torch.float64), chunk=chunk, lora=lora) for _ in range(2))
        found = update(*ours.cut().pair, case, alone=False)
        assert_same(found, update(*theirs.pair, case, alone=True), case)
        assert "policy.lm_head.lora_B.policy.weight" in found[1][0]


@checks
def one_copy_of_the_base_is_cut_and_nothing_else_is_held(_: Path) -> None:
    ours, theirs = models(Case("role")).cut(), models(Case("role"))
    everyone = (ours.actor_critic, ours.reference, ours.discriminator)
    assert all(isinstance(p, DTensor) for model in everyone for p in model.parameters())
    one = {id(p): local(p).numel() for model in everyone for p in model.parameters()}
    plain = {
        id(p): p.numel()
        for model in (theirs.actor_critic, theirs.reference, theirs.discriminator)
        for p in model.parameters()
    }
    assert len(one) == len(plain) and 0.4 < sum(one.values()) / sum(plain.values()) < 0.6


@checks
def a_bfloat16_base_is_gathered_with_its_float32_adapters(_: Path) -> None:
    """No adapter is a unit of its own: only what is trained must be of one dtype."""
    for values in ("role", "shared"):
        case = Case(values)
        ours, theirs = models(case, torch.bfloat16).cut(), models(case, torch.bfloat16)
        units = [type(m).__name__ for m in ours.actor_critic.modules() if type(m).__name__.startswith("FSDP")]
        assert units == ["FSDPLlamaDecoderLayer"] * 2, units
        found = update(*ours.pair, case, alone=False), update(*theirs.pair, case, alone=True)
        assert_same(*found, case, rtol=0.05)
        assert {g.dtype for g in found[0][1][0].values()} == {torch.float32}


@checks
def every_role_says_what_it_says_whole(folder: Path) -> None:
    """In turn, before and after an update and a step; and each answer that the policy samples."""
    tokenizer, case = a_tokenizer(folder), Case("role", chunk=3)
    ours, theirs = models(case, torch.float32).cut(), models(case, torch.float32)
    ids = torch.tensor([[5, 9, 30, 41, 17], [7, 44, 12, 60, 2]])
    for time in range(2):
        with torch.no_grad():
            for role in ("reference", "discriminator"):
                one, other = (getattr(of, role)(input_ids=ids).logits for of in (ours, theirs))
                assert torch.equal(one, other), role
        own = 4 + 3 * process_index()
        answers = []
        for of in (ours, theirs):
            with gathered(of.actor_critic, only=of.actor_critic.policy):
                answers.append(
                    generate(
                        of.actor_critic.policy,
                        tokenizer,
                        PROMPTS[:own],
                        small_config().rollout,
                        max_prompt_tokens=8,
                        generator=seeded_generator("x", process_index()),
                    )
                )
        assert torch.equal(answers[0].response_ids_BT, answers[1].response_ids_BT)
        assert has_shards(ours.actor_critic)
        scores = [score_all(*of.pair, case, alone=of is theirs) for of in (ours, theirs)]
        rows = slice(process_index(), None, 2)
        columns = scores[0].logprobs_BT.shape[1]
        for name in ("logprobs_BT", "ref_logprobs_BT", "values_BT"):
            one, other = getattr(scores[0], name), getattr(scores[1], name)[rows, :columns]
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        reshard(ours.actor_critic)
        if time == 0:
            with torch.no_grad():
                for of in (ours, theirs):
                    for parameter in of.actor_critic.policy_parameters():
                        local(parameter).mul_(1.5)


# ---- whole runs


def config(**ppo: Any) -> RunConfig:
    cfg = small_config(learning_rate=1e-2, value_learning_rate=1e-2, **ppo)
    return dataclasses.replace(cfg, lora=LORA, sharding=ShardingConfig(kind="full"))


def run(of: Models, cfg: RunConfig, folder: Path, source: RewardSource | None = None, **options: Any) -> PPOResult:
    return train_ppo(
        cfg,
        actor_critic=of.actor_critic,
        reference=of.reference,
        tokenizer=a_tokenizer(folder.parent),
        reward_source=source or CallableSource(LOW_IDS),
        prompts=PROMPTS,
        folder=folder,
        seed=3,
        **options,
    )


def state(of: Models) -> dict[str, Tensor]:
    return {name: local(p.detach()).clone() for name, p in of.actor_critic.named_parameters()}


@checks
def a_run_leaves_the_base_alone_and_ends_as_one_of_whole_models(folder: Path) -> None:
    """And what it writes: peft loads the adapter, transformers the merged model."""
    tokenizer, ids = a_tokenizer(folder), torch.tensor([[5, 9, 30, 41, 17]])
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for kind in ("full", "none"):
            out = folder / f"run-{kind}-{dtype}"
            of = Models(run_lm(1, dtype))
            if is_main_process():
                run_lm(1, dtype).save_pretrained(folder / f"base-{dtype}")
            barrier()
            of.roles.policy.name_or_path = str(folder / f"base-{dtype}")
            before = {name: p.detach().clone() for name, p in of.roles.policy.named_parameters()}
            source = judged(of, tokenizer)
            cfg = dataclasses.replace(config(), sharding=ShardingConfig(kind=kind))
            result = run(of, dataclasses.replace(cfg, reward=discriminated(cfg)), out, source)
            barrier()
            frozen = {name for name, p in of.roles.policy.named_parameters() if not p.requires_grad}
            after = {name: whole(p.detach()) for name, p in of.roles.policy.named_parameters()}
            assert has_shards(of.discriminator) == (kind == "full")
            assert len(frozen) > 10 and all(torch.equal(after[name], before[name]) for name in frozen)
            assert all(not torch.equal(after[name], before[name]) for name in after.keys() - frozen)
            with gathered(of.actor_critic), torch.no_grad():
                logits = of.roles.policy(input_ids=ids).logits
            ends.append((after, read_metrics(out / "metrics.jsonl"), result, logits))
        assert ends[0][1][0]["kl/per_token"] != 0  # the adapters did not begin at zero
        if dtype == torch.float32:  # AdamW turns a gradient that is 0 but for rounding into a step of the whole rate
            for tolerance, ours, theirs in zip((1e-4, 1e-2, 1e-1, 1e-1), ends[0][1], ends[1][1], strict=True):
                assert without_times(ours) == pytest.approx(without_times(theirs), rel=tolerance, abs=tolerance)

        policy, wanted = ends[0][2].policy_folder, ends[0][3]
        base = AutoModelForCausalLM.from_pretrained(folder / f"base-{dtype}")
        rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
        merged = AutoModelForCausalLM.from_pretrained(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls what transformers has renamed
            adapted = PeftModel.from_pretrained(base, policy / "adapter")
        for loaded in (merged, adapted):
            with torch.no_grad():
                torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, **rounding)


def judged(of: Models, tokenizer: Any) -> DiscriminatorSource:
    return DiscriminatorSource(FrozenModel(of.discriminator, tokenizer, tokenizer, max_prompt_tokens=8))


def discriminated(cfg: RunConfig) -> Any:
    return dataclasses.replace(cfg.reward, kind="continuous", callable=None)


@checks
def a_run_that_was_stopped_ends_as_one_that_was_not(folder: Path) -> None:
    """Bit for bit, from checkpoints of adapters and heads alone; and a finished one is loaded."""
    for values, dtype in (("role", torch.float32), ("whole", torch.bfloat16), ("shared", torch.bfloat16)):
        make = partial(Models, values=values)
        ppo = {"updates": 5, "save_every": 2, "value_model": "shared" if values == "shared" else "separate"}
        cfg, name = config(**ppo), f"{values}-{dtype}"
        straight, out = make(run_lm(1, dtype)), folder / f"stopped-{name}"
        run(straight, cfg, folder / f"straight-{name}")
        with pytest.raises(KeyboardInterrupt, match=r"after step 3; the state is saved in .*/step-000003"):
            run(make(run_lm(1, dtype)), cfg, out, callbacks=[StopOneProcess(3)])
        barrier()
        size = sum(file.stat().st_size for file in (out / "checkpoints").rglob("step-000003/shards/*"))
        trained = sum(p.numel() * p.element_size() for p in straight.actor_critic.parameters() if p.requires_grad)
        assert trained < size < 8 * trained
        with pytest.raises(CheckpointError, match="frozen"):
            run(make(run_lm(2, dtype)), cfg, out, resume=True)
        resumed = make(run_lm(1, dtype))
        run(resumed, cfg, out, resume=True)
        barrier()
        places = out, folder / f"straight-{name}"
        rows = [[without_times(row) for row in read_metrics(path / "metrics.jsonl")] for path in places]
        assert rows[0] == rows[1]
        again = make(run_lm(1, dtype))
        run(again, cfg, out, resume=True)
        for loaded in (resumed, again):
            ours, theirs = state(loaded), state(straight)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs), name


# ---- straight from the files


@checks
def roles_over_a_model_that_is_not_read_yet_are_those_of_a_whole_one(folder: Path) -> None:
    """The base is read once, by each process its part; and a discriminator knows it by its digest."""
    tokenizer = a_tokenizer(folder)
    for dtype in ("float32", "bfloat16"):
        path = folder / f"stored-{dtype}"

        def write(path: Path = path, dtype: str = dtype) -> None:
            run_lm(1, getattr(torch, dtype)).save_pretrained(path)

        on_main_process(write)
        cfg = ModelConfig(path=str(path), dtype=dtype)
        judge = load_token_classifier(load_causal_lm(cfg), cfg, id2label=CLASSES)
        add_adapter(judge, LORA, "discriminator", seed=0)
        move([parameter for parameter in judge.parameters() if parameter.requires_grad])
        save_trained(judge, tokenizer, folder / f"judge-{dtype}")
        barrier()
        found = []
        for sharding in (full(), None):
            model = load_causal_lm(cfg, sharding=sharding)
            assert is_unread(model) == (sharding is not None)
            digest = base_digest(model)
            roles = Roles(model, LORA, seed=0)
            assert base_digest(roles.policy) == digest
            values = roles.classifier("value", {0: "value"})
            actor_critic = ActorCritic(roles.policy, values, chunk_tokens=3)
            joined = roles.load_classifier("discriminator", folder / f"judge-{dtype}" / "adapter")
            shard_all([actor_critic, roles.reference, joined], sharding)
            assert not is_unread(model) and base_digest(model) == digest
            found.append((actor_critic, roles.reference, joined))
        for ours, theirs in zip(*found, strict=True):
            for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert torch.equal(whole(one.detach()), other.detach()), name
                assert one.requires_grad == other.requires_grad, name
        rows = known_rollout([0, 1, 2, 3])
        with torch.no_grad():
            ours, theirs = (judge(input_ids=rows.response_ids_BT).logits for *_, judge in found)
        assert torch.equal(ours, theirs)


@checks
def an_adapter_alone_is_saved_from_shards_as_from_a_whole_model(folder: Path) -> None:
    """Both folders, byte for byte, of a model that was read straight into shards."""
    tokenizer = a_tokenizer(folder)
    for dtype in ("float32", "bfloat16"):
        cfg = ModelConfig(path=str(folder / f"stored-{dtype}"), dtype=dtype)
        for sharding in (full(), None):
            model = load_causal_lm(cfg, sharding=sharding)
            add_adapter(model, LORA, "sft", seed=4)
            move([p for name, p in model.named_parameters() if "lora_B" in name])
            shard_model(model, sharding)
            save_trained(model, tokenizer, folder / f"saved-{'whole' if sharding is None else 'cut'}-{dtype}")
        barrier()
        ours, theirs = (folder / f"saved-{way}-{dtype}" for way in ("cut", "whole"))
        files = sorted(file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file())
        assert len(files) > 6 and files == sorted(f.relative_to(ours) for f in ours.rglob("*") if f.is_file())
        for file in files:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
        assert type(AutoModelForCausalLM.from_pretrained(ours)) is LlamaForCausalLM


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))

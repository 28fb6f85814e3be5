"""What several processes check of PPO with sharded models, together. Started by tests/ppo/test_sharding.py."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from tests.launched import Checks
from tests.ppo.helpers import PROMPTS, known_rollout, known_update, run_ppo, small_config, without_times
from tests.ppo.test_conversation import often_ending
from tlcr.config.schema import (
    DataConfig,
    KLConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ShardingConfig,
)
from tlcr.errors import DataError, TrainingDiverged
from tlcr.models.actor_critic import ActorCritic, build_value_model, load_value_head
from tlcr.models.heads import classification_head, use_float32_head
from tlcr.models.layers import fuse_layers
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.packing import packs_rows
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import UpdateStatistics, ppo_update
from tlcr.rewards.sources import LoadedModel, build_reward_source, models_of
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import latest_checkpoint, load_checkpoint
from tlcr.training.distributed import barrier, process_count, process_index
from tlcr.training.metrics import read_metrics
from tlcr.training.sharding import Sharding, gathered, has_shards, local, plan, reshard, shard
from tlcr.types import Advantages, PolicyScores, RewardSignal

checks = Checks()
RTOL = 1e-9


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compute the same update."""

    values: str = "separate"
    tied: bool = False
    chunk: int | None = None
    exact_kl: bool = False
    fused: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))


def all_cases() -> Iterator[Case]:
    for values in ("separate", "shared"):
        for tied in (False, True):
            for chunk in (None, 3):
                for exact_kl in (False, True):
                    for special in ({}, {"fused": True}, {"checkpointing": True}):
                        yield Case(values, tied, chunk, exact_kl, **special)


def lm_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 63, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = {"vocab_size": 400, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, **sizes}
    return LlamaConfig(**(values | changes))


def lm(seed: int, case: Case, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(lm_config(tie_word_embeddings=case.tied)).to(dtype).eval()


def models(case: Case, dtype: torch.dtype = torch.float64) -> tuple[ActorCritic, LlamaForCausalLM]:
    """Policy with values, and a reference with other weights."""
    policy, value_model = lm(1, case, dtype), None
    if case.values == "separate":
        torch.manual_seed(2)
        value_model = LlamaForTokenClassification(lm_config(id2label={0: "value"})).to(dtype)
    actor_critic = ActorCritic(policy, value_model, chunk_tokens=case.chunk)
    head = actor_critic.value_head if value_model is None else classification_head(actor_critic.value_model)
    with torch.no_grad():
        head.weight.copy_(torch.sin(torch.arange(head.weight.numel())).reshape(head.weight.shape))
    reference = lm(9, case, dtype).requires_grad_(False)
    if case.fused:
        for model in (policy, value_model, reference):
            if model is not None:
                fuse_layers(model)
    if case.checkpointing:
        for model in (policy, value_model):
            if model is not None:
                enable_gradient_checkpointing(model)
    return actor_critic, reference


def sharded(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[ActorCritic, LlamaForCausalLM]:
    actor_critic, reference = models(case, dtype)
    sharding = plan(ShardingConfig(**({"kind": "full"} | options)))
    for root in (actor_critic, reference):
        shard(root, sharding)
    return actor_critic, reference


class Recorder(torch.optim.SGD):
    """An optimiser that moves nothing and keeps the gradients of every step, whole."""

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__(actor_critic.parameters(), lr=0.0)
        self.steps: list[dict[str, Tensor]] = []
        self._named = list(actor_critic.named_parameters())

    def step(self, closure: Any = None) -> None:
        self.steps.append({name: whole(p.grad).clone() for name, p in self._named if p.grad is not None})


class Alone:
    """The accelerator of a process that shares with none: what the update of one process is given."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()


def a_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def score_all(actor_critic: ActorCritic, reference: nn.Module, case: Case, *, alone: bool) -> PolicyScores:
    rows = list(range(8)) if alone else list(range(8))[process_index() :: process_count()]
    return score_rollout(
        actor_critic,
        reference,
        known_rollout(rows),
        temperature=0.7,
        micro_batch_size=3,
        micro_batch_tokens=12,
        exact_kl=case.exact_kl,
    )


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def update(
    actor_critic: ActorCritic,
    reference: nn.Module,
    case: Case,
    *,
    alone: bool,
    value_only: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    advantages: Tensor | None = None,
    packed: bool = False,
    **ppo: Any,
) -> tuple[UpdateStatistics, list[dict[str, Tensor]]]:
    """A known update, of this process's share of the rows or of all; its statistics, and the gradients of its steps."""
    rows = list(range(8)) if alone else list(range(8))[process_index() :: process_count()]
    rollout = known_rollout(rows)
    scores, known = known_update(rollout, rows)
    if advantages is not None:
        known = dataclasses.replace(known, advantages_BT=advantages[: len(rows), : rollout.mask_BT.shape[1]])
    recorder = Recorder(actor_critic)
    kl = KLConfig(placement="loss", estimator="full" if case.exact_kl else "k3")
    given: dict[str, Any] = {"minibatch_size": 8, "micro_batch_tokens": 12, "entropy_coef": 0.1, "max_grad_norm": 0.5}
    statistics = ppo_update(
        actor_critic,
        optimizer or recorder,
        rollout,
        scores,
        known,
        PPOConfig(**(given | ppo)),
        kl,
        kl_coef=0.3,
        temperature=0.7,
        reference=reference,
        accelerator=Alone() if alone else Accelerator(cpu=True),
        generator=seeded_generator("test", 0),
        value_only=value_only,
        packed=packed,
    )
    return statistics, recorder.steps


def assert_same(
    ours: tuple[UpdateStatistics, list[dict[str, Tensor]]],
    theirs: tuple[UpdateStatistics, list[dict[str, Tensor]]],
    what: object,
    rtol: float = RTOL,
) -> None:
    figures = [torch.tensor(list(vars(found[0]).values()), dtype=torch.float64) for found in (ours, theirs)]
    torch.testing.assert_close(*figures, rtol=rtol, atol=1e-12, msg=lambda text: f"{what}: {text}")
    assert len(ours[1]) == len(theirs[1])
    for mine, wanted in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == wanted.keys(), (what, mine.keys() ^ wanted.keys())
        for name, gradient in mine.items():
            norm = wanted[name].norm()
            assert (gradient - wanted[name]).norm() <= rtol * norm, (what, name, gradient.norm(), norm)


@checks
def an_update_is_that_of_one_process(_: Path) -> None:
    """Losses, norms and every gradient, with uneven micro-batches, in every way to compute them."""
    for case in all_cases():
        ours = update(*sharded(case), case, alone=False)
        assert_same(ours, update(*models(case), case, alone=True), case)


@checks
def each_process_holds_its_half(_: Path) -> None:
    for options in ({}, {"offload": True}):
        for root, other in zip(sharded(Case(), **options), models(Case()), strict=True):
            assert all(isinstance(parameter, DTensor) for parameter in root.parameters())
            mine = sum(local(p).numel() for p in root.parameters())
            assert 0.4 < mine / sum(p.numel() for p in other.parameters()) < 0.6


@checks
def packed_rows_are_read_by_shards_too(_: Path) -> None:
    for case in (Case(), Case("shared", chunk=3, exact_kl=True)):
        pair = sharded(case)
        assert packs_rows("always", *pair)
        assert all(isinstance(parameter, DTensor) for root in pair for parameter in root.parameters())
        ours = update(*pair, case, alone=False, packed=True)
        assert_same(ours, update(*models(case), case, alone=True, packed=True), case)


@checks
def an_update_of_offloaded_shards_is_the_same(_: Path) -> None:
    case = Case("shared", chunk=3, exact_kl=True)
    ours = update(*sharded(case, offload=True), case, alone=False)
    assert_same(ours, update(*models(case), case, alone=True), case)


@checks
def a_bfloat16_policy_keeps_its_float32_head(_: Path) -> None:
    """Gradients of a unit are summed in one dtype, so the head is a unit of its own."""
    for values in ("separate", "shared"):
        case = Case(values)
        ours, theirs = sharded(case, torch.bfloat16), models(case, torch.bfloat16)
        found = [update(*ours, case, alone=False), update(*theirs, case, alone=True)]
        assert {p.dtype for p in ours[0].parameters()} == {torch.bfloat16, torch.float32}
        assert_same(*found, case, rtol=0.05)
        for name, gradient in found[0][1][0].items():
            assert gradient.dtype == found[1][1][0][name].dtype


@checks
def networks_take_turns_and_scores_are_fresh(_: Path) -> None:
    """Value warm-up, both, the policy alone, both: with steps between, and scores before each, as PPO takes them."""
    for case in (Case(), Case("shared", chunk=3, exact_kl=True)):
        found = []
        for alone in (False, True):
            actor_critic, reference = models(case) if alone else sharded(case)
            optimizer = torch.optim.AdamW(actor_critic.parameters(), lr=1e-3)
            scores: list[PolicyScores] = []
            for turn in ({"value_only": True}, {}, {"value_coef": 0.0}, {"epochs": 2}):
                scores.append(score_all(actor_critic, reference, case, alone=alone))
                update(actor_critic, reference, case, alone=alone, optimizer=optimizer, **turn)
            found.append((scores, {name: whole(p.detach()) for name, p in actor_critic.named_parameters()}))
        (ours, weights), (theirs, wanted) = found
        rows = slice(process_index(), None, process_count())
        for mine, everyones in zip(ours, theirs, strict=True):
            for field in dataclasses.fields(PolicyScores):
                x_BT, y_BT = getattr(mine, field.name), getattr(everyones, field.name)
                if x_BT is None:
                    continue
                torch.testing.assert_close(x_BT, y_BT[rows, : x_BT.shape[1]], rtol=1e-8, atol=1e-10)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-8, atol=1e-10)
        assert not torch.equal(ours[0].logprobs_BT, ours[-1].logprobs_BT)


@checks
def a_step_after_a_forward_pass_reaches_the_next_one(_: Path) -> None:
    """A root stays gathered after a forward pass without a backward pass: it would be read again as it was."""
    actor_critic, reference = sharded(Case())
    before = score_all(actor_critic, reference, Case(), alone=False)
    reshard(actor_critic)
    with torch.no_grad():
        for parameter in actor_critic.parameters():
            local(parameter).mul_(1.1)
    after = score_all(actor_critic, reference, Case(), alone=False)
    plain, _reference = models(Case())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    wanted = score_all(plain, reference, Case(), alone=False)
    torch.testing.assert_close(after.logprobs_BT, wanted.logprobs_BT, rtol=RTOL, atol=1e-12)
    assert not torch.allclose(after.logprobs_BT, before.logprobs_BT)


@checks
def an_update_ends_early_on_both(_: Path) -> None:
    case, pair = Case(), sharded(Case())
    statistics, steps = update(*pair, case, alone=False, target_kl=1e-6, epochs=3)
    assert statistics.stopped_early and not steps
    assert_same(update(*pair, case, alone=False), update(*models(case), case, alone=True), "after it")


@checks
def a_divergence_of_one_process_ends_both(_: Path) -> None:
    case, pair = Case(), sharded(Case())
    with torch.no_grad():
        before = [local(parameter).clone() for parameter in pair[0].parameters()]
    broken = known_update(known_rollout())[1].advantages_BT.clone()
    if process_index() == 1:
        broken[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        update(*pair, case, alone=False, advantages=broken)
    assert all(torch.equal(local(p), old) for p, old in zip(pair[0].parameters(), before, strict=True))


@checks
def sampling_is_that_of_a_whole_model(folder: Path) -> None:
    """Before any forward pass and after one, answers of other lengths on each process, from both engines."""
    tokenizer = a_tokenizer(folder)
    own = 4 + 3 * process_index()
    for dtype, names in ((torch.float32, ("generate", "paged")), (torch.bfloat16, ("generate",))):
        pair, (plain, _) = sharded(Case(), dtype), models(Case(), dtype)
        for name in names:
            for _time in range(2):
                cfg = RolloutConfig(max_new_tokens=own, engine=name, batch_size=5)  # other numbers of batches, too
                answers = []
                for root in (pair[0], plain):
                    with gathered(root, only=root.policy):
                        answers.append(
                            generate(
                                root.policy,
                                tokenizer,
                                PROMPTS[:own],
                                cfg,
                                max_prompt_tokens=8,
                                generator=seeded_generator("x", process_index()),
                            )
                        )
                assert torch.equal(answers[0].response_ids_BT, answers[1].response_ids_BT), (dtype, name)
                assert has_shards(pair[0].policy) and has_shards(pair[0].value_model)
                score_all(*pair, Case(), alone=False)


@checks
def gathered_blocks_hold_what_they_name(_: Path) -> None:
    actor_critic, _reference = sharded(Case())
    with gathered(actor_critic, only=actor_critic.policy):
        assert not has_shards(actor_critic.policy) and has_shards(actor_critic.value_model)
        with gathered(actor_critic):
            assert not has_shards(actor_critic)
            reshard(actor_critic)
            assert not has_shards(actor_critic)
        assert not has_shards(actor_critic.policy) and has_shards(actor_critic.value_model)
    assert all(isinstance(parameter, DTensor) for parameter in actor_critic.parameters())
    plain, _ = models(Case())
    with gathered(plain):
        pass


@checks
def saved_models_are_ordinary_folders(folder: Path) -> None:
    tokenizer = a_tokenizer(folder)
    for number, case in enumerate((Case(), Case("shared"), Case(tied=True))):
        (ours, _), (plain, _) = sharded(case, torch.float32), models(case, torch.float32)
        policy_folder, value_folder = folder / f"policy-{number}", folder / f"value-{number}"
        ours.save(tokenizer, policy_folder, value_folder)
        barrier()
        wanted = plain.policy.state_dict()
        loaded = AutoModelForCausalLM.from_pretrained(policy_folder)
        assert type(loaded) is LlamaForCausalLM and loaded.config.tie_word_embeddings == case.tied
        assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.state_dict().items())
        if case.values == "separate":
            values = AutoModelForTokenClassification.from_pretrained(value_folder)
            assert all(torch.equal(w, plain.value_model.state_dict()[n]) for n, w in values.state_dict().items())
        else:
            assert torch.equal(load_value_head(value_folder).weight, plain.value_head.weight)
        # and what a finished run loads
        with torch.no_grad():
            for parameter in ours.parameters():
                local(parameter).zero_()
        ours.restore(ModelConfig(path=str(policy_folder)), value_folder, sharding=plan(ShardingConfig(kind="full")))
        for (name, parameter), weight in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(parameter.detach()), weight.detach()), name


@checks
def reward_sources_judge_as_whole_models_do(folder: Path) -> None:
    """Three answers on one process and five on the other, two at a time: no forward pass communicates."""
    tokenizer = a_tokenizer(folder)
    rollout = known_rollout([0, 1, 2] if process_index() == 0 else [3, 4, 5, 6, 7])

    def signals(sharding: Sharding | None) -> dict[str, RewardSignal]:
        torch.manual_seed(4)
        judges = [
            LlamaForTokenClassification(lm_config(num_labels=3)),
            LlamaForSequenceClassification(lm_config(num_labels=1)),
            LlamaForCausalLM(lm_config()),
            LlamaForCausalLM(lm_config()),
        ]
        for judge in judges:
            use_float32_head(judge)
            shard(judge.eval(), sharding)
        discriminator, reward_model, dpo = (LoadedModel(judge, tokenizer) for judge in judges[:3])
        found = {}
        for kind in ("continuous", "spans", "sequence", "uniform", "attention", "prefix_difference", "dpo"):
            for coef in (0.0,) if kind == "sequence" else (0.0, 0.5):
                source = build_reward_source(
                    RewardConfig(kind=kind, sequence_coef=coef),
                    policy_tokenizer=tokenizer,
                    discriminator=discriminator,
                    reward_model=reward_model,
                    dpo=dpo,
                    reference=judges[3],
                    data=DataConfig(),
                    seed=0,
                    micro_batch_size=2,
                )
                assert models_of(source)
                with gathered(*models_of(source)):
                    found[f"{kind} {coef}"] = source(rollout)
                assert sharding is None or all(map(has_shards, judges))
        return found

    ours, theirs = signals(plan(ShardingConfig(kind="full"))), signals(None)
    for name, mine in ours.items():
        for field in dataclasses.fields(mine):
            x, y = getattr(mine, field.name), getattr(theirs[name], field.name)
            assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), (name, field.name)


def run_lm(seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The policy of a whole run."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(lm_config(bos_token_id=1, eos_token_id=2)).to(dtype).eval()


@checks
def a_whole_run_ends_as_one_of_whole_models(folder: Path) -> None:
    """A policy that sits out, an evaluation, early stopping, KL in the reward; then its finished folder is loaded.

    In float64: Adam divides a gradient by its size, so that in float32 one of rounding alone, which differs between one
    process and two, moves its weight as far as any other.
    """
    tokenizer, make_lm = a_tokenizer(folder), partial(run_lm, dtype=torch.float64)
    plain = small_config(value_warmup_updates=1, evaluate_every=2, target_kl=0.5)

    def evaluate(actor_critic: ActorCritic, update: int) -> dict[str, float]:
        with gathered(actor_critic):
            return {"weights": sum(p.square().sum().item() for p in actor_critic.parameters())}

    ended = {}
    for values in ("separate", "shared"):
        for name, sharding in (("whole", ShardingConfig()), ("sharded", ShardingConfig(kind="full"))):
            cfg = dataclasses.replace(
                plain, sharding=sharding, ppo=dataclasses.replace(plain.ppo, value_model=values, chunk_tokens=5)
            )
            out = folder / f"run-{values}-{name}"
            actor_critic, result = run_ppo(cfg, make_lm, tokenizer, out, evaluate=evaluate)
            assert result.updates == 4 and has_shards(actor_critic) == (name == "sharded")
            barrier()
            ended[name] = (
                {n: whole(p.detach()) for n, p in actor_critic.named_parameters()},
                read_metrics(out / "metrics.jsonl"),
            )
        for name, weight in ended["whole"][0].items():
            torch.testing.assert_close(ended["sharded"][0][name], weight, rtol=RTOL, atol=1e-12)
        for ours, theirs in zip(ended["sharded"][1], ended["whole"][1], strict=True):
            assert without_times(ours) == pytest.approx(without_times(theirs), rel=RTOL, abs=1e-9)
        again, result = run_ppo(cfg, make_lm, tokenizer, out, evaluate=evaluate, resume=True)
        for name, weight in again.named_parameters():  # read in the dtype of the config
            assert torch.equal(whole(weight.detach()).float(), ended["sharded"][0][name].float()), (values, name)


class StopOneProcess(Callback):
    """Tells the second process to stop after an update, or kills it; it alone gets the signal."""

    def __init__(self, update: int, how: signal.Signals = signal.SIGTERM) -> None:
        self.update, self.how = update, how

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.update and process_index() == 1:
            os.kill(os.getpid(), self.how)


def run_config(values: str = "separate", **changes: Any) -> RunConfig:
    """A sharded run of five updates in which everything that a checkpoint holds changes."""
    settings: dict[str, Any] = {"updates": 5, "save_every": 2, "schedule": "linear", "value_warmup_updates": 1}
    cfg = small_config(reward={"centre": True}, **(settings | {"value_model": values} | changes))
    return dataclasses.replace(cfg, sharding=ShardingConfig(kind="full"))


def ended_as(actor_critic: ActorCritic, out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This process's weights, and the figures of every update."""
    weights = {name: local(p.detach()).clone() for name, p in actor_critic.named_parameters()}
    return weights, [without_times(row) for row in read_metrics(out / "metrics.jsonl")]


def assert_equal_ends(
    ours: tuple[dict[str, Tensor], list[dict[str, Any]]], theirs: tuple[dict[str, Tensor], list[dict[str, Any]]]
) -> None:
    assert ours[0].keys() == theirs[0].keys() and ours[1] == theirs[1]
    for name, weight in theirs[0].items():
        assert torch.equal(ours[0][name], weight), name


@checks
def a_run_that_was_stopped_ends_as_one_that_was_not(folder: Path) -> None:
    """Bit for bit: stopped between two checkpoints that were due, and ended by an error after the one of update 4."""
    tokenizer = a_tokenizer(folder)

    def fail(actor_critic: ActorCritic, update: int) -> dict[str, float]:
        if update == 5:
            raise OSError("the power went out")
        return {}

    for values, dtype, background in (
        ("separate", torch.float32, False),
        ("shared", torch.float32, True),
        ("separate", torch.bfloat16, True),
    ):
        cfg, name = run_config(values, save_in_background=background), f"{values}-{dtype}"
        make_lm = partial(run_lm, dtype=dtype)
        straight, _ = run_ppo(cfg, make_lm, tokenizer, folder / f"straight-{name}")
        barrier()
        wanted = ended_as(straight, folder / f"straight-{name}")

        out = folder / f"stopped-{name}"
        with pytest.raises(KeyboardInterrupt, match=r"after step 3; the state is saved in .*/step-000003"):
            run_ppo(cfg, make_lm, tokenizer, out, callbacks=[StopOneProcess(3)])
        barrier()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
        with pytest.raises(OSError, match="power"):
            run_ppo(cfg, make_lm, tokenizer, out, resume=True, evaluate=fail)
        latest = latest_checkpoint(out / "checkpoints")
        assert latest is not None and latest.name == "step-000004"
        resumed, result = run_ppo(cfg, make_lm, tokenizer, out, resume=True)
        barrier()
        assert result.updates == 5 and not (out / "checkpoints").exists()
        assert_equal_ends(ended_as(resumed, out), wanted)


@checks
def a_divergence_saves_the_shards_of_both_and_the_run_goes_on_from_before(folder: Path) -> None:
    tokenizer, cfg, out = a_tokenizer(folder), run_config(save_every=1), folder / "diverged-run"

    def broken(*args: Any, **options: Any) -> Advantages:
        advantages = compute_advantages(*args, **options)
        rounds.append(len(rounds))
        if len(rounds) == 3 and process_index() == 1:
            advantages.advantages_BT[0, 0] = torch.nan
        return advantages

    rounds: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcr.recipes.train_ppo.compute_advantages", broken)
        with pytest.raises(TrainingDiverged, match=r"^update 3: .*saved in .*diverged/step-000002; --resume continues"):
            run_ppo(cfg, run_lm, tokenizer, out)
    barrier()
    saved, before = (latest_checkpoint(out / name) for name in ("diverged", "checkpoints"))
    assert saved is not None and before is not None and saved.name == before.name == "step-000002"
    states = []
    for path in (saved, before):
        policy = run_lm(5)
        actor_critic = ActorCritic(policy, build_value_model(cfg.ppo, ModelConfig(), policy=policy))
        shard(actor_critic, plan(cfg.sharding))
        load_checkpoint(path, models={"actor_critic": actor_critic}, optimizers={}, schedulers={})
        states.append({name: local(p.detach()).clone() for name, p in actor_critic.named_parameters()})
    assert_equal_ends((states[0], []), (states[1], []))  # it diverged before a step: nothing of it is in the weights

    resumed, _ = run_ppo(cfg, run_lm, tokenizer, out, resume=True)
    straight, _ = run_ppo(cfg, run_lm, tokenizer, folder / "undiverged-run")
    barrier()
    assert_equal_ends(ended_as(resumed, out), ended_as(straight, folder / "undiverged-run"))


def not_finite_on_the_second(*, response_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[float("nan") if process_index() else 1.0 for _ in ids] for ids in response_ids]


def failing_on_the_second(*, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
    if process_index():
        raise RuntimeError("no such tool")
    return [None] * len(prompts)


@checks
def an_error_of_one_process_is_raised_on_both(folder: Path) -> None:
    """What a reward or an environment does wrong, and no other process knows, before the next sum over them."""
    tokenizer, cfg = a_tokenizer(folder), small_config(reward={"centre": True})
    broken = f"{__spec__.name}:{not_finite_on_the_second.__name__}"  # type: ignore[name-defined]
    with pytest.raises(DataError, match=r"gave \d+ of \d+ dense values that are not finite"):
        paid = dataclasses.replace(cfg.reward, callable=broken)
        run_ppo(dataclasses.replace(cfg, reward=paid), run_lm, tokenizer, folder / "not-finite")
    barrier()
    with pytest.raises(DataError, match="the environment raised RuntimeError: no such tool"):
        rollout = dataclasses.replace(cfg.rollout, max_turns=2, max_message_tokens=4)
        run_ppo(
            dataclasses.replace(cfg, rollout=rollout),
            lambda seed: often_ending(run_lm(seed), 2),
            tokenizer,
            folder / "environment",
            environment=failing_on_the_second,
        )
    barrier()


@checks
def a_finished_run_is_loaded_whole_too(folder: Path) -> None:
    """And one of whole models is loaded into shards: how many processes trained it does not matter."""
    tokenizer = a_tokenizer(folder)
    ways = {
        "cut": run_config(updates=2),
        "whole": dataclasses.replace(run_config(updates=2), sharding=ShardingConfig()),
    }
    for first, other in (("cut", "whole"), ("whole", "cut")):
        out = folder / f"finished-{first}"
        trained, _ = run_ppo(ways[first], run_lm, tokenizer, out)
        barrier()
        loaded, result = run_ppo(ways[other], lambda seed: run_lm(seed + 8), tokenizer, out, resume=True)
        assert result.updates == 2 and has_shards(loaded) == (other == "cut")
        for (name, ours), theirs in zip(loaded.named_parameters(), trained.parameters(), strict=True):
            assert torch.equal(whole(ours.detach()), whole(theirs.detach())), name


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))

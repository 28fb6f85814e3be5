"""One PPO update: passes over a rollout in minibatches, with clipped losses, guards and statistics.

The update sees only advantages and returns, not the source of the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from tlcr import ops
from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.errors import ConfigError, TrainingDiverged
from tlcr.models.actor_critic import ActorCritic, PolicyOutput, Terms
from tlcr.ppo.kl import estimate_kl
from tlcr.ppo.microbatches import MicroBatch, MicroBatches
from tlcr.training.accelerator import without_sync
from tlcr.training.optim import clip_gradients, gradient_norm
from tlcr.training.profiling import part
from tlcr.types import Advantages, PolicyScores, Rollout


@dataclass(frozen=True)
class UpdateStatistics:
    """What happened in one update: means over its minibatches, over all processes.

    The minibatch at which ``target_kl`` ended the update is among them, though it took no step. Losses, fractions and
    KL follow PPOConfig.aggregate; `ratio_max` is the largest ratio. Gradient norms are those before clipping.
    """

    loss: float
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_fraction: float
    value_clip_fraction: float
    approx_kl: float
    ratio_max: float
    policy_grad_norm: float
    value_grad_norm: float
    optimizer_steps: int
    stopped_early: bool


# Sums over micro-batches and processes, in the order of PPOLoss; the largest ratio and the norms are not sums.
SUMMED = ("loss", "policy", "value", "entropy", "kl", "clip_fraction", "value_clip_fraction", "approx_kl")


def ppo_update(
    actor_critic: ActorCritic | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    scores: PolicyScores,
    advantages: Advantages,
    cfg: PPOConfig,
    kl: KLConfig,
    *,
    kl_coef: float,
    temperature: float,
    reference: PreTrainedModel,
    accelerator: Accelerator,
    generator: torch.Generator,
    value_only: bool = False,
    packed: bool = False,
) -> UpdateStatistics:
    """``cfg.epochs`` passes over this process's share of a rollout; one optimiser step for each minibatch.

    Every loss is a sum over tokens (or answers) divided by their number in the minibatch over all processes and
    micro-batches, so that the result does not depend on how a minibatch is cut or distributed, up to rounding: the
    gradients of bfloat16 weights are summed in bfloat16, where many small micro-batches round more. The passes end
    early once approx_kl, KL(old || new) over a minibatch before its step, exceeds ``cfg.target_kl``.

    Args:
        actor_critic: policy and value model, perhaps wrapped for data parallelism.
        optimizer: steps once for each minibatch.
        rollout: the answers of this process.
        scores: log-probabilities and values of these answers from before the update.
        advantages: advantages and returns.
        cfg: epochs, sizes, clips and coefficients.
        kl: the KL term of the loss, if any.
        kl_coef: coefficient of the KL in the loss (``kl.placement`` "loss"); not used otherwise.
        temperature: the sampling temperature of the answers.
        reference: the reference model of the KL.
        accelerator: the processes that share the update.
        generator: decides the order of the rows.
        value_only: leave the policy as it is (value warm-up).
        packed: the models read rows end to end, without padding (``tlcr.ppo.packing``); ``cfg.packing`` is not read.

    Returns:
        Means over the minibatches and all processes.

    Raises:
        TrainingDiverged: a loss or gradient is not finite, or a probability ratio is above ``cfg.max_ratio``. It is
            raised before the step.
    """
    model: ActorCritic = accelerator.unwrap_model(actor_critic)
    batches = MicroBatches(rollout, rows=cfg.micro_batch_size, tokens=cfg.micro_batch_tokens, packed=packed)
    counts_B = _weights(rollout.mask_BT, cfg)
    steps: list[_Step] = []
    stopped_early = False
    actor_critic.train()
    for minibatches in _passes(len(rollout.mask_BT), cfg, accelerator.num_processes, generator):
        denominators_M = accelerator.reduce(torch.stack([counts_B[rows].sum() for rows in minibatches]), "sum")
        for micro_batches, denominator in zip(batches.split(minibatches), denominators_M.unbind(), strict=True):
            optimizer.zero_grad(set_to_none=True)
            statistics = [
                _backward(
                    actor_critic,
                    batch,
                    scores,
                    advantages,
                    cfg,
                    kl,
                    denominator=denominator,
                    kl_coef=kl_coef,
                    temperature=temperature,
                    reference=reference,
                    accelerator=accelerator,
                    value_only=value_only,
                    last=batch is micro_batches[-1],
                )
                for batch in micro_batches
            ]
            with part("update: gradient norms"):
                step = _finish(statistics, model, cfg, accelerator)
            step.check(cfg.max_ratio)
            steps.append(step)
            stopped_early = cfg.target_kl is not None and step.approx_kl > cfg.target_kl
            if stopped_early:
                break
            with part("update: optimiser"):
                optimizer.step()
        if stopped_early:
            break
    optimizer.zero_grad(set_to_none=True)
    actor_critic.eval()
    return _summary(steps, stopped_early)


def _passes(rows: int, cfg: PPOConfig, num_processes: int, generator: torch.Generator) -> Iterator[list[list[int]]]:
    """For each pass the minibatches of this process: every row once, in a new order."""
    if cfg.minibatch_size % num_processes:
        raise ConfigError(
            f"ppo.minibatch_size is {cfg.minibatch_size}, which {num_processes} processes cannot share evenly; "
            f"make it a multiple of {num_processes}"
        )
    share = cfg.minibatch_size // num_processes
    for _ in range(cfg.epochs):
        order = torch.randperm(rows, generator=generator).tolist()
        yield [order[start : start + share] for start in range(0, rows, share)]


def _weights(mask_BT: Tensor, cfg: PPOConfig) -> Tensor:
    """What each row adds to the denominator: its tokens, or itself."""
    tokens_B = mask_BT.sum(dim=1)
    return (tokens_B > 0).long() if cfg.aggregate == "sequence" else tokens_B


def _backward(
    actor_critic: ActorCritic | DistributedDataParallel,
    batch: MicroBatch,
    scores: PolicyScores,
    advantages: Advantages,
    cfg: PPOConfig,
    kl: KLConfig,
    *,
    denominator: Tensor,
    kl_coef: float,
    temperature: float,
    reference: PreTrainedModel,
    accelerator: Accelerator,
    value_only: bool,
    last: bool,
) -> ops.PPOLoss:
    in_loss = kl.placement == "loss" and not value_only
    terms: Terms = "value" if value_only else "both" if cfg.value_coef > 0 else "policy"
    old_logprobs_BT = batch.take(scores.logprobs_BT)
    # Data parallelism waits for the other processes in the last micro-batch of a minibatch only.
    with nullcontext() if last else without_sync(accelerator, actor_critic):
        with part("update: forward"):
            output_N: PolicyOutput = actor_critic(
                *batch.tokens,
                temperature=temperature,
                reference=reference if in_loss and kl.estimator == "full" else None,
                terms=terms,
            )
            logprobs_BT, entropy_BT, kl_BT, values_BT, _ = (
                None if x_N is None else batch.spread(x_N) for x_N in output_N
            )
            has_values = values_BT is not None
            in_loss_BT = None
            if in_loss:
                in_loss_BT = _kl_in_loss(kl, kl_BT, logprobs_BT, batch.take(scores.ref_logprobs_BT), batch.mask_BT)
            loss = ops.ppo_loss(
                # During the value warm-up the policy does not change, so its log-probabilities are the old ones.
                old_logprobs_BT if logprobs_BT is None else logprobs_BT,
                old_logprobs_BT,
                batch.take(advantages.advantages_BT),
                batch.mask_BT,
                clip=cfg.clip,
                clip_high=cfg.clip_high,
                dual_clip=cfg.dual_clip,
                values=values_BT,
                old_values=batch.take(scores.values_BT) if has_values else None,
                returns=batch.take(advantages.returns_BT) if has_values else None,
                value_clip=cfg.value_clip,
                value_coef=cfg.value_coef,
                entropy=batch.take(scores.entropy_BT) if entropy_BT is None else entropy_BT,
                entropy_coef=0.0 if value_only else cfg.entropy_coef,
                kl=in_loss_BT,
                kl_coef=kl_coef if in_loss else 0.0,
                aggregate=cfg.aggregate,
                denominator=denominator,
            )
        # DDP averages over processes, but the denominator is already global; so is it over micro-batches, by which
        # accelerator.backward would divide where a launcher names gradient_accumulation_steps.
        with part("update: backward"):
            (loss.loss * accelerator.num_processes).backward()
    return loss


def _kl_in_loss(
    kl: KLConfig, exact_BT: Tensor | None, logprobs_BT: Tensor | None, ref_logprobs_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    if kl.estimator == "full":
        assert exact_BT is not None
        return exact_BT
    assert logprobs_BT is not None
    # Padding gets a ratio of 1: its exponential could overflow, and 0 times infinity would reach the gradient.
    ref_logprobs_BT = torch.where(mask_BT, ref_logprobs_BT, logprobs_BT.detach())
    return estimate_kl(logprobs_BT, ref_logprobs_BT, kl.estimator)


@dataclass(frozen=True)
class _Step:
    """The statistics of one minibatch over all processes, on the host."""

    summed: Sequence[float]
    ratio_max: float
    policy_grad_norm: float
    value_grad_norm: float

    @property
    def approx_kl(self) -> float:
        return self.summed[SUMMED.index("approx_kl")]

    def check(self, max_ratio: float) -> None:
        remedy = "lower ppo.learning_rate and ppo.value_learning_rate, raise kl.coef, or set ppo.target_kl"
        for name, value in (
            ("loss", self.summed[0]),
            ("norm of the policy's gradient", self.policy_grad_norm),
            ("norm of the value model's gradient", self.value_grad_norm),
        ):
            if not math.isfinite(value):
                raise TrainingDiverged(f"the {name} is {value}; {remedy}")
        if not self.ratio_max <= max_ratio:
            raise TrainingDiverged(
                f"a token became {self.ratio_max:.3g} times as probable as when it was sampled, more than "
                f"ppo.max_ratio = {max_ratio:g}; {remedy}"
            )


def _finish(statistics: Sequence[ops.PPOLoss], model: ActorCritic, cfg: PPOConfig, accelerator: Accelerator) -> _Step:
    """Copies the minibatch's statistics to the host, at once, and clips each network's gradients by their norm."""
    networks = model.policy_parameters(), model.value_parameters()
    norms = [gradient_norm(parameters) for parameters in networks]
    device = statistics[0].loss.device
    own = torch.stack(
        [
            *(torch.stack([getattr(part, name).detach() for part in statistics]).sum() for name in SUMMED),
            torch.stack([part.ratio_max for part in statistics]).max(),
            *(norm.to(device) for norm in norms),
        ]
    ).double()
    everyones_PS = accelerator.gather(own.unsqueeze(0))
    sums = everyones_PS[:, : len(SUMMED)].sum(dim=0)
    largest = everyones_PS[:, len(SUMMED) :].amax(dim=0)
    values = torch.cat([sums, largest]).tolist()
    step = _Step(values[: len(SUMMED)], *values[len(SUMMED) :])
    for parameters, norm in zip(networks, (step.policy_grad_norm, step.value_grad_norm), strict=True):
        clip_gradients(parameters, norm, cfg.max_grad_norm)
    return step


def _summary(steps: Sequence[_Step], stopped_early: bool) -> UpdateStatistics:
    loss, policy, value, entropy, kl, clip_fraction, value_clip_fraction, approx_kl = (
        sum(column) / len(steps) for column in zip(*(step.summed for step in steps), strict=True)
    )
    return UpdateStatistics(
        loss=loss,
        policy_loss=policy,
        value_loss=value,
        entropy=entropy,
        kl=kl,
        clip_fraction=clip_fraction,
        value_clip_fraction=value_clip_fraction,
        approx_kl=approx_kl,
        ratio_max=max(step.ratio_max for step in steps),
        policy_grad_norm=sum(step.policy_grad_norm for step in steps) / len(steps),
        value_grad_norm=sum(step.value_grad_norm for step in steps) / len(steps),
        optimizer_steps=len(steps) - stopped_early,
        stopped_early=stopped_early,
    )

"""What two processes compute, written for test_invariance_ppo to compare. Run by `accelerate launch`, not by pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.ppo.helpers import (
    GradientRecorder,
    double_actor_critic,
    double_roles,
    known_rollout,
    known_update,
    run_ppo,
    small_config,
)
from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.rollout import seeded_generator
from tlcr.ppo.update import ppo_update
from tlcr.types import Rewards


def main(models: Path, out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, processes = accelerator.process_index, accelerator.num_processes
    assert processes == 2
    rows = list(range(8))[rank::processes]

    def make_lm(seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(models / f"lm-{seed}")

    # Whitening over both shares; the answers of the two have different widths.
    rollout = known_rollout(rows)
    scores, advantages = known_update(rollout, rows)
    whitened = compute_advantages(
        Rewards(advantages.advantages_BT),
        scores,
        rollout.mask_BT,
        gamma=0.9,
        lam=0.5,
        whiten=True,
        accelerator=accelerator,
    )
    save_file(
        {"advantages": whitened.advantages_BT.contiguous(), "returns": whitened.returns_BT.contiguous()},
        out / f"advantages-{rank}.safetensors",
    )

    # One update, its gradients and its loss. The rows of one process need more forward passes than those of the other.
    for aggregate in ("token", "sequence"):
        actor_critic, passes = double_actor_critic(make_lm), []
        actor_critic.register_forward_pre_hook(lambda _module, inputs, seen=passes: seen.append(len(inputs[0])))
        recorder = GradientRecorder(actor_critic)
        statistics = ppo_update(
            accelerator.prepare_model(actor_critic),
            recorder,
            rollout,
            scores,
            advantages,
            PPOConfig(
                minibatch_size=8, micro_batch_tokens=12, max_grad_norm=1e9, entropy_coef=0.1, aggregate=aggregate
            ),
            KLConfig(placement="loss", estimator="k3"),
            kl_coef=0.3,
            temperature=0.7,
            reference=actor_critic.policy,
            accelerator=accelerator,
            generator=seeded_generator("test", rank),
        )
        (gradients,) = recorder.steps
        tensors = {str(i): g for i, g in enumerate(gradients) if g is not None}
        figures = torch.tensor(list(vars(statistics).values()), dtype=torch.float64)
        save_file(
            {**tensors, "statistics": figures, "passes": torch.tensor(passes)},
            out / f"update-{aggregate}-{rank}.safetensors",
        )

    # The same update by adapters on one backbone, with the exact KL to the backbone alone.
    actor_critic, reference = double_roles(make_lm)
    recorder = GradientRecorder(actor_critic)
    ppo_update(
        accelerator.prepare_model(actor_critic),
        recorder,
        rollout,
        scores,
        advantages,
        PPOConfig(minibatch_size=8, micro_batch_tokens=12, max_grad_norm=1e9),
        KLConfig(placement="loss", estimator="full"),
        kl_coef=0.3,
        temperature=0.7,
        reference=reference,
        accelerator=accelerator,
        generator=seeded_generator("test", rank),
    )
    (gradients,) = recorder.steps
    tensors = {str(i): g for i, g in enumerate(gradients) if g is not None}
    save_file(tensors, out / f"update-roles-{rank}.safetensors")

    # The same answers in two steps, from which nothing moves.
    actor_critic = double_actor_critic(make_lm)
    recorder = GradientRecorder(actor_critic)
    ppo_update(
        accelerator.prepare_model(actor_critic),
        recorder,
        rollout,
        scores,
        advantages,
        PPOConfig(minibatch_size=4, max_grad_norm=1e9, entropy_coef=0.1, aggregate="sequence"),
        KLConfig(placement="loss", estimator="k3"),
        kl_coef=0.3,
        temperature=0.7,
        reference=actor_critic.policy,
        accelerator=accelerator,
        generator=seeded_generator("test", rank),
    )
    steps = {f"{n}.{i}": g for n, step in enumerate(recorder.steps) for i, g in enumerate(step) if g is not None}
    save_file(steps, out / f"minibatches-{rank}.safetensors")

    # A whole run; in its first update the policy sits out.
    actor_critic, _ = run_ppo(
        small_config(updates=2, value_warmup_updates=1),
        make_lm,
        AutoTokenizer.from_pretrained(models / "tokenizer"),
        out / "ppo",
    )
    save_file({n: p.detach().clone() for n, p in actor_critic.named_parameters()}, out / f"ppo-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

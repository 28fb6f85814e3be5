"""Small models, a small PPO run, and a rollout with a known update, for the tests of PPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import (
    DataConfig,
    KLConfig,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.heads import classification_head
from tlcr.models.lora.roles import Roles
from tlcr.ppo.run import PPOResult
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import CallableSource
from tlcr.text.padding import pad_left, pad_right
from tlcr.types import Advantages, PolicyScores, Rollout

PROMPTS = ["The food was", "Human: How do", "A wonderful film", "I would never", "Naïve café", "not bad at all."]

# Eight rows of different lengths; the last two answers were cut off, the others end with 2.
PROMPT_IDS = [[5, 9, 30], [7, 44, 12, 90, 33], [8], [61, 62], [5, 9, 31, 7], [70, 12], [99, 3, 14], [20, 21, 22]]
ANSWER_IDS = [[41, 17, 60, 2], [23, 2], [99, 3, 14, 88, 2], [2], [50, 51, 2], [77, 2], [33, 34, 35, 36, 37], [80]]


def reward_low_ids(*, response_ids: list[list[int]], **_: Any) -> list[list[float]]:
    """1 for every token with an id below 60: one in seven of a random policy's."""
    return [[float(token < 60) for token in ids] for ids in response_ids]


def small_config(*, reward: Mapping[str, Any] | None = None, kl: KLConfig | None = None, **ppo: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "updates": 4,
        "batch_size": 8,
        "minibatch_size": 4,
        "micro_batch_size": 3,
        "epochs": 2,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "save_every": 2,
    }
    return RunConfig(
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(max_new_tokens=6, batch_size=5),
        reward=RewardConfig(
            kind="callable",
            callable="tests.ppo.helpers:reward_low_ids",
            **(reward or {}),
        ),
        kl=kl or KLConfig(coef=0.05, target=0.05, horizon=100),
        ppo=PPOConfig(**(settings | ppo)),
    )


def run_ppo(
    cfg: RunConfig,
    make_lm: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **options: Any,
) -> tuple[ActorCritic, PPOResult]:
    """Train a fresh tiny policy, the same weights every time."""
    policy, reference = make_lm(seed=1), make_lm(seed=1)
    value_model = build_value_model(cfg.ppo, ModelConfig(), policy=policy)
    actor_critic = ActorCritic(policy, value_model, chunk_tokens=cfg.ppo.chunk_tokens)
    given = {"reward_source": CallableSource(str(cfg.reward.callable)), "prompts": PROMPTS, "seed": 3, **options}
    result = train_ppo(cfg, actor_critic=actor_critic, reference=reference, tokenizer=tokenizer, folder=folder, **given)
    return actor_critic, result


class Stopped(Exception):
    """What ``StopAt`` raises."""


class StopAt:
    """Ends a run when it has saved a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, metrics: Any) -> None: ...
    def on_evaluate(self, step: int, metrics: Any) -> None: ...
    def on_end(self, step: int, metrics: Any) -> None: ...
    def on_save(self, step: int, path: Path) -> None:
        if step == self.step:
            raise Stopped


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics without what no two runs share."""
    return {key: value for key, value in row.items() if not key.startswith("time")}


def bigram_lm(logits_VV: Tensor, layers: int = 0) -> PreTrainedModel:
    """A policy whose next-token logits are exactly row `logits_VV[last token]`, and can be trained. Its layers, which
    caches of fixed size need, add nothing."""
    V = len(logits_VV)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=V,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(logits_VV.dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(logits_VV.t() / V**0.5)  # the norm scales a one-hot vector by sqrt(V)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model.eval()


def chain(tokenizer: PreTrainedTokenizerBase, *links: tuple[int, int]) -> PreTrainedModel:
    """A policy that follows a with b for every (a, b), and any other token with itself."""
    logits_VV = 100.0 * torch.eye(len(tokenizer))
    for before, after in links:
        logits_VV[before] = 0.0
        logits_VV[before, after] = 100.0
    return bigram_lm(logits_VV, layers=1)


def known_rollout(rows: list[int] | None = None, *, extra_left: int = 0, extra_right: int = 0) -> Rollout:
    """The rows above as a rollout, wider on request."""
    rows = list(range(len(PROMPT_IDS))) if rows is None else rows
    prompt_ids_BP, prompt_mask_BP = pad_left([PROMPT_IDS[row] for row in rows], 0)
    response_ids_BT, mask_BT = pad_right([ANSWER_IDS[row] for row in rows], 0)
    left, right = (extra_left, 0), (0, extra_right)
    return Rollout(
        prompts=tuple(f"prompt {row}" for row in rows),
        responses=tuple(f"answer {row}" for row in rows),
        prompt_ids_BP=torch.nn.functional.pad(prompt_ids_BP, left, value=99),
        prompt_mask_BP=torch.nn.functional.pad(prompt_mask_BP, left),
        response_ids_BT=torch.nn.functional.pad(response_ids_BT, right, value=99),
        mask_BT=torch.nn.functional.pad(mask_BT, right),
        ended_B=torch.tensor([ANSWER_IDS[row][-1] == 2 for row in rows]),
    )


def known_update(rollout: Rollout, rows: list[int] | None = None) -> tuple[PolicyScores, Advantages]:
    """Old log-probs, values, advantages and returns that depend on a token's row and place only; NaN where padded."""
    rows = list(range(len(PROMPT_IDS))) if rows is None else rows
    row_B1 = torch.tensor(rows, dtype=torch.float64).unsqueeze(1)
    column_T = torch.arange(rollout.mask_BT.shape[1], dtype=torch.float64)

    def figures(speed: float, mean: float, size: float) -> Tensor:
        return torch.where(rollout.mask_BT, mean + size * torch.sin(speed * (3 * row_B1 + column_T + 1)), torch.nan)

    scores = PolicyScores(
        logprobs_BT=figures(1.0, -6.0, 0.3),
        ref_logprobs_BT=figures(2.0, -6.0, 0.3),
        values_BT=figures(3.0, 0.0, 0.5),
        entropy_BT=figures(4.0, 5.0, 0.5),
    )
    return scores, Advantages(figures(5.0, 0.1, 1.0), figures(6.0, 0.2, 1.0))


def double_actor_critic(make_lm: Callable[..., PreTrainedModel], **options: Any) -> ActorCritic:
    """A float64 policy and a separate value model with a head that is not zero."""
    policy = make_lm(seed=1).double()
    value_model = build_value_model(PPOConfig(), ModelConfig(), policy=make_lm(seed=2))
    assert value_model is not None
    head = classification_head(value_model.double())
    with torch.no_grad():
        head.weight.copy_(torch.sin(torch.arange(head.weight.numel(), dtype=torch.float64)).reshape(head.weight.shape))
    return ActorCritic(policy, value_model, **options)


def double_roles(make_lm: Callable[..., PreTrainedModel]) -> tuple[ActorCritic, PreTrainedModel]:
    """float64 policy and value model as adapters on one backbone, all of which change something; and the reference."""
    roles = Roles(make_lm(seed=1).double(), LoRAConfig(rank=3), seed=0)
    actor_critic = ActorCritic(roles.policy, roles.classifier("value", {0: "value"}))
    with torch.no_grad():
        for parameter in actor_critic.parameters():
            if parameter.requires_grad:
                places = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
                parameter.add_(0.1 * torch.sin(places))
    return actor_critic, roles.reference


class GradientRecorder(torch.optim.SGD):
    """An optimiser that moves nothing and keeps the gradients of every step."""

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__(actor_critic.parameters(), lr=0.0)
        self.steps: list[list[Tensor | None]] = []
        self._named = list(actor_critic.parameters())

    def step(self, closure: Any = None) -> None:
        self.steps.append([None if p.grad is None else p.grad.clone() for p in self._named])

"""PPO, and what keeps the policy close to its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.errors import ConfigError


@dataclass(frozen=True)
class KLConfig(Checked):
    """The KL penalty, which keeps the policy close to the reference model."""

    coef: float = knob(0.1, "coefficient, in reward per nat", source="released code", ge=0)
    placement: Literal["reward", "loss"] = knob("reward", "subtracted from each action's reward, or added to the loss")
    estimator: Literal["k1", "k2", "k3", "full"] = knob(
        "k1",
        "k1 log-ratio, k2 half its square, k3 exp(-k1) - 1 + k1, or the exact sum over the vocabulary. 'full' belongs "
        "in the loss: in the reward it does not depend on the action",
    )
    target: float | None = knob(None, "adapt the coefficient to hold this KL", unit="nats per token", gt=0)
    horizon: int | None = knob(
        None,
        "answers over which the coefficient adapts; default: a twentieth of all that the run samples, one batch at "
        "least",
        ge=1,
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "full" and self.placement == "reward":
            raise ConfigError(
                "KLConfig.estimator is 'full' with placement 'reward': the exact KL of a state does not depend on the "
                "action, so as a reward it discourages no action; set placement: loss, or estimator: k1"
            )
        if self.estimator == "k1" and self.placement == "loss":
            raise ConfigError(
                "KLConfig.estimator is 'k1' with placement 'loss': the gradient of log p - log q is zero on average, "
                "so it does not limit the KL; set estimator to k2, k3 or full, or placement: reward"
            )
        if self.target is not None and self.coef == 0:
            raise ConfigError("KLConfig.target adapts coef by factors, which leave 0 at 0; set coef above 0")


@dataclass(frozen=True)
class PPOConfig(Checked):
    """Proximal policy optimisation with dense rewards."""

    updates: int = knob(200, "rollout-and-update rounds", ge=1)
    batch_size: int = knob(128, "answers per round, over all processes", ge=1)
    minibatch_size: int = knob(64, "answers per optimiser step, over all processes", ge=1)
    micro_batch_size: int | None = knob(
        None, "answers per forward pass of a process, at most; default: its whole share", ge=1, decides=False
    )
    micro_batch_tokens: int | None = knob(
        None,
        "tokens per forward pass of a process, at most, its padding among them; default: on a CPU 1024, else no limit",
        ge=1,
        decides=False,
    )
    packing: Literal["auto", "always", "never"] = knob(
        "auto",
        "prompts and answers end to end in one row, without padding; auto: with flash attention on a GPU alone, since "
        "other attention takes time and memory by the square of all tokens",
        advanced=True,
        decides=False,
    )
    epochs: int = knob(1, "passes over each round's answers", source="released code", ge=1)
    learning_rate: float = knob(1e-6, "policy learning rate", source="released code", gt=0)
    value_learning_rate: float = knob(1e-6, "value learning rate", source="released code", gt=0)
    weight_decay: float = knob(0.0, "AdamW weight decay", ge=0, advanced=True)
    schedule: Literal["cosine", "linear", "constant"] = knob(
        "constant", "learning-rate decay over the updates", advanced=True
    )
    warmup_updates: int = knob(
        0,
        "updates in which the policy's learning rate rises linearly, from the first that trains the policy",
        ge=0,
        advanced=True,
    )
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm", gt=0, advanced=True)
    gamma: float = knob(1.0, "discount", source="released code", ge=0, le=1)
    lam: float = knob(0.95, "lambda of the advantage estimate", source="released code", ge=0, le=1)
    whiten: bool = knob(True, "advantages get zero mean and unit variance over all counted tokens of all processes")
    clip: float = knob(0.2, "the ratio is clipped at 1 - clip", source="PPO, released code", gt=0, le=1)
    clip_high: float | None = knob(None, "the ratio is clipped at 1 + clip_high; default: clip", gt=0, advanced=True)
    dual_clip: float | None = knob(None, "bound on the loss of negative advantages; above 1", gt=1, advanced=True)
    value_clip: float | None = knob(
        0.2, "values move at most this far from the rollout's", source="released code", gt=0, advanced=True
    )
    value_coef: float = knob(0.5, "weight of the value loss", source="PPO", ge=0, advanced=True)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", source="released code", ge=0)
    aggregate: Literal["token", "sequence"] = knob(
        "token", "mean over tokens, or over answers of their token means", advanced=True
    )
    target_kl: float | None = knob(
        None, "end a round's passes once KL(old || new) exceeds this", unit="nats", gt=0, advanced=True
    )
    max_ratio: float = knob(
        1e4, "stop, with the state saved, when a probability ratio exceeds this", gt=1, advanced=True
    )
    value_model: Literal["separate", "shared"] = knob(
        "separate", "its own backbone, or a head on the policy's", source="released code"
    )
    value_init: Literal["reward_model", "discriminator", "policy"] = knob(
        "policy", "weights that a separate value model starts from (released code: reward_model)"
    )
    value_warmup_updates: int = knob(0, "first updates that train the value model only", ge=0, advanced=True)
    chunk_tokens: int | None = knob(
        None,
        "compute logits for this many tokens at a time: less memory, more time",
        ge=1,
        advanced=True,
        decides=False,
    )
    save_every: int = knob(50, "updates between checkpoints; 0: none, but when a run is stopped", ge=0, decides=False)
    save_in_background: bool = knob(
        False, "go on while a checkpoint is written, from copies in host memory", advanced=True, decides=False
    )
    keep_checkpoints: int = knob(2, "older checkpoints are deleted", ge=1, advanced=True, decides=False)
    evaluate_every: int = knob(0, "updates between evaluations; 0: at the start and end only", ge=0)
    keep_best: bool = knob(
        False,
        "keep, in best/, the policy whose own reward on held-out prompts was highest, of those with a KL of at most "
        "best_max_kl",
    )
    best_max_kl: float | None = knob(
        1.0, "no policy further from the reference is the best one; null: any", unit="nats per token", gt=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best and not self.evaluate_every:
            raise ConfigError(
                "PPOConfig.keep_best chooses among the evaluations of a run, and evaluate_every is 0, so that the only "
                "one is at the end; set evaluate_every, such as a tenth of updates, or keep_best: false"
            )

    def size_problem(self, processes: int) -> str | None:
        """Why the batches cannot be cut and shared evenly among so many processes; None where they can."""
        if self.batch_size % self.minibatch_size == 0 and self.minibatch_size % processes == 0:
            return None
        return (
            f"ppo.batch_size is {self.batch_size} and ppo.minibatch_size {self.minibatch_size}, on {processes} "
            "process(es); make the batch a multiple of the minibatch, and the minibatch a multiple of the processes"
        )

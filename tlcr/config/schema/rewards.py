"""The reward that PPO maximises."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.errors import ConfigError

RewardKind = Literal[
    "continuous",
    "discrete",
    "sign",
    "positive_only",
    "negative_only",
    "random",
    "sequence",
    "sum_at_end",
    "spans",
    "uniform",
    "attention",
    "prefix_difference",
    "q",
    "dpo",
    "callable",
]
LOGIT_KINDS = ("continuous", "discrete", "sign", "positive_only", "negative_only", "sum_at_end", "spans")
"""Kinds that are read off the discriminator's logits."""
SHARED_SCORE_KINDS = ("uniform", "attention", "prefix_difference")
"""Kinds that share the sequence reward model's score out among the tokens."""
SCORED_KINDS = ("sequence", *SHARED_SCORE_KINDS)
"""Kinds that pay the sequence reward model's score, however it is handed out."""
WHOLE_ANSWER_KINDS = ("sequence", "sum_at_end")
"""Kinds that pay at the last token alone."""
OFFICIAL_KINDS = ("continuous", "discrete", "sign", "positive_only", "negative_only")
"""Kinds that the released code has too."""


@dataclass(frozen=True)
class RefreshConfig(Checked):
    """The discriminator learns on during PPO, from the policy's own answers, which are revised and labelled."""

    every: int = knob(
        0,
        "updates from one refresh to the next, after each of which a round's answers are revised; 0: the discriminator "
        "stays as it was trained",
        ge=0,
    )
    share: float = knob(
        0.5, "share of the first training's pairs among those of a refresh, against forgetting", ge=0, le=0.95
    )
    learning_rate: float | None = knob(
        None, "constant rate of a refresh; default: a tenth of discriminator.learning_rate", gt=0
    )


@dataclass(frozen=True)
class RewardConfig(Checked):
    """Which reward PPO maximises."""

    kind: RewardKind = knob("continuous", "what a token earns", source="paper")
    band: float = knob(
        0.2, "'discrete' pays nothing where |2p - 1| is at most this", source="released code", ge=0, le=1, advanced=True
    )
    scale: float = knob(1.0, "factor on the token or sequence reward", ge=0)
    clip: float | None = knob(5.0, "bound on |scaled token reward|", source="released code", gt=0)
    centre: bool | Literal["position"] = knob(
        False,
        "subtract the running mean of a token's reward, KL included, so that length earns nothing; position: the "
        "running mean at the token's place in its answer, a line in the logarithm of the place",
    )
    length_penalty: float = knob(0.0, "cost of every token", ge=0, advanced=True)
    missing_eos_penalty: float = knob(0.0, "cost, at the last token, of an answer cut off by the length limit", ge=0)
    overlong_buffer: int | None = knob(
        None,
        "an answer that comes within so many tokens of the length limit pays at its last token, from nothing where the "
        "buffer begins to overlong_penalty at the limit",
        source="DAPO",
        unit="tokens",
        ge=1,
        advanced=True,
    )
    overlong_penalty: float = knob(1.0, "cost of an answer of full length", source="DAPO", gt=0, advanced=True)
    sequence_coef: float = knob(0.0, "adds the sequence reward model's score, times this, at the last token", ge=0)
    terminal_clip: float | None = knob(
        None,
        "bound on |the reward of a whole answer, paid at its last token|; 5 in the released code",
        gt=0,
        advanced=True,
    )
    span_end: str = knob(
        r"[.,;:!?\n]+",
        "for kind 'spans': a regular expression; a span of the answer ends with each match",
        advanced=True,
    )
    compat: Literal["tlcr-official"] | None = knob(
        None,
        "'tlcr-official': rewards as in the released code: double softmax, paid one action late, the exact KL in the "
        "reward",
    )
    callable: str | None = knob(
        None,
        "'package.module:function' or 'file.py:function', for kind 'callable'; the run executes that code",
        path=True,
    )
    refresh: RefreshConfig = field(default_factory=RefreshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh.every and self.kind not in LOGIT_KINDS:
            raise ConfigError(
                f"RewardConfig.refresh.every is {self.refresh.every}, but kind {self.kind!r} reads no discriminator; "
                f"set refresh.every: 0, or kind to one of {', '.join(LOGIT_KINDS)}"
            )
        if self.kind == "callable" and self.callable is None:
            raise ConfigError("RewardConfig.kind is 'callable'; name the function: callable: package.module:function")
        if self.kind != "callable" and self.callable is not None:
            raise ConfigError(
                f"RewardConfig.callable is {self.callable!r}, but kind is {self.kind!r}; set kind: callable, or drop it"
            )
        if self.kind == "sequence" and self.centre:
            raise ConfigError("RewardConfig.centre is for token rewards, but kind 'sequence' has none; drop it")
        if self.kind == "sequence" and self.sequence_coef != 0:
            raise ConfigError(
                "RewardConfig.sequence_coef adds the sequence score to another reward, and kind 'sequence' is that "
                "score; weigh it with scale"
            )
        try:
            re.compile(self.span_end)
        except re.error as error:
            raise ConfigError(
                f"RewardConfig.span_end is {self.span_end!r}, which is no regular expression ({error}); write one such "
                r"as '[.!?]+' or '\s'"
            ) from error
        if self.compat is not None and self.kind not in OFFICIAL_KINDS:
            raise ConfigError(
                f"RewardConfig.compat is {self.compat!r}, but the released code has no kind {self.kind!r}; set kind to "
                f"one of {', '.join(OFFICIAL_KINDS)}, or drop compat"
            )

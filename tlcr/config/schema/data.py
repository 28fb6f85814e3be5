"""The data, and the labels that are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.errors import ConfigError


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where preferences, edits and prompts come from. A source is a local file, a folder or a hub dataset's name."""

    preferences: str | None = knob(None, "preference pairs, for SFT, the reward models and DPO", path=True)
    preferences_format: Literal["auto", "preference", "hh", "tlcr"] = knob(
        "auto", "format of the preferences", advanced=True
    )
    edits: str | None = knob(None, "edit pairs, for the discriminator", path=True)
    edits_format: Literal["auto", "edits", "tlcr"] = knob("auto", "format of the edits", advanced=True)
    prompts: str | None = knob(
        None, "prompts for PPO (a 'prompt' column); default: the prompts of the preferences", path=True
    )
    embedded_pairs: int = knob(
        2000, "pairs that the embedded task generates, when no source is named", ge=1, advanced=True
    )
    embedded_words: int = knob(
        20, "words of an answer after which the embedded task takes off for each more", ge=10, le=400, advanced=True
    )
    split: str = knob("train", "the split to read, for hub datasets")
    limit: int | None = knob(None, "read at most this many preferences, edits and prompts", ge=1)
    held_out: float = knob(0.1, "share of records kept for evaluation, chosen by a hash of their prompts", ge=0, le=0.9)
    shares: tuple[float, ...] = knob(
        (),
        "proportions in which the prompts of the preferences are divided among SFT, reward learning (reviser, labels, "
        "discriminator, reward models, DPO) and PPO; [2, 4, 4] in the paper; default: every stage sees all",
    )
    max_prompt_tokens: int = knob(
        256, "longer prompts are cut at the beginning", source="released code", unit="tokens", ge=1
    )
    max_answer_tokens: int = knob(256, "longer answers are cut at the end", source="released code", unit="tokens", ge=1)
    # What ended under "raise" met no such record, and what ended under "skip" has learnt from the others.
    on_malformed: Literal["skip", "raise"] = knob(
        "raise", "report and skip a record that cannot be used, or stop", advanced=True, decides=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares:
            return
        if len(self.shares) != 3 or min(self.shares) < 0 or sum(self.shares) == 0:
            raise ConfigError(
                f"DataConfig.shares is {list(self.shares)}; it wants three numbers, none below 0 and not all 0: for "
                "SFT, for reward learning and for PPO, such as [2, 4, 4]"
            )
        if self.preferences is None:
            raise ConfigError(
                f"DataConfig.shares {list(self.shares)} part the prompts of data.preferences, which is not set; name "
                "the preferences, or drop shares"
            )


@dataclass(frozen=True)
class LabelConfig(Checked):
    """How edits become token labels."""

    end_of_sequence: Literal["neutral", "ignore", "boundary"] = knob(
        "neutral",
        "label of the end-of-sequence token: always neutral; ignored in the loss (released code); or 'boundary', "
        "negative where the reviser moved the end away from here and positive where it moved it here",
    )

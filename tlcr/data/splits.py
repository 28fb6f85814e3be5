"""Assigns records to stages, and to training or evaluation, by hashes, never by order or at random.

What is hashed is a prompt as its source has it (``records.prompt_key``), and never the text that a chat template makes
of it, which may change with the day. So no record changes its side when data are added, reordered, renamed or read on
another day or machine, and a prompt that is held out from one stage is held out from all. The assignment is the same
for every seed: each revision is paid only once, and the seeds of a comparison share their data.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, compress
from typing import Any, Generic, Literal, TypeVar, get_args

from tlcr.config.schema import DataConfig
from tlcr.data.readers import ReadResult, read_raw_edits, read_raw_prompts
from tlcr.errors import ConfigError

__all__ = [
    "STAGES",
    "Part",
    "ShareStatistics",
    "Shares",
    "Split",
    "Stage",
    "in_order_of_hashes",
    "nothing_left",
    "read_shares",
    "split_held_out",
]

logger = logging.getLogger("tlcr")

T = TypeVar("T")

Stage = Literal["sft", "reward", "ppo"]
"""The stages that get a share. "reward" is the reviser, labels, discriminator, reward model and DPO."""
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Split(Generic[T]):
    """Records to train on, and records kept for evaluation; each in the order of the source."""

    train: list[T]
    held_out: list[T]


@dataclass(frozen=True)
class Part:
    """A stage's part of a source: records, their different prompts, and how many of these are held out."""

    records: int
    prompts: int
    held_out: int


@dataclass(frozen=True)
class ShareStatistics:
    """How ``shares`` divide the prompts. ``stages``: for each stage and each source that it reads, its part."""

    shares: tuple[float, ...]
    prompts: int
    stages: dict[Stage, dict[str, Part]]

    def require(self, stages: Iterable[Stage]) -> None:
        """Raises ConfigError where one of these stages has nothing to train on."""
        for stage in stages:
            sources = self.stages[stage]
            if all(part.prompts == part.held_out for part in sources.values()):
                raise nothing_left(stage, self.shares, " and ".join(f"the {name}" for name in sources))

    def summary(self) -> str:
        """A summary in one line."""
        parts = [
            f"{stage} {part.prompts} of the {name} ({part.prompts / self.prompts:.1%}, {part.held_out} held out)"
            for stage, sources in self.stages.items()
            for name, part in sources.items()
        ]
        proportions = ":".join(f"{share:g}" for share in self.shares)
        return f"{self.prompts} prompts, parted {proportions}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Shares:
    """Which stage each prompt is for; without ``shares``, every prompt is for every stage.

    A prompt in a source that is named for one stage (``own``) belongs to that stage. Any other is assigned by bytes 8
    to 15 of the SHA-256 of its key (``records.prompt_key``), read as a fraction of 1: SFT gets those below
    shares[0] / sum(shares), reward learning those from there to (shares[0] + shares[1]) / sum(shares), PPO the rest.
    """

    shares: tuple[float, ...] = ()
    own: Mapping[str, Stage] = field(default_factory=dict)

    def stage_of(self, prompt_key: str) -> Stage:
        """The stage that may see this prompt. Only with shares."""
        if prompt_key in self.own:
            return self.own[prompt_key]
        ends = list(accumulate(self.shares))
        fraction = _fraction(prompt_key, 8)
        return next(stage for stage, end in zip(STAGES, ends, strict=True) if fraction < end / ends[-1])

    def of(self, stage: Stage, read: ReadResult[T]) -> ReadResult[T]:
        """The records of a source that this stage may see, held-out ones included."""
        if not self.shares:
            return read
        # An empty prompt tells a stage nothing that another one could learn from it.
        return _where(read, [not key or self.stage_of(key) == stage for key in read.prompt_keys])

    def split(self, stage: Stage, read: ReadResult[T], held_out: float) -> Split[T]:
        """The records of a stage, split into training and held-out records.

        Prompts decide: a prompt that is held out from one stage is held out from all. Where a prompt is empty, or all
        records have the same one, their answers decide (``records.answer_key``).

        Args:
            stage: "sft", "reward" or "ppo".
            read: what a reader returned.
            held_out: share of the records to hold out, in [0, 1).

        Returns:
            Training and held-out records.
        """
        part = self.of(stage, read)
        names = _names(part)
        split = split_held_out(part.records, held_out, names=names)
        if split.held_out and min(_fraction(name, 0) for name in names) >= held_out:
            logger.info(
                "%s: no hash of a prompt is below data.held_out (%g), so that of the lowest is held out; data that are "
                "added may change which one that is",
                read.source,
                held_out,
            )
        return split

    def statistics(self, reads: Mapping[Stage, Mapping[str, ReadResult[Any]]], held_out: float) -> ShareStatistics:
        """Each stage's part of each source that it reads. Only with shares."""
        keys = {key for sources in reads.values() for read in sources.values() for key in read.prompt_keys}
        stages = {
            stage: {name: self._part(stage, read, held_out) for name, read in sources.items()}
            for stage, sources in reads.items()
        }
        return ShareStatistics(self.shares, len(keys), stages)

    def _part(self, stage: Stage, read: ReadResult[Any], held_out: float) -> Part:
        part = self.of(stage, read)
        split = split_held_out(part.prompt_keys, held_out, names=_names(part))
        return Part(len(part.records), len(set(part.prompt_keys)), len(set(split.held_out) - set(split.train)))


def in_order_of_hashes(read: ReadResult[str]) -> ReadResult[str]:
    """The prompts of a source in an order that does not depend on theirs in it, so that the first few are the same.

    Args:
        read: what a reader returned.

    Returns:
        The same in the order of the hashes that decide what is held out.
    """
    keys = read.prompt_keys
    order = sorted(range(len(keys)), key=lambda i: (_fraction(keys[i], 0), keys[i], read.records[i]))
    return replace(
        read,
        records=tuple(read.records[i] for i in order),
        prompt_keys=tuple(keys[i] for i in order),
        answer_keys=tuple(read.answer_keys[i] for i in order if read.answer_keys),
    )


def read_shares(cfg: DataConfig) -> Shares:
    """The shares of ``cfg``.

    A source that is named for one stage keeps its prompts for that stage: those of ``cfg.edits`` for reward learning,
    and those of ``cfg.prompts`` that are not among them for PPO.

    Args:
        cfg: the shares and the sources.

    Returns:
        Which stage may see which prompt.

    Raises:
        ConfigError: as ``readers.read_preferences``.
        DataError: as ``readers.read_preferences``.
    """
    if not cfg.shares:
        return Shares()
    own: dict[str, Stage] = {}
    if cfg.prompts is not None:
        own |= dict.fromkeys(read_raw_prompts(cfg).prompt_keys, "ppo")
    if cfg.edits is not None:
        own |= dict.fromkeys(read_raw_edits(cfg).prompt_keys, "reward")
    return Shares(cfg.shares, own)


def nothing_left(stage: Stage, shares: Sequence[float], source: str) -> ConfigError:
    """The error for a share without a record to train on."""
    return ConfigError(
        f"data.shares {list(shares)} leave {stage} nothing to train on in {source}: raise its number (they are of "
        f"{', '.join(STAGES)}), lower data.held_out, name more data, or drop data.shares"
    )


def split_held_out(records: Sequence[T], share: float, *, names: Sequence[str]) -> Split[T]:
    """Training and held-out records; a record's side depends only on its name and the share.

    A record is held out where bytes 0 to 7 of the SHA-256 of its name, read as a fraction of 1, are below ``share``.
    With two or more names and any share above 0, the name of the lowest fraction is held out, and that of the highest
    is not. A single name is trained on. Records of one name stay together.

    Args:
        records: the records to split.
        share: share of the names to hold out, in [0, 1).
        names: the name of each record.

    Returns:
        Training and held-out records, in their order.
    """
    fractions = [_fraction(name, 0) for name in names]
    if share <= 0 or len(set(fractions)) < 2:
        return Split(list(records), [])
    lowest, highest = min(fractions), max(fractions)
    out = [fraction == lowest or (fraction < share and fraction != highest) for fraction in fractions]
    return Split([r for r, held in zip(records, out, strict=True) if not held], list(compress(records, out)))


def _where(read: ReadResult[T], mine: Sequence[bool]) -> ReadResult[T]:
    return replace(
        read,
        records=tuple(compress(read.records, mine)),
        prompt_keys=tuple(compress(read.prompt_keys, mine)),
        answer_keys=tuple(compress(read.answer_keys, mine)),
    )


def _names(read: ReadResult[Any]) -> tuple[str, ...]:
    """What decides on which side each record is."""
    keys = read.prompt_keys
    answers = read.answer_keys or ("",) * len(keys)
    alike = len(set(keys)) < 2
    return tuple(f"{key}\0{answer}" if alike or not key else key for key, answer in zip(keys, answers, strict=True))


def _fraction(text: str, first_byte: int) -> float:
    """Eight bytes of the text's SHA-256 as a number in [0, 1), cut to the 53 bits of a float so that none becomes 1."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[first_byte : first_byte + 8], "big")
    return (number >> 11) / 2**53

"""The policy of the best evaluation of a PPO run, kept beside the last one.

A policy that goes on maximising its own reward at last exploits it: that reward still rises on held-out prompts when
what people want falls. So the best policy is looked for among those that are near the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tlcr.errors import ConfigError
from tlcr.files import remove, write_json
from tlcr.text.files import parse_json
from tlcr.training.checkpoint import reading
from tlcr.training.distributed import on_main_process

logger = logging.getLogger(__name__)

__all__ = ["BEST", "RECORD", "BestPolicy", "Kept", "Per"]

BEST = "best"
"""Folder of a PPO run that has the kept policy, in ``policy/``, and its record."""
RECORD = "best.json"

Per = Literal["token", "answer"]
"""What a figure is a mean over, so that answers of different length can be compared. An own reward is one over tokens,
where tokens are paid: not centred, their sum pays for length. It is one over answers where an answer has one score:
divided by tokens it pays for short answers, or for long ones below 0."""


@dataclass(frozen=True)
class Kept:
    """What is known of the kept policy: the update after which it was evaluated, its own reward and KL there."""

    update: int
    own_reward: float
    """Of answers to held-out prompts, without KL."""
    kl: float
    """Nats per token; the exact one where the evaluation has it."""
    per: Per = "token"
    """What ``own_reward`` is a mean over. Records of earlier versions do not say it: theirs is per token."""

    def loses_to(self, other: Kept) -> bool:
        """Whether the other takes its place: by more of the same, or because the two are not to be compared."""
        return self.per != other.per or other.own_reward > self.own_reward


class BestPolicy:
    """Keeps the policy whose own reward on held-out prompts was highest among the evaluations whose KL to the reference
    was at most ``max_kl`` nats per token (ours). None: at any KL.

    What is in the folder is the truth: a run that goes on from a checkpoint before the kept policy keeps it, because it
    is a policy of this run. Its log is that of an uninterrupted run: ``reached`` is the best up to the last evaluation,
    and the checkpoints hold it.
    """

    def __init__(self, folder: Path, *, max_kl: float | None) -> None:
        self.folder, self.max_kl = folder, max_kl
        self.kept: Kept | None = None
        self.reached: Kept | None = None

    @property
    def _aside(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.new")

    def begin(self, *, resumed: bool, state: Mapping[str, Any] | None = None) -> None:
        """Takes up what an earlier sitting kept, or throws it away. Every process calls it.

        Args:
            resumed: whether the run goes on from a checkpoint, and not from its start.
            state: what ``state_dict`` returned for that checkpoint; None where it holds none, as of earlier versions.
        """

        def tidy() -> None:
            if resumed and (self._aside / RECORD).is_file():  # whole, and the power went out before it had its name
                remove(self.folder)
                self._aside.rename(self.folder)
            remove(self._aside)
            if not resumed or not (self.folder / RECORD).is_file():
                remove(self.folder)

        on_main_process(tidy)
        if (self.folder / RECORD).is_file():
            with reading(self.folder / RECORD, "delete that folder, and the best policy from now on is kept"):
                found: Mapping[str, Any] = parse_json((self.folder / RECORD).read_text(encoding="utf-8"))
                per: Per = "answer" if _name("answer") in found else "token"
                self.kept = Kept(int(found["update"]), float(found[_name(per)]), float(found["kl_per_token"]), per)
        if self.kept is not None and self._is_far(self.kept.kl):
            logger.warning(
                "%s: the policy of update %d has a KL of %.3f nats per token, above ppo.best_max_kl = %s; the next one "
                "below it takes its place",
                self.folder,
                self.kept.update,
                self.kept.kl,
                self.max_kl,
            )
            self.kept = None
        reached = None if state is None or state["reached"] is None else Kept(**state["reached"])
        self.reached = self.kept if state is None else None if reached and self._is_far(reached.kl) else reached

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"reached": None if self.reached is None else asdict(self.reached)}

    def consider(
        self, update: int, evaluation: Mapping[str, float], save: Callable[[Path], None], *, per: Per = "token"
    ) -> None:
        """Keeps the policy as it is now, if it is the best so far. Every process calls it.

        Args:
            update: updates done.
            evaluation: the figures of the policy on held-out prompts.
            save: writes the policy to a folder.
            per: what the own reward is a mean over.

        Raises:
            ConfigError: the evaluation lacks the own reward or the KL.
        """
        measure = f"proxy_per_{per}"
        kl = evaluation.get("exact_kl_per_token", evaluation.get("kl_per_token"))
        own_reward = evaluation.get(measure)
        if kl is None or own_reward is None:
            raise ConfigError(
                f"ppo.keep_best: the evaluation gave {', '.join(evaluation) or 'nothing'}, wanted {measure} and "
                "kl_per_token among them; let evaluate return both, or set ppo.keep_best: false"
            )
        if self._is_far(kl):
            return
        now = Kept(update, own_reward, kl, per)
        if self.reached is None or self.reached.loses_to(now):
            self.reached = now
        if self.kept is not None and not self.kept.loses_to(now):
            return
        on_main_process(lambda: remove(self._aside))
        save(self._aside / "policy")

        def name() -> None:
            record = {
                "update": update,
                _name(per): own_reward,
                "kl_per_token": kl,
                "max_kl": self.max_kl,
                "evaluation": dict(evaluation),
            }
            write_json(self._aside / RECORD, record)
            remove(self.folder)
            self._aside.rename(self.folder)

        on_main_process(name)
        self.kept = now

    def metrics(self) -> dict[str, float]:
        """The update of the best policy so far, under its logged name; 0 where there is none yet."""
        return {"best_update": float(self.reached.update if self.reached else 0)}

    def __str__(self) -> str:
        """Which policy was kept and why."""
        limit = "at any KL" if self.max_kl is None else f"among those with a KL of at most {self.max_kl} nats per token"
        if self.kept is None:
            return f"no policy is kept in {self.folder}: none was evaluated {limit}"
        return (
            f"{self.folder}/policy is the policy of update {self.kept.update}: its own reward on held-out prompts, "
            f"{self.kept.own_reward:.4g} per {self.kept.per} at a KL of {self.kept.kl:.4g} nats per token, was the "
            f"highest {limit}"
        )

    def _is_far(self, kl: float) -> bool:
        return self.max_kl is not None and kl > self.max_kl


def _name(per: Per) -> str:
    """The own reward's name in the record."""
    return f"own_reward_per_{per}"

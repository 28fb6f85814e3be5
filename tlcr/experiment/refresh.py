"""The refresh of an arm's discriminator: who revises the policy's answers, and what its first training saw."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.data import embedded
from tlcr.data.readers import read_raw_preferences
from tlcr.data.records import TextPreference, as_texts
from tlcr.data.splits import read_shares
from tlcr.errors import ConfigError
from tlcr.experiment.frozen_models import FrozenModels
from tlcr.experiment.preflight import makes_prompts, no_refresh
from tlcr.experiment.run_folder import RunFolder
from tlcr.recipes.refresh_discriminator import DiscriminatorRefresh, Revise
from tlcr.reviser.revise import check_answered, revise
from tlcr.rewards.sources import same_tokenizer
from tlcr.training.distributed import process_count
from tlcr.types import EditPair, LabelledPair

__all__ = ["check_refreshed", "refresh_of"]

CACHE = Path("refresh") / "answers.sqlite"
"""In the folder of a PPO run: the answers of its reviser, so that a resumed run pays for none twice."""


def refresh_of(
    run: RunFolder, cfg: RunConfig, frozen: FrozenModels, seed: int, folder: Path
) -> DiscriminatorRefresh | None:
    """The refresh that ``cfg.reward`` asks for.

    Args:
        run: the run, for its tokenizer, edits and preferences.
        cfg: the config of the trial.
        frozen: the models of its reward; the discriminator among them is trained in place.
        seed: of the trial.
        folder: of the trial.

    Returns:
        The refresh; None where the discriminator stays frozen.

    Raises:
        ConfigError: the discriminator has another tokenizer than the policy, or several processes share the run.
    """
    if not cfg.reward.refresh.every:
        return None
    if process_count() > 1:
        raise no_refresh(process_count())
    loaded = frozen.discriminator
    assert loaded is not None  # kinds that read none are refused with the config
    check_refreshed(run.tokenizer, loaded.tokenizer)

    def first_pairs() -> Sequence[LabelledPair]:
        (labelled, _), count = run.labelled, len(run.edits.train)
        run.release_labels()
        return labelled[:count]

    # the embedded task's prompts have no preferences of their own, and need none: its reviser knows the language
    reviser = _by_the_embedded_task(seed) if makes_prompts(cfg) else _by_a_model(run, cfg, folder)
    return DiscriminatorRefresh(
        cfg, model=loaded.model, tokenizer=loaded.tokenizer, original=first_pairs, revise=reviser, seed=seed
    )


def check_refreshed(policy: PreTrainedTokenizerBase, discriminator: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the discriminator that learns on has another tokenizer than the policy."""
    if not same_tokenizer(policy, discriminator):
        raise ConfigError(
            "reward.refresh trains the discriminator on the policy's answers token by token, but the discriminator in "
            "discriminator.path has another tokenizer; name one trained from the policy's model, or set "
            "reward.refresh.every: 0"
        )


def _by_the_embedded_task(seed: int) -> Revise:
    def edit(answers: Sequence[tuple[str, str]], updates: int) -> Sequence[EditPair]:
        rng = random.Random(f"revisions {seed} {updates}")
        return [
            EditPair(f"update-{updates}-{number}", prompt, answer, embedded.revise(prompt, answer, rng))
            for number, (prompt, answer) in enumerate(answers)
        ]

    return edit


def _by_a_model(run: RunFolder, cfg: RunConfig, folder: Path) -> Revise:
    """Asks the reviser of the config, which compares an answer with the chosen one to its prompt."""
    raw = as_texts(read_shares(cfg.data).of("ppo", read_raw_preferences(cfg.data)).records)
    as_text = {pair.id: pair for pair in raw}
    if mixed := {pair.id for pair in raw if pair != as_text[pair.id]}:
        raise ConfigError(
            f"reward.refresh finds a preference by its id, and {len(mixed)} ids belong to several unlike records, such "
            f"as {min(mixed)!r}; give each record an id of its own, or none, or set reward.refresh.every: 0"
        )
    chosen = {pair.prompt: as_text[pair.id] for pair in run.preferences("ppo").train}
    if unknown := set(run.prompts.train) - set(chosen):
        raise ConfigError(
            f"reward.refresh compares the policy's answers with chosen ones, and {len(unknown)} of PPO's prompts have "
            f"none, such as {min(unknown)[:80]!r}; set reward.refresh.every: 0"
        )

    def edit(answers: Sequence[tuple[str, str]], updates: int) -> list[EditPair | None]:
        # a blank one has nothing to edit
        places = [number for number, (_, answer) in enumerate(answers) if answer.strip()]
        asked = []
        for number in places:
            prompt, answer = answers[number]
            pair = chosen[prompt]
            asked.append(TextPreference(f"update-{updates}-{number}", pair.prompt, pair.chosen, answer, pair.template))
        checked, _ = revise(asked, cfg.reviser, cfg.data, folder / CACHE)
        check_answered(checked, cfg.reviser)
        edits: list[EditPair | None] = [None] * len(answers)
        for number, pair, found in zip(places, asked, checked, strict=True):
            if found.outcome in ("revised", "unchanged") and found.revised is not None:
                edits[number] = EditPair(pair.id, answers[number][0], pair.rejected, found.revised)
        return edits

    return edit

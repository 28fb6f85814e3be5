"""The folder of a run: its config, its data, and which stages are done.

A finished stage leaves a record (``done.json``) beside its results, with the part of the config that made them. A
later run with the same part skips the stage; a run with another part stops, because mixed configs would go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import ModelConfig, RunConfig
from tlcr.config.stages import DONE, STARTED, TRAINED, wants
from tlcr.config.trials import Trial, folder_of, trials_of
from tlcr.data import embedded
from tlcr.data.labels import LabelStatistics, label_pairs
from tlcr.data.readers import (
    ReadResult,
    read_edits,
    read_preferences,
    read_prompts,
    read_raw_edits,
    read_raw_preferences,
    read_raw_prompts,
)
from tlcr.data.records import TextPreference, as_texts, prompt_key
from tlcr.data.splits import Shares, ShareStatistics, Split, Stage, in_order_of_hashes, nothing_left, read_shares
from tlcr.errors import ConfigError
from tlcr.experiment.locks import sole_work
from tlcr.experiment.preflight import unfinished, unnamed
from tlcr.models.tokenizers import load_tokenizer
from tlcr.training.checkpoint import as_plain, reading
from tlcr.training.distributed import barrier, on_main_process, process_device
from tlcr.training.done import (
    check_results,
    decisive,
    done_config,
    is_done,
    mark_done,
    origin_of,
    remove_checkpoints,
)
from tlcr.training.sharding import Sharding, plan
from tlcr.types import EditPair, LabelledPair, PreferencePair

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")
EMBEDDED_PROMPTS = 2000
"""Training prompts that the embedded task makes for PPO; about 60 passes of questions without repetition."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves for the record of its stage: its figures, and its seconds over all sittings."""

    metrics: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, eq=False)
class RunFolder:
    """An opened run for one seed: ``cfg.seed`` is the seed of the models before PPO, which are in ``models``."""

    cfg: RunConfig
    resume: bool
    path: Path
    models: Path

    @cached_property
    def per_seed(self) -> dict[int, RunFolder]:
        """The run for each of ``seeds``: this one for all, or one with separate models for each."""
        if not self.cfg.models_per_seed:
            return dict.fromkeys(self.cfg.seeds, self)
        return {
            seed: replace(self, cfg=replace(self.cfg, seed=seed), models=self.path / "models" / f"seed-{seed}")
            for seed in self.cfg.seeds
        }

    @property
    def model_folders(self) -> list[RunFolder]:
        """The different ones of ``per_seed``: each has stages before PPO to run."""
        return list(dict.fromkeys(self.per_seed.values()))

    @property
    def embedded(self) -> bool:
        return self.cfg.model.path == "embedded"

    @cached_property
    def started(self) -> datetime:
        """When the run began. A folder of a version that did not record it has no such time: it is now."""
        path = self.path / STARTED
        if not path.is_file():
            return datetime.now()
        with reading(path, "write into it the time when the run began, as every chat template of the run shows it"):
            return datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["started"])

    @cached_property
    def device(self) -> torch.device:
        return process_device()

    @property
    def sharding(self) -> Sharding | None:
        """How its models are cut into shards; None where they stay whole."""
        return plan(self.cfg.sharding)

    def settings(self, *sections: str) -> dict[str, Any]:
        """What the result of a stage depends on: these sections of the config, the seed, and the revisions where the
        stage uses labels that come from a reviser."""
        settings = self._sections(*sections)
        return {**settings, "revisions": self._revisions_digest} if "labels" in sections and self.revises else settings

    def _sections(self, *names: str) -> dict[str, Any]:
        return {"seed": self.cfg.seed, **{name: getattr(self.cfg, name) for name in names}, **self._adapters(*names)}

    def _adapters(self, *names: str) -> dict[str, Any]:
        """``lora`` where some of these are trained by adapters, with them alone; else nothing."""
        adapted = tuple(name for name in self.cfg.lora.roles if name in names and self.cfg.lora.trains(name))
        return {"lora": {**as_plain(self.cfg.lora), "roles": adapted}} if adapted else {}

    # ---- trials

    @cached_property
    def trials(self) -> list[Trial]:
        return trials_of(self.cfg)

    def name_by_coefficient(self) -> None:
        """Gives trials that ended when their arm had a single KL coefficient the folders that name it, where there are
        several now, and the other way round. The main process alone calls it."""
        for trial in self.trials:
            place = self.trial_folder(trial)
            alone, named = (
                self.path / "ppo" / folder_of(trial.arm.name, coef, trial.seed) for coef in (None, trial.kl_coef)
            )
            before, number = (named, "one KL coefficient") if place == alone else (alone, "several KL coefficients")
            settings = self.per_seed[trial.seed].trial_settings(trial)
            ended = is_done(before, settings, TRAINED) or _was_judged_otherwise(before, settings)
            if ended and not place.exists():
                place.parent.mkdir(exist_ok=True)
                before.rename(place)
                if before == named and not any(named.parent.iterdir()):
                    named.parent.rmdir()
                logger.info("%s is now %s: its arm has %s", before, place, number)

    def needs_evaluation_alone(self, trial: Trial) -> bool:
        """Whether the trial finished with the current settings but for those of its evaluation."""
        return _was_judged_otherwise(self.trial_folder(trial), self.trial_settings(trial))

    def trial_folder(self, trial: Trial) -> Path:
        return self.path / "ppo" / trial.folder

    def is_trained(self, trial: Trial) -> bool:
        """Whether the trial finished, evaluation included, with the current settings."""
        return is_done(self.trial_folder(trial), self.trial_settings(trial), TRAINED)

    def trial_settings(self, trial: Trial) -> dict[str, Any]:
        """The settings that one PPO run depends on, those of earlier stages included."""
        cfg = trial.config(self.cfg)
        own = {name: getattr(cfg, name) for name in ("reward", "kl", "rollout", "ppo", "evaluation")}
        before = self._sections("model", "data", "sft", "labels")
        if wants(cfg, "revisions"):
            before["revisions"] = self._revisions_digest
        frozen = {
            "discriminator": cfg.uses_discriminator(cfg.reward) and cfg.discriminator,
            "reward_model": cfg.uses_reward_model(cfg.reward) and cfg.reward_model,
            "dpo": cfg.uses_dpo(cfg.reward) and cfg.dpo,
            **({"q_model": cfg.q_model} if cfg.uses_q_model(cfg.reward) else {}),  # earlier versions had none
        }
        used = [name for name, settings in frozen.items() if settings]
        return {**before, **frozen, **own, **self._adapters("sft", *used, "policy", "value"), "ppo_seed": trial.seed}

    def origin(self, trial: Trial) -> dict[str, Any]:
        """What a PPO run stands on that its checkpoints do not hold: the models that it starts from and is paid by, as
        ``origin_of`` names them, and the settings with which these are read."""
        cfg = trial.config(self.cfg)
        reward, model = cfg.reward, self.policy_source
        judges = {
            "discriminator": cfg.uses_discriminator(reward) and self.discriminator_folder,
            "reward_model": cfg.uses_reward_model(reward) and self.reward_model_folder,
            "q_model": cfg.uses_q_model(reward) and self.q_model_folder,
            "dpo": cfg.uses_dpo(reward) and self.dpo_folder,
        }
        return {
            "policy": self._name_of(model),
            **{name: origin_of(folder) for name, folder in judges.items() if folder},
            **({"q_beta": cfg.q_model.beta} if judges["q_model"] else {}),
            **({"dpo_beta": cfg.dpo.beta} if judges["dpo"] else {}),
            "dtype": model.dtype,
            "max_prompt_tokens": cfg.data.max_prompt_tokens,
        }

    def origin_of_stage(self, stage: str) -> dict[str, Any]:
        """What a model before PPO starts from, which its checkpoints do not hold, and how that is read and adapted."""
        model = self.cfg.model if stage == "sft" else self.policy_source
        return {"model": self._name_of(model), "dtype": model.dtype, **self._adapters(stage)}

    def _name_of(self, model: ModelConfig) -> str:
        return f"embedded, seed {self.cfg.seed}" if model.path == "embedded" else origin_of(model.path)

    # ---- what is trained, and in which folder

    def wants(self, stage: str) -> bool:
        """``config.stages.wants``."""
        return wants(self.cfg, stage)

    @property
    def policy_source(self) -> ModelConfig:
        """The model that reward model, discriminator and PPO start from: the result of SFT, or ``model`` itself."""
        if not self.cfg.sft.enabled:
            return self.cfg.model
        return self.cfg.model.saved_in(self._written("sft"))

    @property
    def discriminator_folder(self) -> Path:
        path = self.cfg.discriminator.path
        return Path(path) if path else self._written("discriminator")

    @property
    def reward_model_folder(self) -> Path:
        path = self.cfg.reward_model.path
        return Path(path) if path else self._written("reward_model")

    @property
    def q_model_folder(self) -> Path:
        path = self.cfg.q_model.path
        return Path(path) if path else self._written("q_model")

    @property
    def dpo_folder(self) -> Path:
        path = self.cfg.dpo.path
        return Path(path) if path else self._written("dpo")

    def _written(self, stage: str) -> Path:
        folder = self.revisions_folder if stage == "revisions" else self.models / stage
        if not (folder / DONE).exists():
            raise unfinished(folder, stage)
        check_results(folder)
        return folder

    # ---- data

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return embedded.build_tokenizer(self.cfg.seed) if self.embedded else load_tokenizer(self.cfg.model)

    @property
    def has_preferences(self) -> bool:
        return self.embedded or self.cfg.data.preferences is not None

    @property
    def revises(self) -> bool:
        """Whether this run makes the edits with a reviser."""
        return self.cfg.reviser.backend != "none"

    @property
    def revisions_folder(self) -> Path:
        """The same for all seeds, so that each revision is paid only once."""
        return self.path / "revisions"

    @cached_property
    def _revisions_digest(self) -> str:
        return hashlib.sha256((self._written("revisions") / "revisions.jsonl").read_bytes()).hexdigest()

    @cached_property
    def shares(self) -> Shares:
        """Which stage each prompt is for."""
        return read_shares(self.cfg.data)

    @property
    def data_wanted(self) -> list[Stage]:
        """The stages of data.shares that a run of all stages trains in."""
        wanted: dict[Stage, bool] = {
            "sft": self.wants("sft"),
            "reward": any(map(self.wants, ("reward_model", "q_model", "dpo", "labels", "revisions"))),
            "ppo": True,
        }
        return [stage for stage, needed in wanted.items() if needed]

    def share_statistics(self) -> ShareStatistics:
        """How many prompts each stage gets, counted in the raw sources without a tokenizer."""
        data = self.cfg.data
        preferences = read_raw_preferences(data)
        edits = {} if data.edits is None else {"edits": read_raw_edits(data)}
        return self.shares.statistics(
            {
                "sft": {"preferences": preferences},
                "reward": {"preferences": preferences, **edits},
                "ppo": {"prompts": preferences if data.prompts is None else read_raw_prompts(data)},
            },
            data.held_out,
        )

    def preferences(self, stage: Stage) -> Split[PreferencePair]:
        return self._split(stage, self._all_preferences)

    @property
    def comparisons(self) -> list[PreferencePair]:
        """Held-out preferences for the discriminator to rank; empty where the run has none."""
        if not self.has_preferences:
            return []
        return self.shares.split("reward", self._all_preferences, self.cfg.data.held_out).held_out

    @cached_property
    def edits(self) -> Split[EditPair]:
        if self.revises:
            made = str(self._written("revisions") / "revisions.jsonl")
            data = replace(self.cfg.data, edits=made, edits_format="edits", limit=None)
            return self._split("reward", read_edits(data, self.tokenizer, rendered_at=self.started))
        if self._made_here(self.cfg.data.edits):
            return self._split("reward", self._embedded_pairs[1])
        self._named("edits", "the discriminator")
        return self._split("reward", read_edits(self.cfg.data, self.tokenizer, rendered_at=self.started))

    @cached_property
    def prompts(self) -> Split[str]:
        if self._made_here(self.cfg.data.prompts or self.cfg.data.preferences):
            words = self.cfg.data.embedded_words
            return Split(
                embedded.prompts(EMBEDDED_PROMPTS, self.cfg.seed, "train", words),
                embedded.prompts(self.cfg.evaluation.prompts, self.cfg.seed, "held_out", words),
            )
        if self.cfg.data.preferences is None:
            self._named("prompts", "PPO")
        read = in_order_of_hashes(read_prompts(self.cfg.data, self.tokenizer, rendered_at=self.started))
        split, count = self._split("ppo", read), self.cfg.evaluation.prompts
        if len(split.train) == 1 and not split.held_out and self.cfg.data.held_out > 0:
            logger.warning("PPO has one prompt, so that it is trained and evaluated on that one")
            return Split(split.train, split.train * count)
        return Split(split.train, split.held_out[:count])

    @cached_property
    def _all_preferences(self) -> ReadResult[PreferencePair]:
        if self._made_here(self.cfg.data.preferences):
            return self._embedded_pairs[0]
        self._named("preferences", "training on preferences")
        return read_preferences(self.cfg.data, self.tokenizer, rendered_at=self.started)

    @cached_property
    def _embedded_pairs(self) -> tuple[ReadResult[PreferencePair], ReadResult[EditPair]]:
        preferences, edits = embedded.generate_pairs(
            self.cfg.data.embedded_pairs, self.cfg.seed, self.cfg.data.embedded_words
        )
        # Without shares the ids decide what is held out: no source can change the names or the order of made pairs.
        keys = tuple(prompt_key(pair.prompt) if self.cfg.data.shares else pair.id for pair in preferences)
        return (
            ReadResult("the embedded task", "preference", tuple(preferences), keys),
            ReadResult("the embedded task", "edits", tuple(edits), keys),
        )

    def _made_here(self, source: str | None) -> bool:
        return self.embedded and source is None

    def _named(self, source: str, what: str) -> None:
        if getattr(self.cfg.data, source) is None:
            raise unnamed(source, what)

    def _split(self, stage: Stage, read: ReadResult[RecordT]) -> Split[RecordT]:
        split = self.shares.split(stage, read, self.cfg.data.held_out)
        if self.shares.shares and not split.train:
            raise nothing_left(stage, self.shares.shares, read.source)
        return split

    @cached_property
    def labelled(self) -> tuple[list[LabelledPair], LabelStatistics]:
        """The edits with their labels, first those to train on; computed, and warned of, once for all stages."""
        return label_pairs([*self.edits.train, *self.edits.held_out], self.tokenizer, self.cfg.data, self.cfg.labels)

    def release_labels(self) -> None:
        """Frees ``labelled``, which holds every token of the edits; PPO does without."""
        vars(self).pop("labelled", None)

    # ---- stages

    def once(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        work: Callable[[], Mapping[str, Any] | Trained],
        record: str = DONE,
        *,
        again: bool = False,
        is_stale: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs ``work`` unless ``folder`` records that it finished with these settings; records its metrics at the end.

        If it finished with other settings, raises ConfigError, or with ``again`` runs it again (for work that is cheap
        the second time). ``is_stale`` says whether it is to be run again although nothing of the settings changed.
        """

        def is_to_do() -> bool:
            return (is_done(folder, settings, record) and is_stale()) or not self._skips(folder, settings, record)

        if is_to_do():
            with sole_work(folder, str(folder)):
                if is_to_do():  # another may have ended since
                    self._do(folder, settings, work, record, again=again)

    def _skips(self, folder: Path, settings: Mapping[str, Any], record: str) -> bool:
        if not is_done(folder, settings, record):
            return False
        logger.info("%s is done; skipped", folder)
        on_main_process(lambda: remove_checkpoints(folder))
        return True

    def _do(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        work: Callable[[], Mapping[str, Any] | Trained],
        record: str,
        *,
        again: bool,
    ) -> None:
        if (folder / record).exists() and again:
            barrier()
            on_main_process((folder / record).unlink)
        elif (folder / record).exists():
            changed = _differences(done_config(folder, settings, record), decisive(settings))
            raise ConfigError(
                f"{folder} was made with other settings ({'; '.join(changed[:3])}): restore them, name another "
                "output_dir, or delete that folder to make it again"
            )
        started = time.monotonic()
        found = work()
        ended = found if isinstance(found, Trained) else Trained(found, 0.0)
        seconds = round(max(time.monotonic() - started, ended.seconds), 1)  # training may have begun in another sitting
        mark_done(folder, config=settings, metrics=ended.metrics, seconds=seconds, record=record)


def _was_judged_otherwise(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a trial finished in the folder with these settings but for those of its evaluation."""
    if not (folder / TRAINED).is_file():
        return False
    then, now = done_config(folder, settings, TRAINED), decisive(settings)
    return then != now and {**then, "evaluation": None} == {**now, "evaluation": None}


def raw_preferences(cfg: RunConfig) -> tuple[TextPreference, ...]:
    """The preference pairs as in their source, without a tokenizer, for a reviser."""
    if cfg.model.path == "embedded" and cfg.data.preferences is None:
        pairs = embedded.generate_pairs(cfg.data.embedded_pairs, cfg.seed, cfg.data.embedded_words)[0]
        return tuple(TextPreference(pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in pairs)
    return as_texts(read_shares(cfg.data).of("reward", read_raw_preferences(cfg.data)).records)


def revision_cache(cfg: RunConfig) -> Path:
    """The file that stores the answers of a reviser."""
    return Path(cfg.reviser.cache or Path(cfg.output_dir) / "revisions" / "answers.sqlite")


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        paths = {key: f"{path}.{key}".lstrip(".") for key in [*before, *now]}
        return [
            difference
            for key, name in paths.items()
            for difference in (
                [f"{name} was not there, is {now[key]!r}"]
                if key not in before
                else [f"{name} was {before[key]!r}, is no longer there"]
                if key not in now and before[key] is not None
                else _differences(before[key], now.get(key), name)
            )
        ]
    return [] if before == now else [f"{path} was {before!r}, is {now!r}"]

"""The whole method, stage by stage: the call order of ``run`` is the pipeline of the paper.

Every stage reads the files that earlier stages wrote into the run's folder. So each stage can run alone, and finished
stages are skipped.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.config.stages import CONFIG, DONE, STARTED
from tlcr.config.trials import Trial
from tlcr.data import embedded
from tlcr.data.labels import write_labels
from tlcr.data.readers import read_edits, read_preferences
from tlcr.data.splits import Stage
from tlcr.errors import ConfigError, TlcrError
from tlcr.experiment.arm import evaluate_arm, train_arm
from tlcr.experiment.locks import sole_run
from tlcr.experiment.opening import config_kept_if_refused, open_run, reopen_run
from tlcr.experiment.preflight import for_one_process, require, unfinished
from tlcr.experiment.run_folder import RunFolder, Trained, raw_preferences, revision_cache
from tlcr.experiment.workers import PLACE, Job, run_side_by_side
from tlcr.files import write_json
from tlcr.models.discriminator import load_discriminator
from tlcr.models.loading import load_causal_lm
from tlcr.models.notes import forget_notes
from tlcr.recipes.analyse_discriminator import DiscriminatorAnalysis, analyse_discriminator
from tlcr.recipes.train_discriminator import train_discriminator
from tlcr.recipes.train_dpo import train_dpo
from tlcr.recipes.train_q_model import train_q_model
from tlcr.recipes.train_reward_model import train_reward_model
from tlcr.recipes.train_sft import train_sft
from tlcr.report.analysis import print_analysis
from tlcr.report.page import print_results, write_analysis_page, write_report
from tlcr.report.results import read_json
from tlcr.reviser.dry_run import dry_run
from tlcr.reviser.prompt import VERSION
from tlcr.reviser.revise import revise, write_revisions
from tlcr.training.distributed import on_main_process, process_count
from tlcr.training.interrupt import leave_the_terminal_to_the_parent
from tlcr.training.metrics import read_metrics
from tlcr.training.sharding import shard_model
from tlcr.training.supervised import FitResult
from tlcr.types import EditPair, PreferencePair

logger = logging.getLogger(__name__)

__all__ = ["analyse", "analyse_edits", "rehearse_revisions", "report", "run", "stage"]


def run(cfg: RunConfig, *, resume: bool = False) -> Path:
    """Runs everything that ``cfg`` asks for: all stages for all seeds and arms, evaluation and report.

    Args:
        cfg: the whole config.
        resume: continue in a folder that holds a run; finished stages are skipped.

    Returns:
        The folder that holds the results.

    Raises:
        ConfigError: something stands in the way of a stage (``preflight``), ``output_dir`` holds a run but ``resume``
            is False, the run was made with other settings, or another run is at work there.
    """
    forget_notes()
    require(cfg, resume=resume)
    with sole_run(Path(cfg.output_dir)), config_kept_if_refused(cfg):
        opened = open_run(cfg, resume=resume)
        _shares(opened, opened.data_wanted)
        if opened.wants("revisions"):
            _revisions(opened)
        _models_of_all_seeds(opened)
        _ppo(opened)
        on_main_process(lambda: report(opened.path))
    return opened.path


def stage(cfg: RunConfig, name: str, *, resume: bool = False) -> Path:
    """Runs one stage, even if no arm needs it; the stages before it must have run.

    Args:
        cfg: the whole config.
        name: "revisions", one of ``MODEL_STAGES``, "ppo", or "evaluate", which evaluates every trained policy again and
            writes the report.
        resume: continue in a folder that holds a run; finished stages are skipped.

    Returns:
        The folder that holds the results.

    Raises:
        ConfigError: something stands in the way of the stage (``preflight``), a stage before it did not run, or it ran
            with other settings.
    """
    forget_notes()
    require(cfg, [name], resume=True)
    with config_kept_if_refused(cfg):
        opened = open_run(cfg, resume=resume, whole=False)
        _shares(opened)
        if name == "evaluate":
            on_main_process(opened.name_by_coefficient)
            for trial in _trained(opened):
                evaluate_arm(opened.per_seed[trial.seed], trial)
            on_main_process(lambda: report(opened.path))
        elif name == "revisions":
            _revisions(opened)
        elif name == "ppo":
            _ppo(opened)
            logger.info("wrote %s; 'tlcr report %s' compares the policies", opened.path / "ppo", opened.path)
        else:
            for run in opened.model_folders:
                MODEL_STAGES[name](run)
    return opened.path


def rehearse_revisions(cfg: RunConfig, *, show: int) -> None:
    """Prints the first ``show`` requests to the reviser, and the tokens and cost of all of them."""
    sys.stdout.write(dry_run(raw_preferences(cfg), cfg.reviser, revision_cache(cfg), show=show))


def report(folder: Path) -> Path:
    """Writes report.html and results.json of a run, and prints its table and where the page is."""
    page = write_report(folder)
    print_results(folder)
    sys.stdout.write(f"report: {page}\n")
    return page


def analyse(folder: Path) -> Path:
    """Analyses the discriminators of a run on its held-out edits, again if needed, and writes its report."""
    run = reopen_run(folder)
    if not all(seeded.edits.held_out for seeded in run.model_folders):
        raise ConfigError(
            f"the run in {folder} held no edit out (data.held_out is {run.cfg.data.held_out}); name other pairs with "
            "--edits"
        )
    for seeded in run.model_folders:
        (seeded.models / "analysis" / DONE).unlink(missing_ok=True)
        _analysis(seeded)
    print_analysis(read_json(run.model_folders[0].models / "analysis" / "analysis.json"))
    return write_report(folder)


def analyse_edits(folder: Path, edits: str, output: Path, *, preferences: str | None = None) -> Path:
    """Analyses the discriminator of a run (of its first seed, where each seed has one) on all pairs of other sources.

    Args:
        folder: the run.
        edits: the source of the edits.
        output: where analysis.json and analysis.html are written.
        preferences: a source of preference pairs, to compare whole answers.

    Returns:
        The path of analysis.html.

    Raises:
        ConfigError: ``output`` cannot be a folder.
    """
    run = reopen_run(folder).model_folders[0]
    try:  # now, and not when minutes of work are to be written
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {str(output)!r} cannot be a folder: {error.strerror}; name another") from error
    data = replace(
        run.cfg.data,
        edits=edits,
        edits_format="auto",
        preferences=preferences,
        preferences_format="auto",
        limit=None,
        shares=(),
    )
    pairs = read_edits(data, run.tokenizer, rendered_at=run.started).records
    _note_trained_on(run, pairs)
    found = _analyse(
        run,
        pairs,
        read_preferences(data, run.tokenizer, rendered_at=run.started).records if preferences is not None else (),
        calibrated_on_them=False,
    ).to_json()
    write_json(output / "analysis.json", found)
    print_analysis(found)
    return write_analysis_page(output, found, f"{folder.resolve().name} on {Path(edits).name}")


def _note_trained_on(run: RunFolder, pairs: Sequence[EditPair]) -> None:
    """Warns of pairs that the run's discriminator was trained on: what is found on them says nothing of others."""
    if run.cfg.discriminator.path is not None:  # trained elsewhere, on what is not known here
        return
    try:
        trained = {(edit.prompt, edit.rejected, edit.revised) for edit in run.edits.train}
    except TlcrError as error:
        logger.warning("whether the discriminator was trained on these edits is not known: %s", error)
        return
    seen = sum((edit.prompt, edit.rejected, edit.revised) in trained for edit in pairs)
    if seen:
        logger.warning(
            "the discriminator was trained on %d of these %d edits, and the figures flatter it; name edits that it has "
            "not seen, or drop --edits for those that the run held out",
            seen,
            len(pairs),
        )


def _shares(run: RunFolder, wanted: Sequence[Stage] = ()) -> None:
    """0. Where data.shares is set, divides the prompts among the stages and reports the numbers before any training.

    wanted: stages that must have something to train on.
    """

    def work() -> Mapping[str, Any]:
        statistics = run.share_statistics()
        logger.info("%s", statistics.summary())
        statistics.require(wanted)
        on_main_process(lambda: write_json(run.path / "shares" / "statistics.json", asdict(statistics)))
        return asdict(statistics)

    if run.cfg.data.shares:
        run.once(run.path / "shares", {"data": run.cfg.data}, work, again=True)


def _revisions(run: RunFolder) -> None:
    """1. A reviser corrects the rejected answers with minimal edits."""

    def work() -> Mapping[str, Any]:
        if process_count() > 1:
            raise for_one_process(process_count())
        cfg, pairs = run.cfg.reviser, raw_preferences(run.cfg)
        checked, statistics = revise(pairs, cfg, run.cfg.data, revision_cache(run.cfg))
        path = run.revisions_folder / "statistics.json"
        write_json(path, asdict(statistics) | {"made_of": _made_of(run)})
        logger.info("wrote %s", write_revisions(run.revisions_folder, pairs, checked, cfg))
        return asdict(statistics)

    # Made again where the settings changed: earlier answers come from the cache at no cost.
    settings = run.settings("data") | {"reviser": run.cfg.reviser.decisive(), "template": VERSION}
    is_stale = functools.cache(lambda: _may_be_revised_again(run))
    run.once(run.revisions_folder, settings, work, again=True, is_stale=is_stale)


def _made_of(run: RunFolder) -> dict[str, Any]:
    """What revisions depend on and no setting shows: the pairs in their files, and the caps that end the asking."""
    sources = {run.cfg.data.preferences, run.cfg.reviser.files}
    data = read_json(run.path / STARTED).get("data", {})  # as they were when this command began
    return {
        "data": {source: checksum for source, checksum in data.items() if source in sources},
        "caps": {name: getattr(run.cfg.reviser.endpoint, name) for name in ("max_requests", "max_cost")},
    }


def _may_be_revised_again(run: RunFolder) -> bool:
    """Whether finished revisions are of other pairs than the files have now, or some were left out that a higher cap
    would ask for, and nothing was made of them yet; where there was, a warning."""
    path = run.revisions_folder / "statistics.json"
    if process_count() > 1 or not path.is_file():
        return False
    before, now = read_json(path), _made_of(run)
    if "made_of" not in before:  # of an earlier version
        return False
    then = before["made_of"]
    unanswered = before["outcomes"].get("unanswered", 0)
    raised = any(
        then["caps"][name] is not None and then["caps"][name] < (cap or math.inf) for name, cap in now["caps"].items()
    )
    if then["data"] != now["data"]:
        reason = "the pairs in their file are others now"
    elif unanswered and raised:
        reason = f"{unanswered} pairs had no answer, and a cap is higher now"
    else:
        return False
    if any((seeded.models / "labels" / DONE).is_file() for seeded in run.model_folders):
        logger.warning(
            "%s: %s; the revisions are kept, since labels were made of them. To revise again, begin a run in another "
            "output_dir, with reviser.cache: %s for the answers that are there",
            run.revisions_folder,
            reason,
            revision_cache(run.cfg),
        )
        return False
    logger.info("%s: %s; they are made again, and what was answered comes from the cache", run.revisions_folder, reason)
    return True


def _sft(run: RunFolder) -> None:
    """2. Supervised fine-tuning of the policy on the preferred answers."""

    def train(**given: Any) -> FitResult:
        return train_sft(run.cfg, model=_base_model(run), **given)

    _from_preferences(run, "sft", train, share="sft", sections=("model", "data", "sft"))


def _reward_model(run: RunFolder) -> None:
    """3. The baseline: one score for a whole answer."""

    def train(**given: Any) -> FitResult:
        return train_reward_model(run.cfg, backbone=load_causal_lm(run.policy_source, sharding=run.sharding), **given)

    _from_preferences(run, "reward_model", train, share="reward", sections=("model", "data", "sft", "reward_model"))


def _q_model(run: RunFolder) -> None:
    """3. A baseline: the value of every token, learned from the same preferences."""

    def train(**given: Any) -> FitResult:
        return train_q_model(run.cfg, backbone=load_causal_lm(run.policy_source, sharding=run.sharding), **given)

    _from_preferences(run, "q_model", train, share="reward", sections=("model", "data", "sft", "q_model"))


def _dpo(run: RunFolder) -> None:
    """4. A baseline reward: a policy trained by DPO on the same preferences."""

    def train(**given: Any) -> FitResult:
        model = load_causal_lm(run.policy_source, device=run.device, sharding=run.sharding)
        return train_dpo(run.cfg, model=model, **given)

    _from_preferences(run, "dpo", train, share="reward", sections=("model", "data", "sft", "dpo"))


def _from_preferences(
    run: RunFolder, name: str, train: Callable[..., FitResult], *, share: Stage, sections: Sequence[str]
) -> None:
    """Trains the model ``name`` on preference pairs, unless it exists.

    train: a recipe that lacks only the tokenizer, the pairs and the folder. share: the stage whose part of the pairs it
    gets. sections: the sections of the config that the result depends on.
    """
    folder = run.models / name

    def work() -> Trained:
        pairs = run.preferences(share)
        result = train(
            tokenizer=run.tokenizer,
            train=pairs.train,
            held_out=pairs.held_out,
            folder=folder,
            resume=run.resume,
            origin=run.origin_of_stage(name),
        )
        logger.info("wrote %s", folder)
        return Trained({**result.metrics, **result.evaluation}, result.seconds)

    run.once(folder, run.settings(*sections), work)


def _labels(run: RunFolder) -> None:
    """5. Every token of an edited answer: kept, or changed for the better or worse."""

    def work() -> Mapping[str, Any]:
        pairs, statistics = run.labelled
        folder = run.models / "labels"
        on_main_process(lambda: write_labels(folder / "labels.jsonl", pairs, run.tokenizer))
        on_main_process(lambda: write_json(folder / "statistics.json", asdict(statistics)))
        logger.info("token labels: %s", statistics.summary())
        logger.info("wrote %s", folder / "labels.jsonl")
        return asdict(statistics)

    run.once(run.models / "labels", run.settings("model", "data", "labels"), work)


def _discriminator(run: RunFolder) -> None:
    """6. The discriminator learns the labels in context; its confidence is the reward of a token."""

    def work() -> Trained:
        (labelled, _), count = run.labelled, len(run.edits.train)
        trained = train_discriminator(
            run.cfg,
            backbone=load_causal_lm(run.policy_source, sharding=run.sharding),
            tokenizer=run.tokenizer,
            train=labelled[:count],
            held_out=labelled[count:],
            held_out_preferences=run.comparisons,
            folder=run.models / "discriminator",
            resume=run.resume,
            origin=run.origin_of_stage("discriminator"),
        )
        logger.info("wrote %s", run.models / "discriminator")
        return Trained(trained.metrics, trained.fit.seconds)

    settings = run.settings("model", "data", "sft", "labels", "discriminator")
    run.once(run.models / "discriminator", settings, work)


def _analysis(run: RunFolder) -> None:
    """7. Analysis of the discriminator on held-out edits."""
    folder = run.models / "analysis"

    def work() -> Mapping[str, Any]:
        fitted_here = run.cfg.discriminator.path is None
        found = _analyse(run, run.edits.held_out, run.comparisons, calibrated_on_them=fitted_here)
        on_main_process(lambda: write_json(folder / "analysis.json", found.to_json()))
        return {"pairs": found.pairs, "tokens": found.tokens}

    if run.edits.held_out:
        settings = run.settings("model", "data", "sft", "labels", "discriminator")
        run.once(folder, settings, work, again=True)
    else:
        logger.info("no edit is held out (data.held_out), so the discriminator is not analysed")


def _analyse(
    run: RunFolder, edits: Sequence[EditPair], preferences: Sequence[PreferencePair], *, calibrated_on_them: bool
) -> DiscriminatorAnalysis:
    model, tokenizer = load_discriminator(
        run.discriminator_folder, run.cfg.model, device=run.device, sharding=run.sharding
    )
    shard_model(model, run.sharding)
    return analyse_discriminator(
        run.cfg,
        model=model,
        tokenizer=tokenizer,
        edits=edits,
        preferences=preferences,
        calibrated_on_them=calibrated_on_them,
    )


MODEL_STAGES: dict[str, Callable[[RunFolder], None]] = {
    "sft": _sft,
    "reward_model": _reward_model,
    "q_model": _q_model,
    "dpo": _dpo,
    "labels": _labels,
    "discriminator": _discriminator,
    "analysis": _analysis,
}


def _models(run: RunFolder) -> None:
    """Everything before PPO that an arm needs."""
    for name, work in MODEL_STAGES.items():
        if run.wants(name):
            work(run)
    run.release_labels()


def _models_of_all_seeds(run: RunFolder) -> None:
    if run.cfg.parallel == 1 or len(run.model_folders) == 1:
        for seeded in run.model_folders:
            _models(seeded)
        return
    with _config_for_workers(run) as config:
        jobs = [_job(config, "models", str(s.cfg.seed), s.models) for s in run.model_folders]
        run_side_by_side(jobs, parallel=run.cfg.parallel, title="models")


def _ppo(run: RunFolder) -> None:
    """8. PPO on the reward of every token: one policy for each trial, compared before and after."""
    on_main_process(run.name_by_coefficient)
    if run.cfg.parallel == 1 or len(run.trials) == 1:
        for number, trial in enumerate(run.trials, 1):
            if len(run.trials) > 1 and not run.per_seed[trial.seed].is_trained(trial):
                logger.info("policy %d of %d: %s", number, len(run.trials), trial.folder)
            train_arm(run.per_seed[trial.seed], trial)
        return
    # a process whose work is already done costs as much as any other: some seconds of imports
    waiting = [trial for trial in run.trials if not run.per_seed[trial.seed].is_trained(trial)]
    with _config_for_workers(run) as config:
        run_side_by_side(
            [_job(config, "ppo", str(trial.folder), run.trial_folder(trial)) for trial in waiting],
            parallel=run.cfg.parallel,
            title="ppo",
            steps=run.cfg.ppo.updates,
            steps_done=lambda job: _updates_done(job.folder),
        )


def _trained(run: RunFolder) -> list[Trial]:
    """The trials whose training has ended. Raises ConfigError where there is none."""
    found = []
    for trial in run.trials:
        if (run.trial_folder(trial) / DONE).is_file():
            found.append(trial)
        else:
            logger.info("%s is not trained yet, and is not evaluated", run.trial_folder(trial))
    if not found:
        raise unfinished(run.path / "ppo", "ppo")
    return found


def _base_model(run: RunFolder) -> PreTrainedModel:
    if run.embedded:
        return embedded.build_model(run.tokenizer, run.cfg.seed)
    return load_causal_lm(run.cfg.model, device=run.device, sharding=run.sharding)


# ---- in separate processes


@contextmanager
def _config_for_workers(run: RunFolder) -> Iterator[Path]:
    """A file with the config of this run alone: every command in its folder writes the config.yaml there, while workers
    start one after another for hours."""
    with TemporaryDirectory(prefix="tlcr-") as folder:
        path = Path(folder) / CONFIG
        path.write_text(dump_config(run.cfg), encoding="utf-8")
        yield path


def _job(config: Path, stage: str, name: str, folder: Path) -> Job:
    """A job that runs ``_worker`` in a separate process.

    stage 'ppo': the trial whose folder below ppo/ is ``name``. stage 'models': all before PPO for the seed ``name``.
    """
    command = (sys.executable, "-m", "tlcr.experiment.pipeline", str(config), stage, name)
    return Job(f"{stage} {name}", command, folder)


def _updates_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def _worker(config: str, stage: str, name: str) -> int:
    """The work of one ``_job``; always resumes, because its parent has checked that it may."""
    cfg = _of_this_place(load_config(config, {}))
    opened = RunFolder(cfg, resume=True, path=Path(cfg.output_dir), models=Path(cfg.output_dir))
    try:
        if stage == "models":
            _models(opened.per_seed[int(name)])
        else:
            trial = next(trial for trial in opened.trials if str(trial.folder) == name)
            train_arm(opened.per_seed[trial.seed], trial)
    except TlcrError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _of_this_place(cfg: RunConfig) -> RunConfig:
    """The config with the servers of this worker alone: PPO runs at a time give their servers different weights."""
    place, at_a_time = map(int, os.environ[PLACE].split("/"))
    return replace(cfg, parallel=1, rollout=replace(cfg.rollout, server=cfg.rollout.server[place::at_a_time]))


if __name__ == "__main__":
    leave_the_terminal_to_the_parent()
    raise SystemExit(_worker(*sys.argv[1:]))

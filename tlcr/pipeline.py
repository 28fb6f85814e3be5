"""The whole method, stage by stage: the call order of ``run`` is the pipeline of the paper.

Every stage reads what the ones before it wrote into the run's folder, so that each can be run alone, and one that is
done is skipped.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tlcr.arm import evaluate_arm, train_arm
from tlcr.checkpoint import write_json
from tlcr.config import Arm, RunConfig
from tlcr.config_loading import load_config
from tlcr.data import embedded
from tlcr.data.reviser.dry_run import dry_run
from tlcr.data.reviser.prompt import VERSION
from tlcr.data.reviser.revise import revise, write_revisions
from tlcr.distributed import on_main_process, process_count
from tlcr.errors import ConfigError, TlcrError
from tlcr.labels import label_pairs, write_labels
from tlcr.metrics import read_metrics
from tlcr.models import load_causal_lm
from tlcr.progress import Progress
from tlcr.report import print_results, write_report
from tlcr.run_folder import RunFolder, raw_preferences, revision_cache
from tlcr.train_discriminator import train_discriminator
from tlcr.train_dpo import train_dpo
from tlcr.train_reward_model import train_reward_model
from tlcr.train_sft import train_sft

logger = logging.getLogger(__name__)

__all__ = ["rehearse_revisions", "report", "run", "stage"]


def run(cfg: RunConfig, *, resume: bool = False) -> Path:
    """Runs everything that ``cfg`` asks for and returns the folder that holds the results.

    resume: continue in a folder that holds a run; what is done is skipped. Raises ConfigError where ``output_dir``
    holds a run that nobody asked to resume, or one made with other settings.
    """
    opened = RunFolder(cfg, resume=resume)
    for name, work in STAGES.items():
        if opened.wants(name):
            work(opened)
    on_main_process(lambda: report(opened.path))
    return opened.path


def stage(cfg: RunConfig, name: str, *, resume: bool = False) -> Path:
    """Runs one stage of ``STAGES``, whether or not an arm needs it; those before it must have run.

    name 'evaluate' evaluates every trained policy again, and writes the report.
    """
    opened = RunFolder(cfg, resume=resume, whole=False)
    if name == "evaluate":
        for arm, seed in opened.ppo_runs:
            evaluate_arm(opened, arm, seed)
        on_main_process(lambda: report(opened.path))
    else:
        STAGES[name](opened)
    return opened.path


def rehearse_revisions(cfg: RunConfig, *, show: int) -> None:
    """Prints the first ``show`` requests to the reviser, and the tokens and money that all of them will take."""
    sys.stdout.write(dry_run(raw_preferences(cfg), cfg.reviser, revision_cache(cfg), show=show))


def report(folder: Path) -> Path:
    """Writes report.html and results.json of a run and prints its table."""
    page = write_report(folder)
    print_results(folder)
    return page


def _sft(run: RunFolder) -> None:
    """1. The policy learns to answer, from the preferred answers."""

    def work() -> Mapping[str, Any]:
        data = run.preferences
        model = _base_model(run)
        result = train_sft(
            run.cfg, run.tokenizer, model, data.train, data.held_out, run.path / "sft", resume=run.resume
        )
        return {**result.metrics, **result.evaluation}

    run.once(run.path / "sft", run.settings("model", "data", "sft"), work)


def _reward_model(run: RunFolder) -> None:
    """2. The baseline: one score for a whole answer."""

    def work() -> Mapping[str, Any]:
        data = run.preferences
        model = load_causal_lm(run.policy_source)
        folder = run.path / "reward_model"
        result = train_reward_model(run.cfg, run.tokenizer, model, data.train, data.held_out, folder, resume=run.resume)
        return {**result.metrics, **result.evaluation}

    run.once(run.path / "reward_model", run.settings("model", "data", "sft", "reward_model"), work)


def _dpo(run: RunFolder) -> None:
    """3. A rival's reward: the policy that DPO makes of the same preferences."""

    def work() -> Mapping[str, Any]:
        data = run.preferences
        model = load_causal_lm(run.policy_source)
        result = train_dpo(
            run.cfg, run.tokenizer, model, data.train, data.held_out, run.path / "dpo", resume=run.resume
        )
        return {**result.metrics, **result.evaluation}

    run.once(run.path / "dpo", run.settings("model", "data", "sft", "dpo"), work)


def _revisions(run: RunFolder) -> None:
    """4. A reviser mends the answers that people liked less, with the fewest edits."""

    def work() -> Mapping[str, Any]:
        if process_count() > 1:
            raise ConfigError(
                f"a reviser asks for hours from one process, while the other {process_count() - 1} would time out; "
                "run 'tlcr revise' with this config first, without the launcher"
            )
        cfg, pairs = run.cfg.reviser, raw_preferences(run.cfg)
        judged, statistics = revise(pairs, cfg, run.cfg.data, revision_cache(run.cfg))
        write_json(run.revisions_folder / "statistics.json", asdict(statistics))
        logger.info("wrote %s", write_revisions(run.revisions_folder, pairs, judged, cfg))
        return asdict(statistics)

    # Made anew where the settings changed, since what was answered before is in the cache and costs nothing.
    settings = run.settings("data") | {"reviser": run.cfg.reviser.decisive(), "template": VERSION}
    run.once(run.revisions_folder, settings, work, again=True)


def _labels(run: RunFolder) -> None:
    """5. Every token of an edited answer: kept, or changed for the better or worse."""

    def work() -> Mapping[str, Any]:
        pairs, statistics = label_pairs(
            [*run.edits.train, *run.edits.held_out], run.tokenizer, run.cfg.data, run.cfg.labels
        )
        folder = run.path / "labels"
        on_main_process(lambda: write_labels(folder / "labels.jsonl", pairs, run.tokenizer))
        on_main_process(lambda: write_json(folder / "statistics.json", asdict(statistics)))
        return asdict(statistics)

    run.once(run.path / "labels", run.settings("model", "data", "labels"), work)


def _discriminator(run: RunFolder) -> None:
    """6. The discriminator learns the labels in context; its confidence is the reward of a token."""

    def work() -> Mapping[str, Any]:
        train, held_out = (
            label_pairs(pairs, run.tokenizer, run.cfg.data, run.cfg.labels)[0]
            for pairs in (run.edits.train, run.edits.held_out)
        )
        trained = train_discriminator(
            run.cfg,
            run.tokenizer,
            load_causal_lm(run.policy_source),
            train,
            held_out,
            run.path / "discriminator",
            preference_held_out=run.preferences.held_out if run.has_preferences else (),
            resume=run.resume,
        )
        return trained.metrics

    settings = run.settings("model", "data", "sft", "labels", "discriminator")
    run.once(run.path / "discriminator", settings, work)


def _ppo(run: RunFolder) -> None:
    """7. PPO on the reward of every token: one policy for each arm and seed, compared before and after."""
    if run.cfg.parallel == 1 or len(run.ppo_runs) == 1:
        for arm, seed in run.ppo_runs:
            train_arm(run, arm, seed)
        return
    if process_count() > 1:
        raise ConfigError(
            f"parallel is {run.cfg.parallel} under a launcher of {process_count()} processes; one or the other: set "
            "parallel to 1 to share each policy among the processes"
        )
    _side_by_side(run)


STAGES: dict[str, Callable[[RunFolder], None]] = {
    "sft": _sft,
    "reward_model": _reward_model,
    "dpo": _dpo,
    "revisions": _revisions,
    "labels": _labels,
    "discriminator": _discriminator,
    "ppo": _ppo,
}


def _base_model(run: RunFolder) -> PreTrainedModel:
    return embedded.build_model(run.tokenizer, run.cfg.seed) if run.embedded else load_causal_lm(run.cfg.model)


# ---- PPO runs side by side, each a process of its own


def _side_by_side(run: RunFolder) -> None:
    """At most ``parallel`` worker processes at a time. If one fails, the others end with their state saved."""
    waiting = [(arm, seed) for arm, seed in run.ppo_runs]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    updates, done = run.cfg.ppo.updates, 0
    threads = max(1, (os.cpu_count() or 1) // run.cfg.parallel)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TLCR_PROGRESS": "0"}
    with Progress("ppo", updates * len(waiting)) as progress, _ended(running):
        while waiting or running:
            while waiting and len(running) < run.cfg.parallel:
                arm, seed = waiting.pop(0)
                command = [sys.executable, "-m", "tlcr.pipeline", str(run.path / "config.yaml"), arm.name, str(seed)]
                log = run.arm_folder(arm, seed) / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as file:
                    running[arm.name, seed] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            for (name, seed), worker in list(running.items()):
                code = worker.poll()
                if code is None:
                    continue
                del running[name, seed]
                if code != 0:
                    log = run.path / "ppo" / name / f"seed-{seed}" / "log.txt"
                    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    said = lines[-1] if lines else "no output"
                    raise TlcrError(
                        f"the PPO run {name!r}, seed {seed}, ended with code {code}: {said} ({log}); the others are "
                        "stopped with their state saved: mend it and pass --resume"
                    )
            now_done = sum(_updates_done(run, arm, seed) for arm, seed in run.ppo_runs)
            if now_done > done:
                done = now_done
                progress.on_step(done, {})
            time.sleep(0.5)


@contextmanager
def _ended(running: Mapping[Any, subprocess.Popen[bytes]]) -> Iterator[None]:
    """No worker outlives its parent: on the way out, those still running save their state and end."""
    try:
        yield
    finally:
        for worker in running.values():
            worker.terminate()
        for worker in running.values():
            worker.wait()


def _updates_done(run: RunFolder, arm: Arm, seed: int) -> int:
    path = run.arm_folder(arm, seed) / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def _worker(config: str, name: str, seed: str) -> int:
    """One PPO run in a process of its own; always resumes, since its parent decided that it may."""
    cfg = load_config(config, {})
    opened = RunFolder(cfg, resume=True, whole=False)
    arm = next(arm for arm in opened.arms if arm.name == name)
    try:
        train_arm(opened, arm, int(seed))
    except TlcrError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(_worker(*sys.argv[1:]))

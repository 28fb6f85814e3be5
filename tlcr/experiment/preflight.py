"""What a run of a config would meet: found before its first stage, by ``tlcr run`` and by ``tlcr doctor`` alike.

``settings`` needs no large package, so that a config is refused before torch is imported. What the files hold is
looked at by ``tlcr.experiment.contents``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tlcr.config.functions import import_environment, import_reward, import_scorer
from tlcr.config.loading import is_dumped
from tlcr.config.schema import EngineConfig, GeneratorConfig, RunConfig
from tlcr.config.stages import CONFIG, DONE, HOLDER, LOCK, STARTED, TRAINED, replays, stages_of
from tlcr.config.trials import arms_of, trials_of
from tlcr.config.unread import unread
from tlcr.data.places import find_source, looks_like_a_path, nearest_name
from tlcr.errors import ConfigError, TlcrError
from tlcr.experiment.architecture import GPUS_OF_A_NODE
from tlcr.training.launcher import launched_processes, processes_of_a_node, requested_sharding

__all__ = [
    "Finding",
    "Level",
    "existing",
    "for_one_process",
    "foreign_config",
    "holds_a_run",
    "knobs_alone",
    "makes_prompts",
    "models_used",
    "preflight",
    "records",
    "refuse",
    "require",
    "settings",
    "sources_used",
    "taken",
    "unfinished",
    "unnamed",
]

logger = logging.getLogger("tlcr")

Level = Literal["ok", "note", "warning", "blocked"]

SHARED = {"sft", "reward_model", "q_model", "dpo", "discriminator", "analysis", "ppo", "evaluate"}
"""Stages whose models several processes may share out among themselves."""
FROM_POLICY = {"reward_model", "q_model", "dpo", "discriminator", "ppo", "evaluate"}
"""Stages that start from the policy: the result of SFT, or ``model`` where SFT is off."""


@dataclass(frozen=True)
class Finding:
    """One fact about a config or this machine, its severity, and its remedy if it is a problem.

    repeated: whether a stage says it too, so that a run need not.
    """

    level: Level
    subject: str
    fact: str
    remedy: str = ""
    repeated: bool = False

    @classmethod
    def of(cls, subject: str, error: Exception) -> Finding:
        """The error that a stage would raise: what stands before its last semicolon is the fact."""
        fact, _, remedy = " ".join(str(error).split()).rpartition("; ")
        return cls("blocked", subject, fact or remedy, remedy if fact else "")

    def __str__(self) -> str:
        whole = f"{self.fact}; {self.remedy}" if self.remedy else self.fact
        return whole if self.subject in whole else f"{self.subject}: {whole}"


def preflight(
    cfg: RunConfig,
    stages: Collection[str] | None = None,
    *,
    resume: bool | None = None,
    processes: int | None = None,
) -> list[Finding]:
    """Everything that stands in the way of these stages, or should be known before them.

    Args:
        cfg: the whole config.
        stages: those that are to run, of ``config.stages.STAGES``, or "evaluate"; None: those of a whole run.
        resume: whether a whole run may go on with what ``output_dir`` holds; None: not asked, so that a run there is
            only noted.
        processes: that are to share the run, in nodes of eight; None: those that a launcher started.

    Returns:
        The findings. Where a model or a source is not there, nothing is said of what it would hold.
    """
    from tlcr.experiment.contents import contents

    wanted = _pending(cfg, stages_of(cfg) if stages is None else stages)
    found = list(settings(cfg, wanted, resume=resume, processes=processes))
    return found + contents(cfg, wanted, absent={finding.subject for finding in found if finding.level == "blocked"})


def require(cfg: RunConfig, stages: Collection[str] | None = None, *, resume: bool | None = None) -> None:
    """Logs the notes of ``preflight`` that no stage repeats. Raises ConfigError with all that blocks these stages."""
    found = preflight(cfg, stages, resume=resume)
    refuse(found)
    for finding in found:
        if finding.level in ("note", "warning") and not finding.repeated:
            logger.log(logging.WARNING if finding.level == "warning" else logging.INFO, "%s", finding)


def refuse(found: Iterable[Finding]) -> None:
    """Raises ConfigError with all findings that block; none, and it returns."""
    blocked = [str(finding) for finding in found if finding.level == "blocked"]
    if len(blocked) == 1:
        raise ConfigError(blocked[0])
    if blocked:
        listed = "; ".join(f"({number}) {sentence}" for number, sentence in enumerate(blocked, start=1))
        raise ConfigError(f"{len(blocked)} things stand in the way: {listed}")


def settings(
    cfg: RunConfig,
    stages: Collection[str] | None = None,
    *,
    resume: bool | None = None,
    processes: int | None = None,
) -> Iterator[Finding]:
    """The findings that need neither torch nor what a file holds; arguments as for ``preflight``."""
    wanted = _pending(cfg, stages_of(cfg) if stages is None else stages)
    for look in (_packages, _reviser):
        yield from look(cfg, wanted)
    yield from _together(cfg, wanted, processes)
    for look in (_earlier_stages, _models, _sources, _functions):
        yield from look(cfg, wanted)
    yield from _output_dir(cfg, resume)


def knobs_alone(cfg: RunConfig, stages: Collection[str], *, processes: int) -> list[Finding]:
    """Those findings of ``settings`` that hold on any machine: of how the knobs go together, and with the processes.

    Args:
        cfg: the whole config.
        stages: those that are to run.
        processes: that are to share the run, in nodes of eight.

    Returns:
        The findings.
    """
    return list(_together(cfg, _pending(cfg, stages), processes))


def _together(cfg: RunConfig, stages: Collection[str], processes: int | None) -> Iterator[Finding]:
    yield from _processes(cfg, stages, processes)
    for look in (_untrained, _held_out, _ppo, _unread):
        yield from look(cfg, stages)


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds a run that did something: a config alone was left by one that failed at once."""
    if not os.path.exists(folder / CONFIG):
        return False
    return any(path.is_file() for path in folder.rglob("*") if path.name not in (CONFIG, STARTED, LOCK, HOLDER))


def foreign_config(folder: Path) -> ConfigError | None:
    """The error for a folder whose config.yaml is by somebody's hand, which a run would replace. None for others."""
    path = folder / CONFIG
    if not os.path.exists(path) or os.path.exists(folder / STARTED) or is_dumped(path):
        return None
    return ConfigError(
        f"output_dir {str(folder)!r} holds a {CONFIG} that no run wrote, and a run writes its own there; name another "
        "output_dir, or give that file another name"
    )


def taken(folder: Path) -> ConfigError:
    """The error for a new run in a folder that holds one."""
    return ConfigError(
        f"output_dir {str(folder)!r} already holds a run; pass --resume to continue it (what is done is kept), name "
        "another output_dir, or delete that folder"
    )


def unfinished(folder: Path, stage: str) -> ConfigError:
    """The error for a stage that another one needs and that did not finish in ``folder``."""
    command = "revise" if stage == "revisions" else f"train {stage.replace('_', '-')}"
    return ConfigError(
        f"{folder} holds no finished stage; run 'tlcr {command}' with this config first, or 'tlcr run' for all stages"
    )


def for_one_process(processes: int) -> ConfigError:
    """The error for a reviser under a launcher of several processes."""
    return ConfigError(
        f"a reviser asks for hours from one process, while the other {processes - 1} would time out; run 'tlcr revise' "
        "with this config first, without the launcher"
    )


def no_refresh(processes: int) -> ConfigError:
    """The error for a refresh of the discriminator under a launcher of several processes."""
    return ConfigError(
        f"reward.refresh trains the discriminator in one process, and a launcher started {processes}; run without the "
        "launcher, or set reward.refresh.every: 0"
    )


def unnamed(source: str, what: str) -> ConfigError:
    """The error for a source that is not set, and ``what`` that needs it."""
    if source == "prompts":
        fact = f"neither data.prompts nor data.preferences is set, and {what} needs one of them"
    else:
        fact = f"data.{source} is not set, and {what} needs it"
    return ConfigError(
        f"{fact}; name a file, a folder or a hub dataset (docs/data.md shows the formats), or switch that stage off"
    )


# ---- stages and folders


def _pending(cfg: RunConfig, stages: Collection[str]) -> list[str]:
    """The stages that have no record yet: a finished run goes on even where its sources are gone."""
    return [stage for stage in stages if not all(map(os.path.exists, records(cfg, stage)))]


def records(cfg: RunConfig, stage: str) -> list[Path]:
    """The record that a finished stage leaves in each of the folders where it works."""
    folder = Path(cfg.output_dir)
    if stage == "ppo":
        return [folder / "ppo" / trial.folder / TRAINED for trial in trials_of(cfg)]
    if stage in ("revisions", "evaluate"):
        return [folder / stage / DONE]
    return [models / stage / DONE for models in _model_folders(cfg)]


def _model_folders(cfg: RunConfig) -> list[Path]:
    folder = Path(cfg.output_dir)
    return [folder / "models" / f"seed-{seed}" for seed in cfg.seeds] if cfg.models_per_seed else [folder]


def _rewards_use(cfg: RunConfig, name: str) -> bool:
    used: Callable[..., bool] = getattr(cfg, f"uses_{name}")
    return any(used(arm.reward) for arm in arms_of(cfg))


def _earlier_stages(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    """Stages whose result these start from, and which neither ran nor will."""
    needed = []
    if FROM_POLICY & set(stages) and cfg.sft.enabled:
        needed.append("sft")
    replayed = "ppo" in stages and any(replays(arm.reward) for arm in arms_of(cfg))
    if (replayed or {"labels", "discriminator", "analysis"} & set(stages)) and cfg.reviser.backend != "none":
        needed.append("revisions")
    if {"ppo", "evaluate"} & set(stages):
        needed += [
            name
            for name in ("reward_model", "q_model", "dpo", "discriminator")
            if getattr(cfg, name).path is None and _rewards_use(cfg, name)
        ]
    for stage in needed:
        missing = [path.parent for path in records(cfg, stage) if not os.path.exists(path)]
        if missing and stage not in stages:
            yield Finding.of(stage, unfinished(missing[0], stage))


def _output_dir(cfg: RunConfig, resume: bool | None) -> Iterator[Finding]:
    if not cfg.output_dir.strip():
        yield Finding("blocked", "output_dir", "it is empty", "name a folder; '.' is the one that you are in")
        return
    folder = Path(cfg.output_dir)
    there = existing(folder)
    if not there.is_dir():
        yield Finding("blocked", "output_dir", f"{there} is a file, not a folder", "name another output_dir")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Finding("blocked", "output_dir", f"{there} cannot be written to", "name another output_dir")
    elif (reason := _unmakeable(folder, there)) is not None:
        yield Finding("blocked", "output_dir", f"{folder} cannot be made: {reason}", "name another output_dir")
    elif (foreign := foreign_config(folder)) is not None:
        yield Finding.of("output_dir", foreign)
    elif resume is not True and holds_a_run(folder):
        found = Finding.of("output_dir", taken(folder))
        yield replace(found, level="note") if resume is None else found


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    # not Path.exists, which raises where a name is too long
    return next(there for there in (folder, *folder.parents) if os.path.exists(there))


ROOM = 400
"""Bytes of the longest path below a run's folder, about."""


def _unmakeable(folder: Path, there: Path) -> str | None:
    """Why a folder cannot be made in the nearest one above it: a name is too long, or the file system lets nobody make
    folders, as /proc does whatever the permissions say. None where it can, or is there."""
    new = folder.absolute().relative_to(there).parts
    if not new:
        return None
    try:
        longest = os.pathconf(there, "PC_NAME_MAX")
        if long := [part for part in new if len(os.fsencode(part)) > longest]:
            return f"{long[0][:40]}... is longer than {longest} bytes"
        if len(os.fsencode(folder)) > os.pathconf(there, "PC_PATH_MAX") - ROOM:
            return f"its path has {len(os.fsencode(folder))} bytes, which leaves too few for what stands in it"
        os.rmdir(tempfile.mkdtemp(prefix=".tlcr-", dir=there))
    except OSError as error:
        return str(error.strerror)
    return None


# ---- packages, processes, functions


def _packages(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    if cfg.tracker != "none" and importlib.util.find_spec(cfg.tracker) is None:
        remedy = f"pip install {cfg.tracker}, or set tracker: none"
        yield Finding("blocked", cfg.tracker, f"tracker: {cfg.tracker} needs it, and it is not installed", remedy)
    if cfg.lora.rank is not None and importlib.util.find_spec("peft") is None:
        from tlcr.distribution import install_command  # it reads the metadata of packages

        remedy = install_command("lora") + ", or set lora.rank: null"
        yield Finding("blocked", "peft", "lora.rank needs the package peft, and it is not installed", remedy)
    if cfg.lora.base_bits is not None:
        from tlcr.models.lora.four_bits import missing_bitsandbytes  # which imports torch

        if (error := missing_bitsandbytes()) is not None:
            yield Finding.of("bitsandbytes", error)
    generators: dict[str, GeneratorConfig] = {"model": cfg.model}
    if "revisions" in stages and cfg.reviser.backend == "local":
        generators["reviser.model"] = cfg.reviser.model
    needing = [f"{section}.gguf_file" for section, model in generators.items() if model.gguf_file is not None]
    if needing and importlib.util.find_spec("gguf") is None:
        fact = f"{needing[0]} needs the package gguf, and it is not installed"
        yield Finding("blocked", "gguf", fact, "pip install gguf")
    for section, engine in engines_used(cfg, stages).items():
        if engine.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            fact = f"{section}.engine vllm needs the package vllm, and it is not installed"
            remedy = f"install it here, or use servers: {section}.engine: server"
            yield Finding("blocked", f"{section}.engine", fact, remedy)
        if engine.may_use_servers:
            by_address = "" if engine.engine == "server" else f" with {section}.server"
            yield from _needs_openai(f"{section}.engine {engine.engine}{by_address}", f"{section}.engine")


def engines_used(cfg: RunConfig, stages: Collection[str]) -> dict[str, EngineConfig]:
    """The sections of the config by whose engines these stages sample.

    Args:
        cfg: the whole config.
        stages: the stages that are to run.

    Returns:
        Each by its name.
    """
    used: dict[str, EngineConfig] = {}
    if {"ppo", "evaluate"} & set(stages):
        used["rollout"] = cfg.rollout
    if "revisions" in stages and cfg.reviser.backend == "local":
        used["reviser"] = cfg.reviser
    return used


def _needs_openai(setting: str, subject: str) -> Iterator[Finding]:
    missing = [name for name in ("openai", "tenacity", "aiolimiter") if importlib.util.find_spec(name) is None]
    if missing:
        from tlcr.distribution import install_command  # it reads the metadata of packages

        fact = f"{setting} needs {', '.join(missing)}, and that is not installed"
        yield Finding("blocked", subject, fact, install_command("openai"))


def _reviser(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    if cfg.reviser.backend != "endpoint" or "revisions" not in stages:
        return
    yield from _needs_openai("reviser.backend endpoint", "reviser")
    endpoint = cfg.reviser.endpoint
    if endpoint.lacks_key():
        fact = f"the environment variable {endpoint.key_variable} holds no API key"
        remedy = "set it, or reviser.endpoint.base_url of a server without keys"
        yield Finding("blocked", "reviser", fact, remedy)
    if endpoint.prompt_price is None:
        remedy = "reviser.endpoint.prompt_price, answer_price and max_cost, if the server is paid"
        yield Finding("note", "reviser", "no prices are named, so no cost is shown and none is capped", remedy)


def _processes(cfg: RunConfig, stages: Collection[str], named: int | None) -> Iterator[Finding]:
    """What depends on how many processes share the run: as many as are named, or as a launcher started."""
    processes = launched_processes() if named is None else named
    of_a_node = processes_of_a_node() if named is None else min(named, GPUS_OF_A_NODE)
    if "ppo" in stages and (problem := cfg.ppo.size_problem(processes)):
        yield Finding.of("ppo.batch_size", ConfigError(problem))
    yield from _sharding(cfg, stages, processes, of_a_node)
    if processes == 1:
        return
    if "ppo" in stages and cfg.parallel > 1 and len(trials_of(cfg)) > 1:
        yield Finding(
            "blocked",
            "parallel",
            f"parallel is {cfg.parallel} under a launcher of {processes} processes, and a run takes one or the other",
            "set parallel: 1 to share each policy among the processes",
        )
    if "ppo" in stages and any(arm.reward.refresh.every for arm in arms_of(cfg)):
        yield Finding.of("reward.refresh.every", no_refresh(processes))
    if "revisions" in stages and not (Path(cfg.output_dir) / "revisions" / DONE).is_file():
        yield Finding.of("reviser", for_one_process(processes))


def _sharding(cfg: RunConfig, stages: Collection[str], processes: int, of_a_node: int) -> Iterator[Finding]:
    if not SHARED & set(stages):
        return
    try:
        requested = requested_sharding(cfg.sharding)
    except ConfigError as error:
        yield Finding.of("sharding.kind", error)
        return
    if (problem := requested.problem(processes, of_a_node)) is not None:
        yield Finding.of("sharding.kind", ConfigError(problem))
    elif requested != cfg.sharding:
        yield Finding(
            "note", "sharding.kind", f"FSDP version 2 of the launcher is taken as sharding.kind: {requested.kind}"
        )


def _functions(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    """Functions of the user, which are imported here as they are for PPO."""
    if not {"ppo", "evaluate"} & set(stages):
        return
    named: dict[str, tuple[str, Callable[[str], object]]] = {
        arm.reward.callable: ("reward.callable", import_reward)
        for arm in arms_of(cfg)
        if arm.reward.callable is not None
    }
    if cfg.evaluation.scorer is not None:
        named[cfg.evaluation.scorer] = ("evaluation.scorer", import_scorer)
    if cfg.rollout.environment is not None:
        named[cfg.rollout.environment] = ("rollout.environment", import_environment)
    for path, (knob, load) in named.items():
        try:
            load(path)
        except ConfigError as error:
            yield Finding.of(knob, error)


def _ppo(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    warm, updates = cfg.ppo.value_warmup_updates, cfg.ppo.updates
    if "ppo" in stages and warm >= updates > 0:
        yield Finding(
            "warning",
            "ppo.value_warmup_updates",
            f"the first {warm} of ppo.updates {updates} train the value model alone, so the policy is never trained",
            "lower it, or raise ppo.updates",
        )


# ---- models and sources


def models_used(cfg: RunConfig, stages: Collection[str]) -> dict[str, GeneratorConfig]:
    """The models that these stages read and no stage makes, by the knob that names them.

    Args:
        cfg: the whole config.
        stages: the stages that are to run.

    Returns:
        The knob's path, and how the model is loaded.
    """
    used: dict[str, GeneratorConfig] = {}
    if set(stages) - {"revisions"} and cfg.model.path != "embedded":
        used["model.path"] = cfg.model
    for name in ("discriminator", "reward_model", "q_model", "dpo"):
        path = getattr(cfg, name).path
        if path is not None and {"ppo", "evaluate"} & set(stages) and _rewards_use(cfg, name):
            used[f"{name}.path"] = cfg.model.saved_in(path)
    if "revisions" in stages and cfg.reviser.backend == "local":
        used["reviser.model.path"] = cfg.reviser.model
    return used


def _unread(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    readers = {"reviser": {"revisions"}, "sharding": set(stages)}
    for knob, wanted in unread(cfg):
        if readers.get(knob.partition(".")[0], {"ppo"}) & set(stages):
            yield Finding("warning", knob, f"{knob} is set, and nothing reads it without {wanted}", "set both or none")


def _untrained(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    if cfg.model.path == "embedded" and not cfg.sft.enabled and FROM_POLICY & set(stages):
        yield Finding(
            "blocked",
            "sft.enabled",
            "sft.enabled is false and model.path is 'embedded', a model of random weights that only SFT trains",
            f"set sft.enabled: true, or model.path to the folder of a trained model, such as {cfg.output_dir}/sft of "
            "an earlier run",
        )


def _models(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    for knob, model in models_used(cfg, stages).items():
        yield from _path_of_a_model(knob, model.path)
        section = knob.rpartition(".")[0]
        if model.tokenizer is not None:
            yield from _path_of_a_model(f"{section}.tokenizer", model.tokenizer)
        if model.gguf_file is not None and Path(model.path).is_dir():
            file = Path(model.path) / model.gguf_file
            if not file.is_file():
                fact = f"there is no file {str(file)!r}{nearest_name(file)}"
                yield Finding("blocked", f"{section}.gguf_file", fact, f"correct {section}.gguf_file, or leave it out")
        template = model.chat_template
        if template is not None and "{" not in template and not Path(template).is_file():
            fact = f"{section}.chat_template {template!r} is neither a Jinja template nor a file that exists"
            yield Finding("blocked", f"{section}.chat_template", fact, "correct the path, or write the template itself")


def _path_of_a_model(knob: str, path: str) -> Iterator[Finding]:
    """A path that leads nowhere, or to a file; hub names, which have one slash at most, are looked up later."""
    if Path(path).is_file():
        remedy = f"name its folder in {knob}" + (
            f" and the file in {knob.rpartition('.')[0]}.gguf_file" if path.endswith(".gguf") else ""
        )
        yield Finding("blocked", knob, f"{knob} {path!r} is a file, and models are folders", remedy)
    elif not Path(path).is_dir() and looks_like_a_path(path):
        yield Finding(
            "blocked", knob, f"there is no folder {path!r}{nearest_name(Path(path))}", f"correct the path in {knob}"
        )


def sources_used(cfg: RunConfig, stages: Collection[str]) -> dict[str, str | None]:
    """The sources that these stages read, by their knob; None where one is needed and not set.

    Args:
        cfg: the whole config.
        stages: the stages that are to run.

    Returns:
        "data.preferences", "data.edits", "data.prompts" and "reviser.files", as far as they are read; without those
        that the embedded task makes.
    """
    data, wanted = cfg.data, set(stages)
    embedded = cfg.model.path == "embedded"
    reads = {
        "preferences": wanted & {"sft", "reward_model", "q_model", "dpo", "revisions"},
        "edits": wanted & {"labels", "discriminator", "analysis"} if cfg.reviser.backend == "none" else set(),
        "prompts": wanted & {"ppo", "evaluate"},
    }
    if data.prompts is None and data.preferences is not None:
        reads["preferences"] |= reads.pop("prompts")
    if data.preferences is not None:
        reads["preferences"] |= wanted & {"discriminator", "analysis"}
    used = {
        f"data.{name}": getattr(data, name)
        for name, by in reads.items()
        if by and not (embedded and getattr(data, name) is None)
    }
    if "revisions" in wanted and cfg.reviser.backend == "files":
        used["reviser.files"] = cfg.reviser.files
    return used


def makes_prompts(cfg: RunConfig) -> bool:
    """Whether the embedded task makes the prompts of PPO."""
    return cfg.model.path == "embedded" and cfg.data.prompts is None and cfg.data.preferences is None


NEEDED_BY = {"data.preferences": "training on preferences", "data.edits": "the discriminator", "data.prompts": "PPO"}


def _sources(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    for knob, source in sources_used(cfg, stages).items():
        try:
            if source is None:
                raise unnamed(knob.partition(".")[2], NEEDED_BY[knob])
            find_source(source)
        except TlcrError as error:
            yield Finding.of(knob, error)


def _held_out(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    if cfg.data.held_out > 0:
        return
    if "discriminator" in stages and cfg.discriminator.calibrate:
        fact = "discriminator.calibrate is on, but no pair is held out to fit the temperature on (data.held_out is 0)"
        remedy = "set data.held_out above 0, or discriminator.calibrate: false"
        yield Finding("blocked", "data.held_out", fact, remedy)
    if {"ppo", "evaluate"} & set(stages) and not makes_prompts(cfg):
        fact = "no prompt is held out to evaluate a policy on (data.held_out is 0)"
        yield Finding("blocked", "data.held_out", fact, "set data.held_out above 0, such as 0.1")

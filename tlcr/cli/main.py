"""The command ``tlcr``: parses the command line, calls the function of the command, and prints errors.

Parsing imports no large package: torch is imported by the commands that need it.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcr.cli.parsers import OWN_CONFIGS, STAGES, build_parser
from tlcr.config.argument_parser import ArgumentParser, Namespace, Unparsable, flags_of, option_of, parse_arguments
from tlcr.config.dropped import dropped_paths
from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import (
    describe_type,
    dump_config,
    knobs,
    load_command_config,
    load_config,
    nearest,
    value_problem,
)
from tlcr.config.schema import RunConfig
from tlcr.errors import BackendUnavailable, ConfigError, TlcrError
from tlcr.training.launcher import launched_processes, launched_rank

__all__ = ["main"]

BLOCKED, WRONG, INTERRUPTED = 1, 2, 130
SHARED = ("run", "train", "label", "evaluate")
"""The commands that several processes of a launcher can run together."""


def _overrides(arguments: Namespace, cls: type = RunConfig) -> dict[str, Any]:
    return {knob.path: arguments[knob.path] for knob in knobs(cls) if knob.path in arguments}


def _with_config(command: Callable[[RunConfig, Namespace], int]) -> Callable[[Namespace], int]:
    """Calls the command with its config, or prints the config where ``--print-config`` is given."""

    def handle(arguments: Namespace) -> int:
        cfg = load_config(arguments.get("config"), _overrides(arguments))
        if arguments.get("print_config"):
            if launched_rank() == 0:
                sys.stdout.write(dump_config(cfg))
            return 0
        return command(cfg, arguments)

    return handle


def _with_own_config(name: str, command: Callable[[Any, Namespace], None]) -> Callable[[Namespace], int]:
    """The same for a command with a separate config."""

    def handle(arguments: Namespace) -> int:
        default = OWN_CONFIGS[name]
        cfg = load_command_config(default, arguments.get("config"), _overrides(arguments, type(default)))
        if arguments.get("print_config"):
            sys.stdout.write(dump_config(cfg))
            return 0
        _set_up_output()
        command(cfg, arguments)
        return 0

    return handle


def _set_up_output() -> None:
    """Our log lines go to stderr, once for all processes; the libraries' progress bars are off: tlcr has its own."""
    import datasets
    import torch
    from transformers.utils import logging as transformers_logging

    from tlcr.training.distributed import SaidOnce, is_main_process, process_count, process_device

    logging.basicConfig(format="tlcr: %(message)s", level=logging.WARNING)
    logger = logging.getLogger("tlcr")
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if process_count() > 1:
        logging.captureWarnings(True)
        for handler in (*logging.getLogger().handlers, *logging.getLogger("transformers").handlers):
            handler.addFilter(SaidOnce())
        logger.info(
            "%d processes share the work, on %s; threads of each (OMP_NUM_THREADS): %d",
            process_count(),
            process_device().type,
            torch.get_num_threads(),
        )


def _refuse_at_once(cfg: RunConfig, stages: Sequence[str] | None, *, resume: bool | None = None) -> None:
    """Raises what can be known of a config before the large packages are imported, which takes seconds."""
    from tlcr.experiment.preflight import refuse, settings

    refuse(settings(cfg, stages, resume=resume))


def _run(cfg: RunConfig, arguments: Namespace) -> int:
    resume = bool(arguments.get("resume", False))
    if arguments.get("check"):
        return _check(cfg, arguments)
    if arguments.get("gpus") is not None:
        raise ConfigError("--gpus is about what --check tries; add --check, or drop it")
    _refuse_at_once(cfg, None, resume=resume)
    from tlcr.experiment import pipeline

    _set_up_output()
    pipeline.run(cfg, resume=resume)
    return 0


def _check(cfg: RunConfig, arguments: Namespace) -> int:
    if launched_processes() > 1:
        raise ConfigError("--check starts processes of its own; run it without the launcher, and with --gpus")
    gpus = _at_least(1, arguments, "--gpus")
    from tlcr.cli.check import check

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    check(cfg, gpus=gpus, say=say)
    return 0


def _at_least(least: int, arguments: Namespace, flag: str) -> int | None:
    """A flag's number; None where it is not given. Raises ConfigError where it is too small."""
    number: int | None = arguments.get(flag[2:].replace("-", "_"))
    if number is not None and number < least:
        raise ConfigError(f"{flag} is {number}; it must be at least {least}")
    return number


def _above_zero(arguments: Namespace, flag: str, unit: str) -> float | None:
    """A flag's number, in a unit; None where it is not given. Raises ConfigError where it is no size."""
    number: float | None = arguments.get(flag[2:])
    if number is not None and not 0 < number < math.inf:
        raise ConfigError(f"{flag} is {number:g}; it must be above 0 and finite, in {unit}")
    return number


def _train(cfg: RunConfig, arguments: Namespace) -> int:
    return _stage(cfg, STAGES[arguments["stage"]][0], resume=bool(arguments.get("resume", False)))


def _stage(cfg: RunConfig, name: str, *, resume: bool = False) -> int:
    _refuse_at_once(cfg, [name])
    from tlcr.experiment import pipeline

    _set_up_output()
    pipeline.stage(cfg, name, resume=resume)
    return 0


def _revise(cfg: RunConfig, arguments: Namespace) -> int:
    if (show := _shown(arguments)) is None:
        return _stage(cfg, "revisions")
    from tlcr.experiment.preflight import refuse, settings, sources_used

    used = sources_used(cfg, ["revisions"])  # a dry run asks and writes nothing: it needs no key, and no folder
    refuse(finding for finding in settings(cfg, ["revisions"]) if finding.subject in used)
    from tlcr.experiment import pipeline

    _set_up_output()
    pipeline.rehearse_revisions(cfg, show=show)
    return 0


def _shown(arguments: Namespace) -> int | None:
    """Requests that a dry run is to show; None where it is none."""
    show = _at_least(0, arguments, "--show")
    if arguments.get("dry_run"):
        return 2 if show is None else show
    if "show" in arguments:
        raise ConfigError("--show is about what a dry run shows; add --dry-run, or drop it")
    return None


def _answer(cfg: AnswerConfig, arguments: Namespace) -> None:
    from tlcr.judging.answers import answer_command

    if arguments.get("name") is None:
        raise ConfigError("no model is named that is to answer: tlcr answer MODEL --prompts FILE")
    answer_command(cfg.of(arguments["name"]))


def _judge(cfg: JudgeConfig, arguments: Namespace) -> None:
    from tlcr.judging.judge import judge_command, rehearse_judge

    files = arguments.get("answers") or []
    if len(files) not in (1, 2):
        raise ConfigError(f"{len(files)} files of answers are named; give two to compare, or one to grade")
    if (show := _shown(arguments)) is not None:
        rehearse_judge(files, cfg, show=show)
    else:
        judge_command(files, cfg)


def _label(cfg: RunConfig, arguments: Namespace) -> int:
    return _stage(cfg, "labels")


def _evaluate(cfg: RunConfig, arguments: Namespace) -> int:
    return _stage(cfg, "evaluate")


def _evaluate_tokens(cfg: RunConfig, arguments: Namespace) -> int:
    if "spans" not in arguments:
        raise ConfigError("--spans is missing; name a file of answers in which people marked errors")
    show = _at_least(0, arguments, "--show")
    from tlcr.data.places import find_source

    for name in ("spans", "threshold_spans"):
        if (source := arguments.get(name)) is not None:
            find_source(source)
    from tlcr.experiment.token_evaluation import evaluate_tokens

    _set_up_output()
    evaluate_tokens(
        cfg,
        spans=arguments["spans"],
        threshold_spans=arguments.get("threshold_spans"),
        show=show or 0,
    )
    return 0


def _doctor(cfg: RunConfig, arguments: Namespace) -> int:
    from tlcr.cli.doctor import examine

    gpus, memory = _at_least(1, arguments, "--gpus"), _above_zero(arguments, "--gpu_memory", "GiB")
    if memory is not None and gpus is None:
        raise ConfigError("--gpu_memory is the memory of each of --gpus; name their number too")
    rate = _above_zero(arguments, "--write_rate", "GiB a second")
    asked = gpus is not None or rate is not None
    named = asked or arguments.get("config") is not None or bool(_overrides(arguments))
    return BLOCKED if examine(cfg, named=named, gpus=gpus, gpu_memory=memory, write_rate=rate) else 0


def _analyse(arguments: Namespace) -> int:
    edits, preferences, output = arguments["edits"], arguments["preferences"], arguments["output"]
    if (edits is None) != (output is None):
        raise ConfigError("--edits and --output go together: name the pairs, and the folder for what is found on them")
    if preferences is not None and edits is None:
        raise ConfigError("--preferences needs --edits and --output; without them the run's own pairs are analysed")
    from tlcr.experiment import pipeline

    _set_up_output()
    folder = Path(arguments["folder"])
    if edits is None:
        page = pipeline.analyse(folder)
    else:
        page = pipeline.analyse_edits(folder, edits, Path(output), preferences=preferences)
    sys.stdout.write(f"report: {page}\n")
    return 0


def _report(arguments: Namespace) -> int:
    from tlcr.experiment import pipeline

    pipeline.report(Path(arguments["folder"]))
    return 0


def _merge(arguments: Namespace) -> int:
    from tlcr.cli.merge import merge_command

    _set_up_output()
    merge_command(
        adapter=Path(arguments["adapter"]),
        output=Path(arguments["output"]),
        base=arguments["base"],
        trust_remote_code=arguments["trust_remote_code"],
    )
    return 0


def _score(arguments: Namespace) -> int:
    for flag in ("--batch-size", "--max-prompt-tokens", "--max-answer-tokens"):
        _at_least(1, arguments, flag)
    from tlcr.cli.score import Limits, score_command

    _set_up_output()
    score_command(
        file=arguments["file"],
        prompt=arguments["prompt"],
        response=arguments["response"],
        discriminator=arguments["discriminator"],
        reward_model=arguments["reward_model"],
        as_json=arguments["json"],
        limits=Limits(arguments["batch_size"], arguments["max_prompt_tokens"], arguments["max_answer_tokens"]),
    )
    return 0


def _serve(arguments: Namespace) -> int:
    from tlcr.serving.settings import ServerSettings

    settings = ServerSettings(**{one.name: arguments[one.name] for one in dataclasses.fields(ServerSettings)})
    try:
        from tlcr.serving.processes import serve
    except ModuleNotFoundError as error:
        from tlcr.distribution import install_command  # it reads the metadata of packages

        if error.name not in ("uvicorn", "starlette", "prometheus_client"):
            raise
        raise BackendUnavailable(f"tlcr serve needs {error.name}: {install_command('serve')}") from error
    _set_up_output()
    serve(settings)
    return 0


def _export(arguments: Namespace) -> int:
    from tlcr.serving.export import export_for_vllm

    _set_up_output()
    command = export_for_vllm(Path(arguments["discriminator"]), Path(arguments["output"]))
    sys.stdout.write(command + "\n")
    return 0


OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory"),
    *("bad_alloc", "can't start new thread"),
)
"""What torch, its allocators and the system say of it."""
DISK_PROBLEMS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EBUSY),
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENOMEM, errno.ENAMETOOLONG),
)

HANDLERS: dict[str, Callable[[Namespace], int]] = {
    "run": _with_config(_run),
    "train": _with_config(_train),
    "revise": _with_config(_revise),
    "label": _with_config(_label),
    "evaluate": _with_config(_evaluate),
    "evaluate-tokens": _with_config(_evaluate_tokens),
    "doctor": _with_config(_doctor),
    "answer": _with_own_config("answer", _answer),
    "judge": _with_own_config("judge", _judge),
    "analyse": _analyse,
    "merge": _merge,
    "report": _report,
    "score": _score,
    "serve": _serve,
    "export": _export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where doctor found what blocks, 2 for an error, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if launched_processes() > 1:
            from tlcr.cli import together

            together.begin()
        parsed = _parse(arguments)
        _refuse_several_processes(parsed["command"])
        code = HANDLERS[parsed["command"]](parsed[parsed["command"]])
        sys.stdout.flush()
    except TlcrError as error:
        return _failed(WRONG, error, f"tlcr: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt as error:
        return _failed(INTERRUPTED, error, f"\ntlcr: interrupted; {_how_to_go_on(arguments)}\n")
    except BrokenPipeError:
        # The reader of our output (head, less) has closed the pipe. Python would report it again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if launched_processes() > 1:
            from tlcr.cli import together

            together.crash(error, _how_to_go_on(arguments))
        problem = machine_problem(error)
        if problem is None:
            raise
        return _failed(WRONG, error, f"tlcr: error: {problem}; {_how_to_go_on(arguments)}\n")
    if launched_processes() > 1:
        from tlcr.cli import together

        together.end(code)
    return code


def machine_problem(error: BaseException) -> str | None:
    """What the machine lacks, in a sentence, where that is what an error of another library says; else None."""
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(text in reason for text in OUT_OF_MEMORY):
        return (
            f"the memory ran out{f' ({reason[:300]})' if reason else ''}: 'tlcr doctor CONFIG' says what a run takes, "
            "and the smallest change that fits"
        )
    if isinstance(error, OSError) and error.errno in DISK_PROBLEMS:
        return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}; see to the disk"
    return None


def _failed(code: int, error: BaseException, message: str) -> int:
    if launched_processes() > 1:
        from tlcr.cli import together

        together.fail(code, error, message)
    sys.stderr.write(message)
    return code


def _refuse_several_processes(command: str) -> None:
    if launched_processes() > 1 and command not in SHARED:
        raise ConfigError(
            f"'tlcr {command}' works in one process, and the launcher started {launched_processes()}; run it without "
            f"the launcher (what several can share: {', '.join(SHARED)})"
        )


def _parse(arguments: list[str]) -> Namespace:
    parser, commands = build_parser()
    cls = type(OWN_CONFIGS.get(arguments[0], RunConfig())) if arguments else RunConfig
    if arguments and arguments[0] in commands:
        _refuse_unknown_flags(arguments, flags_of(commands[arguments[0]]), cls)
    elif arguments and not arguments[0].startswith("-"):
        raise ConfigError(f"unknown command {arguments[0]}{nearest(arguments[0], list(commands))}")
    # The namespace must hold only the knobs that were typed: load_config supplies the rest.
    typed_only = not arguments or arguments[0] not in ("analyse", "export", "merge", "report", "score", "serve")
    try:
        return parse_arguments(parser, arguments or ["--help"], defaults=not typed_only)
    except Unparsable as error:
        raise ConfigError(value_problem(error, cls) or _argument_problem(error, arguments, commands)) from error


def _argument_problem(error: Unparsable, arguments: list[str], commands: Mapping[str, ArgumentParser]) -> str:
    """The error message for an argument that is not a knob."""
    message = str(error)
    if error.missing:
        message = f"the following arguments are required: {', '.join(error.missing).upper()}"
    elif error.name is not None:
        flag, hint = option_of(commands[arguments[0]], error.name)
        message = f"{flag} is {error.value}; it must be {describe_type(hint)}"
    return f"{message}; see 'tlcr {arguments[0]} --help'"


def _refuse_unknown_flags(arguments: list[str], known: list[str], cls: type) -> None:
    """Raises with the flag that is nearest to an unknown one, which argparse does not name."""
    gone = dropped_paths(cls)
    for argument in arguments[1:]:
        flag = argument.partition("=")[0]
        if flag == "--":
            return
        if flag.startswith("--") and flag not in known:
            if flag[2:] in gone:
                raise ConfigError(f"unknown flag {flag}; tlcr has no such knob any more: {gone[flag[2:]].instead}")
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            meant = f"did you mean {close[0]}?" if close else f"'tlcr {arguments[0]} --help' lists them"
            raise ConfigError(f"unknown flag {flag}; {meant}")


def _how_to_go_on(arguments: list[str]) -> str:
    with_launcher = " under the same launcher" if launched_processes() > 1 else ""
    if arguments[:1] in (["run"], ["train"]):
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        return f"what was saved is kept; go on{with_launcher} with: tlcr {shlex.join(again)}"
    if arguments[:1] in (["revise"], ["answer"], ["judge"]):
        return f"what was answered is kept; go on with: tlcr {shlex.join(arguments)}"
    return f"start again with: tlcr {shlex.join(arguments)}"

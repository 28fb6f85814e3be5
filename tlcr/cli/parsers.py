"""The parsers of ``tlcr``: its commands, their flags and their help texts.

Every knob of a config is a flag of the commands that take this config: ``RunConfig``, or a command's separate one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tlcr.config.argument_parser import ArgumentParser
from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import Knob, knobs
from tlcr.config.schema import Checked, RunConfig
from tlcr.serving.settings import ServerSettings

__all__ = ["OWN_CONFIGS", "STAGES", "build_parser"]

STAGES = {
    "sft": ("sft", "fine-tune the policy on the preferred answers"),
    "reward-model": ("reward_model", "train the sequence-level reward model (Bradley-Terry)"),
    "q-model": ("q_model", "train a token-level Q function on preferences (Q-RM)"),
    "dpo": ("dpo", "train a policy by DPO, whose log-ratio is a reward"),
    "discriminator": ("discriminator", "train the token discriminator on edits"),
    "ppo": ("ppo", "train a policy for every arm and seed"),
}

OWN_CONFIGS: dict[str, Checked] = {"answer": AnswerConfig(), "judge": JudgeConfig()}
"""Commands whose config is not ``RunConfig``."""

IN_FULL = os.path.expanduser
"""The type of an argument that is a path and no knob: a "~" that no shell has replaced is the user's home."""

LONGEST_METAVAR = 30
"""Maximum number of characters of choices beside a flag; longer ones go into its help, which can wrap."""


class HelpFormatter(argparse.HelpFormatter):
    """Plain argparse help with room for the knobs' names; jsonargparse's own would repeat type and default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _HelpAll(argparse.Action):
    """``--help-all``: the help with the knobs that ``--help`` leaves out."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)
        self.left_out: list[tuple[argparse.Action, str]] = []

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for action, help in self.left_out:
            action.help = help
        parser.print_help()
        parser.exit()


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of ``tlcr``, and that of each command by its name."""
    from tlcr import __version__

    parser = _parser(
        "Token-Level Continuous Reward for RLHF: from preference pairs to a PPO-trained policy.",
        prog="tlcr",
        usage="tlcr COMMAND ...",
        epilog="'tlcr COMMAND --help' describes a command and, where it takes a config, its knobs.",
    )
    parser.add_argument("--version", action="version", version=f"tlcr {__version__}")
    commands = parser.add_subcommands(dest="command", title="commands", description=None, metavar="COMMAND")
    parsers: dict[str, ArgumentParser] = {}
    for name, (make, help) in {
        "run": (_run_parser, "the whole pipeline: train, evaluate, report"),
        "train": (_train_parser, "one stage: " + ", ".join(STAGES)),
        "revise": (_revise_parser, "have a language model minimally edit the rejected answers"),
        "label": (_label_parser, "label the tokens of edited answers and write them with statistics"),
        "score": (_score_parser, "score answers token by token with a trained discriminator"),
        "serve": (_serve_parser, "serve a discriminator over HTTP, to trainers that run elsewhere"),
        "export": (_export_parser, "write a discriminator's folder for another server: vLLM"),
        "evaluate": (_evaluate_parser, "generate on held-out prompts and score what comes out"),
        "evaluate-tokens": (_evaluate_tokens_parser, "compare token rewards with errors that people marked"),
        "answer": (_answer_parser, "answer the prompts of AlpacaEval, MT-Bench or Vicuna, for their tools to judge"),
        "judge": (_judge_parser, "have a language model compare two files of answers, or grade one"),
        "analyse": (_analyse_parser, "what a run's discriminator gets right: by kind of edit, position and length"),
        "merge": (_merge_parser, "write an adapter and the model it was trained on as one whole model"),
        "report": (_report_parser, "write report.html of a run"),
        "doctor": (_doctor_parser, "check this machine and, with a config, estimate its memory"),
    }.items():
        parsers[name] = make()
        commands.add_subcommand(name, parsers[name], help=help)
    return parser, parsers


def _parser(description: str, *, prog: str, usage: str, epilog: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _config_parser(description: str, *, prog: str, positional: str = "", resume: bool = False) -> ArgumentParser:
    resumes = "[--resume] " if resume else ""
    parser = _parser(
        description,
        prog=prog,
        usage=f"{prog}{positional} [CONFIG] {resumes}[--print-config] [--KNOB VALUE ...]",
        epilog=_about_knobs(RunConfig, prog),
    )
    if positional:
        stages = "; ".join(f"{name}: {help}" for name, (_, help) in STAGES.items())
        parser.add_argument("stage", choices=list(STAGES), metavar="STAGE", help=stages)
    parser.add_argument(
        "config", nargs="?", type=IN_FULL, metavar="CONFIG", help="a YAML file; without one, the defaults"
    )
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    _add_knobs(parser, RunConfig(), "the run")
    return parser


def _about_knobs(cls: type, prog: str) -> str:
    left_out = sum(knob.advanced for knob in knobs(cls))
    return (
        f"A flag wins over the file. Defaults without a source are ours. {left_out} more knobs, which few runs set: "
        f"'{prog} --help-all'."
    )


def _add_knobs(parser: ArgumentParser, default: Checked, title: str) -> None:
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    help_all: Any = parser.add_argument("--help-all", action=_HelpAll, help="like --help, with every knob")
    cls: type = type(default)
    groups: dict[str, Any] = {}
    for knob in knobs(cls):
        if knob.section not in groups:
            about = type(attrgetter(knob.section)(default) if knob.section else default).__doc__
            groups[knob.section] = parser.add_argument_group(knob.section or title, str(about).replace("%", "%%"))
        typ = tuple[dict, ...] if knob.path == "arms" else knob.type
        # Without defaults, only what was typed is in the namespace; load_config supplies the rest.
        help = _help(knob)
        shown = argparse.SUPPRESS if knob.advanced else help
        action = groups[knob.section].add_argument(f"--{knob.path}", type=typ, metavar=_metavar(typ), help=shown)
        if knob.advanced:
            help_all.left_out.append((action, help))


def _help(knob: Knob) -> str:
    meta = knob.metadata
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    bounds = [f"{word} {meta[name]:g}" for name, word in words.items() if meta.get(name) is not None]
    default = "null" if knob.default is None else str(knob.default).lower() if knob.default in (True, False) else None
    if default is None:
        default = str(list(knob.default)) if isinstance(knob.default, tuple) else str(knob.default)
    # "default: the model's own" says more than null
    facts = bounds if "default:" in meta["help"] and knob.default in (None, ()) else [f"default {default}", *bounds]
    choices = _choices(knob.type)
    if len("|".join(choices)) > LONGEST_METAVAR:
        facts.insert(0, f"one of {', '.join(choices)}")
    if meta["unit"]:
        facts.insert(0, meta["unit"])
    if meta["source"] != "ours":
        facts.append(f"source: {meta['source']}")
    return (meta["help"] + (f" ({'; '.join(facts)})" if facts else "")).replace("%", "%%")


def _choices(hint: Any) -> list[str]:
    """The choices of a knob that is one of a few words, without None."""
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    return [choice for part in get_args(hint) for choice in _choices(part)] if _is_union(hint) else []


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _metavar(hint: Any) -> str:
    if _is_union(hint):
        return next(_metavar(part) for part in get_args(hint) if part is not type(None))
    if choices := _choices(hint):
        joined = "|".join(choices)
        return joined if len(joined) <= LONGEST_METAVAR else "NAME"
    if get_origin(hint) in (tuple, list):
        return f"[{_metavar(get_args(hint)[0])},...]"
    return {int: "INT", float: "FLOAT", bool: "true|false", dict: "{...}"}.get(hint, "TEXT")


def _run_parser() -> ArgumentParser:
    parser = _config_parser(
        "SFT, reward model, DPO, token labels, discriminator, PPO for every arm and seed, evaluation and report. What "
        "is done already is skipped.",
        prog="tlcr run",
        resume=True,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="try the config on this machine's CPU and stop: the architecture without weights, its shards, and one "
        "step of every stage with a model of width 64; needs no data and no network",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="INT", help="with --check: GPUs of the run, a process on each (default 1)"
    )
    return parser


def _train_parser() -> ArgumentParser:
    return _config_parser("Train one stage of the pipeline.", prog="tlcr train", positional=" STAGE", resume=True)


def _revise_parser() -> ArgumentParser:
    parser = _config_parser(
        "Have the rejected answers of data.preferences minimally edited, by a model behind an endpoint, by a local "
        "one, or from files, and write those edits that pass the checks. What was answered before is never asked, or "
        "paid for, again.",
        prog="tlcr revise",
    )
    _add_dry_run(parser)
    return parser


def _label_parser() -> ArgumentParser:
    return _config_parser(
        "Align edited answers with their originals and write a label for each token, with statistics.",
        prog="tlcr label",
    )


def _evaluate_parser() -> ArgumentParser:
    return _config_parser(
        "Let each trained policy answer held-out prompts; score the answers and measure their KL.",
        prog="tlcr evaluate",
    )


def _own_config_parser(name: str, description: str, *, positional: str) -> ArgumentParser:
    parser = _parser(
        description,
        prog=f"tlcr {name}",
        usage=f"tlcr {name} {positional} [--config FILE] [--print-config] [--KNOB VALUE ...]",
        epilog=f"{_about_knobs(type(OWN_CONFIGS[name]), f'tlcr {name}')} More: docs/judging.md.",
    )
    parser.add_argument("--config", type=IN_FULL, metavar="FILE", help="a YAML file with the knobs below")
    _add_knobs(parser, OWN_CONFIGS[name], "the command")
    return parser


def _answer_parser() -> ArgumentParser:
    parser = _own_config_parser(
        "answer",
        "Let a model answer the prompts of a benchmark, and write its answers as the benchmark's own tool reads them. "
        "What was answered before is kept; called again, it goes on where it stopped.",
        positional="MODEL --prompts FILE",
    )
    # Not required to argparse, which would call it by its destination: 'model' is a section of the config.
    parser.add_argument(
        "name",
        nargs="?",
        type=IN_FULL,
        metavar="MODEL",
        help="a model folder or hub name, or the model's name at the endpoint",
    )
    return parser


def _judge_parser() -> ArgumentParser:
    parser = _own_config_parser(
        "judge",
        "Have a language model say, in both orders, which of two models' answers is better, or grade the answers of "
        "one from 1 to 10. Files are those of AlpacaEval or FastChat. What was judged before is never asked, or paid "
        "for, again.",
        positional="ANSWERS [ANSWERS]",
    )
    parser.add_argument(
        "answers", nargs="*", type=IN_FULL, metavar="ANSWERS", help="one model's answers, or two files of two models"
    )
    _add_dry_run(parser)
    return parser


def _add_dry_run(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="show the first requests, the tokens and the cost; ask nothing"
    )
    parser.add_argument("--show", type=int, metavar="INT", help="requests that a dry run shows (default 2)")


def _evaluate_tokens_parser() -> ArgumentParser:
    parser = _config_parser(
        "Compare the token rewards of every arm with errors that people marked in answers: ROC-AUC, average precision "
        "and F1, by kind of error, with intervals over answers. The models of the rewards must exist; no policy is "
        "needed. The tokens are those of model.path; a reward for whole answers alone has none to compare.",
        prog="tlcr evaluate-tokens",
    )
    parser.add_argument(
        "--spans",
        type=IN_FULL,
        metavar="FILE",
        help="answers with 'prompt', 'response' and 'spans', a list of {'start', 'end', 'label'} in characters",
    )
    parser.add_argument(
        "--threshold-spans",
        type=IN_FULL,
        metavar="FILE",
        help="the same for other answers, to choose on them the reward below which a token is called an error",
    )
    parser.add_argument("--show", type=int, metavar="INT", help="answers to print in colours (default 0)")
    return parser


def _doctor_parser() -> ArgumentParser:
    parser = _config_parser(
        "Versions, devices, implementations and disk space; with a config or flags, also the memory that it needs. "
        "Ends with 1 where something blocks.",
        prog="tlcr doctor",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="INT", help="judge for this many GPUs, a process on each (default: this machine)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="with --gpus: memory of each (default 80 GB, 74.5 GiB)"
    )
    parser.add_argument(
        "--write_rate",
        type=float,
        metavar="GIB",
        help="GiB that the disk of output_dir takes in a second, for the time of a checkpoint (default: measured)",
    )
    return parser


def _analyse_parser() -> ArgumentParser:
    parser = _parser(
        "What the discriminator of a run gets right, and where: by kind of edit and position, around edits, over whole "
        "answers. Without --edits, on the run's held-out pairs, for its report; 'tlcr run' does that by itself.",
        prog="tlcr analyse",
        usage="tlcr analyse RUN_FOLDER [--edits SOURCE [--preferences SOURCE] --output FOLDER]",
    )
    parser.add_argument("folder", type=IN_FULL, metavar="RUN_FOLDER", help="the output_dir of a run")
    parser.add_argument(
        "--edits", type=IN_FULL, metavar="SOURCE", help="edit pairs that the discriminator has not been trained on"
    )
    parser.add_argument("--preferences", type=IN_FULL, metavar="SOURCE", help="preference pairs, likewise")
    parser.add_argument(
        "--output", type=IN_FULL, metavar="FOLDER", help="where analysis.json and analysis.html of --edits go"
    )
    return parser


def _report_parser() -> ArgumentParser:
    parser = _parser("Write report.html of a finished run.", prog="tlcr report", usage="tlcr report RUN_FOLDER")
    parser.add_argument("folder", type=IN_FULL, metavar="RUN_FOLDER", help="the output_dir of a run")
    return parser


def _merge_parser() -> ArgumentParser:
    parser = _parser(
        "Write a LoRA adapter and the model that it was trained on as one whole model, which loads without peft. The "
        "sum of the weights is formed in float32 and rounded once.",
        prog="tlcr merge",
        usage="tlcr merge ADAPTER OUTPUT [--base MODEL] [--trust-remote-code]",
    )
    parser.add_argument(
        "adapter", type=IN_FULL, metavar="ADAPTER", help="a folder of peft, such as policy/adapter of a run"
    )
    parser.add_argument("output", type=IN_FULL, metavar="OUTPUT", help="the folder to write, which holds no model yet")
    parser.add_argument(
        "--base", type=IN_FULL, metavar="MODEL", help="the model's folder or hub name; default: what ADAPTER names"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


def _serve_parser() -> ArgumentParser:
    parser = _parser(
        "Serve a discriminator over HTTP: token ids, text or messages in, a reward for every token out. Trainers ask "
        "it in the forms that they speak: docs/serving.md.",
        prog="tlcr serve",
        usage="tlcr serve --discriminator FOLDER [--port PORT] [--OPTION VALUE ...]",
    )
    hints = get_type_hints(ServerSettings)
    for one in dataclasses.fields(ServerSettings):
        default = "" if one.default in (None, "") else f" (default {one.default})"
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=IN_FULL if one.metadata.get("path") else hints[one.name],
            metavar=_metavar(hints[one.name]),
            default=one.default,
            help=one.metadata["help"] + default,
        )
    return parser


def _export_parser() -> ArgumentParser:
    parser = _parser(
        "Write a discriminator as a folder that another server reads, and print the command that serves it. vLLM reads "
        "causal decoders of its own list; what it cannot serve is refused, and 'tlcr serve' serves it.",
        prog="tlcr export",
        usage="tlcr export DISCRIMINATOR OUTPUT --for vllm",
    )
    parser.add_argument(
        "discriminator", type=IN_FULL, metavar="DISCRIMINATOR", help="a folder written by 'tlcr train discriminator'"
    )
    parser.add_argument("output", type=IN_FULL, metavar="OUTPUT", help="the folder to write, which holds no model yet")
    parser.add_argument("--for", choices=["vllm"], default="vllm", help="the server that is to read it (default vllm)")
    return parser


def _score_parser() -> ArgumentParser:
    parser = _parser(
        "Score answers with a trained model. A discriminator colours each token by its reward 2p - 1, from -1 (a "
        "reviser would change it) to 1; a reward model gives each answer one score.",
        prog="tlcr score",
        usage="tlcr score (--discriminator FOLDER | --reward-model FOLDER) [FILE | --response TEXT] [--json]",
    )
    parser.add_argument(
        "file", nargs="?", type=IN_FULL, metavar="FILE", help="JSON lines with 'prompt' and 'response'; '-': stdin"
    )
    parser.add_argument(
        "--discriminator", type=IN_FULL, metavar="FOLDER", help="a folder written by 'tlcr train discriminator'"
    )
    parser.add_argument(
        "--reward-model", type=IN_FULL, metavar="FOLDER", help="a folder written by 'tlcr train reward-model'"
    )
    parser.add_argument("--prompt", metavar="TEXT", default="", help="the prompt of --response")
    parser.add_argument("--response", metavar="TEXT", help="one answer, instead of a file")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, instead of colours")
    parser.add_argument("--batch-size", type=int, metavar="INT", default=16, help="answers at a time (default 16)")
    for side in ("prompt", "answer"):
        parser.add_argument(
            f"--max-{side}-tokens",
            type=int,
            metavar="INT",
            default=1024,
            help=f"a longer {side} is cut (default 1024 tokens)",
        )
    return parser

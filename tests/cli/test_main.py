"""The command: help without torch, flags over YAML, one-line errors with exit code 2, Ctrl-C with the way to go on."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import resource
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tlcr.cli import main as cli
from tlcr.cli.parsers import IN_FULL, OWN_CONFIGS, build_parser
from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import knobs
from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError

COMMANDS = ("run", "train", "revise", "label", "score", "evaluate", "analyse", "report", "doctor", "answer", "judge")
WITH_CONFIG = ("run", "train", "revise", "label", "evaluate", "doctor")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the command asks of the pipeline, recorded instead of done."""
    recorded: list[tuple[Any, ...]] = []
    pipeline = types.ModuleType("tlcr.experiment.pipeline")
    pipeline.run = lambda cfg, resume: recorded.append(("run", cfg, resume))  # type: ignore[attr-defined]
    pipeline.stage = lambda cfg, name, resume: recorded.append((name, cfg, resume))  # type: ignore[attr-defined]
    pipeline.report = lambda folder: recorded.append(("report", folder))  # type: ignore[attr-defined]
    pipeline.analyse = lambda *asked: recorded.append(("analyse", *asked))  # type: ignore[attr-defined]
    pipeline.analyse_edits = lambda *asked, preferences: recorded.append((*asked, preferences))  # type: ignore[attr-defined]
    pipeline.rehearse_revisions = lambda cfg, show: recorded.append(("rehearse", cfg, show))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tlcr.experiment.pipeline", pipeline)
    monkeypatch.setattr("tlcr.experiment.pipeline", pipeline, raising=False)
    yield recorded


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["run", "--help-all"]]
)
def test_help_answers_without_importing_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom tlcr.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as leaving:\n    assert leaving.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def test_help_answers_in_under_a_second() -> None:
    """In processor time, of which a process that only computes takes all: the clock would measure our neighbours."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tlcr", "run", "--help"], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_help_lists_every_knob_with_its_meaning_and_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help-all"])
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for knob in knobs(RunConfig):
        assert f"--{knob.path} " in shown
        assert " ".join(knob.metadata["help"].split()) in shown
    assert "updates of the policy" not in shown
    assert "nats per token; default null; above 0" in shown
    assert "default 0.2; above 0; at most 1; source: PPO, released code" in shown


@pytest.mark.parametrize(
    ("command", "cls"), [*((name, RunConfig) for name in WITH_CONFIG), ("answer", AnswerConfig), ("judge", JudgeConfig)]
)
def test_help_leaves_what_few_runs_set_to_help_all(command: str, cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"^  --([\w.]+)", shown, re.MULTILINE)) & {knob.path for knob in knobs(cls)}
    assert flags == {knob.path for knob in knobs(cls) if not knob.advanced}
    left_out = sum(knob.advanced for knob in knobs(cls))
    assert f"{left_out} more knobs, which few runs set: 'tlcr {command} --help-all'." in " ".join(shown.split())


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(["run", "--help-all"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > columns] == []


def test_a_knob_of_many_choices_names_them_where_lines_are_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--reward.kind NAME what a token earns (one of continuous, discrete, sign, " in shown
    assert "--kl.estimator k1|k2|k3|full k1 log-ratio" in shown


def test_an_advanced_knob_is_a_flag_like_any_other(calls: list[Any]) -> None:
    assert cli.main(["run", "--ppo.dual_clip", "3", "--model.tokenizer", "t"]) == 0
    assert (calls[0][1].ppo.dual_clip, calls[0][1].model.tokenizer) == (3.0, "t")


def test_a_flag_wins_over_the_file_and_resume_reaches_the_pipeline(tmp_path: Path, calls: list[Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("ppo: {updates: 5, gamma: 0.5}\n", encoding="utf-8")
    assert cli.main(["run", str(path), "--ppo.updates", "7", "--model.tokenizer=null", "--resume"]) == 0
    assert cli.main(["run"]) == 0
    (_, first, resumed), (_, second, fresh) = calls
    assert (first.ppo.updates, first.ppo.gamma, resumed) == (7, 0.5, True)
    assert (second, fresh) == (RunConfig(), False)


@pytest.mark.parametrize(
    ("arguments", "stage", "resume"),
    [
        (["train", "sft"], "sft", False),
        (["train", "reward-model", "--resume"], "reward_model", True),
        (["train", "discriminator"], "discriminator", False),
        (["train", "ppo", "--resume"], "ppo", True),
        (["revise"], "revisions", False),
        (["label"], "labels", False),
        (["evaluate"], "evaluate", False),
    ],
)
def test_each_command_calls_its_stage(
    arguments: list[str], stage: str, resume: bool, calls: list[Any], tmp_path: Path
) -> None:
    for earlier in ("sft", "discriminator"):
        (tmp_path / earlier).mkdir()
        (tmp_path / earlier / "done.json").touch()
    assert cli.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert calls == [(stage, RunConfig(output_dir=str(tmp_path)), resume)]


@pytest.mark.parametrize(("flags", "show"), [([], 2), (["--show", "5"], 5)])
def test_a_dry_run_of_the_reviser_is_no_stage(flags: list[str], show: int, calls: list[Any]) -> None:
    assert cli.main(["revise", "--dry-run", *flags]) == 0
    assert calls == [("rehearse", RunConfig(), show)]


def test_report_takes_a_folder(tmp_path: Path, calls: list[Any]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 0
    assert calls == [("report", tmp_path)]


def test_analyse_takes_a_run_and_other_pairs(tmp_path: Path, calls: list[Any]) -> None:
    assert cli.main(["analyse", str(tmp_path)]) == 0
    assert cli.main(["analyse", str(tmp_path), "--edits", "e.jsonl", "--output", "out"]) == 0
    assert calls == [("analyse", tmp_path), (tmp_path, "e.jsonl", Path("out"), None)]


def test_paths_of_a_command_may_begin_with_the_users_home(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the ~ in quotes and behind a flag's = as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("ppo: {updates: 5}\n", encoding="utf-8")
    assert cli.main(["run", "~/config.yaml", "--output_dir=~/run"]) == 0
    assert cli.main(["report", "~/run"]) == 0
    assert cli.main(["analyse", "~/run", "--edits=~/e.jsonl", "--output=~/out", "--preferences=~/p.jsonl"]) == 0
    (_, cfg, _), *others = calls
    assert (cfg.output_dir, cfg.ppo.updates) == (str(tmp_path / "run"), 5)
    run, edits, out, preferences = (tmp_path / name for name in ("run", "e.jsonl", "out", "p.jsonl"))
    assert others == [("report", run), (run, str(edits), out, str(preferences))]


def test_every_argument_that_is_a_file_or_folder_may() -> None:
    """Knobs are expanded as their config is made."""
    texts = ("help", "print_config", "help_all", "prompt", "response", "stage", "for", "host")
    for command, parser in build_parser()[1].items():
        known = {knob.path for knob in knobs(type(OWN_CONFIGS.get(command, RunConfig())))}
        for action in parser._actions:
            is_text = action.nargs != 0 and getattr(action, "_typehint", action.type) in (None, str, IN_FULL)
            if is_text and action.dest not in known and action.dest not in texts:
                assert action.type is IN_FULL, (command, action.dest)


def test_print_config_prints_what_would_run_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    assert cli.main(["run", "--kl.coef", "0.25", "--arms", "[{name: a, reward: {kind: sign}}]", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["kl"]["coef"] == 0.25
    assert shown["arms"][0]["reward"] == {**shown["reward"], "kind": "sign"}
    assert calls == []


def test_a_rate_alone_asks_for_the_time_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("tlcr.cli.doctor.examine", lambda cfg, **given: asked.append(given))
    assert cli.main(["doctor", "--write_rate", "2"]) == 0
    assert cli.main(["doctor"]) == 0
    assert [given["named"] for given in asked] == [True, False]
    assert asked[0]["write_rate"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rn"], "unknown command rn; did you mean run?"),
        (["run", "--ppo.update", "3"], "unknown flag --ppo.update; did you mean --ppo.updates?"),
        (["run", "--output-dir", "x"], "unknown flag --output-dir; did you mean --output_dir?"),
        (["report", "x", "--help-all"], "unknown flag --help-all; did you mean --help?"),
        (
            ["run", "--labels.warn_edited_share", "0.6"],
            "unknown flag --labels.warn_edited_share; tlcr has no such",
        ),
        (["judge", "a", "--cache=b"], "unknown flag --cache; tlcr has no such knob any more: the judge's answers are"),
        (["label", "--resume"], "unknown flag --resume; 'tlcr label --help' lists them"),
        (["run", "--ppo.updates", "0"], "ppo.updates is 0; it must be at least 1"),
        (["run", "--ppo.updates", "many"], "ppo.updates is many; it must be a whole number"),
        (["run", "--kl.placement", "los"], "kl.placement is los; it must be one of reward, loss"),
        (["run", "absent.yaml"], "config absent.yaml cannot be read: No such file or directory"),
        (["revise", "--show", "3"], "--show is about what a dry run shows; add --dry-run, or drop it"),
        (["revise", "--reviser.endpoint.extra_body", "[1]"], "reviser.endpoint.extra_body is [1]; it must be a JSON"),
        (["analyse"], "required: FOLDER"),
        (["analyse", "x", "--edits", "e"], "--edits and --output go together"),
        (["analyse", "x", "--preferences", "p"], "--preferences needs --edits and --output"),
        (["train"], "required: STAGE"),
        (["train", "pop"], "invalid choice: 'pop'"),
        (["answer"], "no model is named that is to answer: tlcr answer MODEL --prompts FILE"),
        (["judge"], "0 files of answers are named; give two to compare, or one to grade"),
        (["answer", "m", "--top_k", "3"], "unknown flag --top_k; did you mean --top_p?"),
        (["judge", "a", "--temperature", "x"], "temperature is x; it must be a number or null"),
        (["judge", "a", "--backend", "files"], "backend is files; it must be one of endpoint, local"),
        (["judge", "a", "--config", "absent.yaml"], "config absent.yaml cannot be read: No such file or directory"),
        (["score", "--response", "x", "--batch-size", "x"], "--batch-size is x; it must be a whole number"),
        (["score", "--response", "x", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["doctor", "--gpus", "1.5"], "--gpus is 1.5; it must be a whole number"),
        (["doctor", "--gpus", "1", "--gpu_memory", "abc"], "--gpu_memory is abc; it must be a number"),
        (["doctor", "--gpus", "1", "--gpu_memory", "1e400"], "--gpu_memory is inf; it must be above 0 and finite, in"),
        (["doctor", "--gpus", "1", "--gpu_memory", "0"], "--gpu_memory is 0; it must be above 0 and finite, in GiB"),
        (["doctor", "--gpus", "1", "--gpu_memory", "-3"], "--gpu_memory is -3; it must be above 0 and finite, in GiB"),
        (["doctor", "--write_rate", "fast"], "--write_rate is fast; it must be a number"),
        (["doctor", "--write_rate", "-1"], "--write_rate is -1; it must be above 0 and finite, in GiB a second"),
        (["doctor", "--write_rate", "1e400"], "--write_rate is inf; it must be above 0 and finite, in GiB a second"),
        (["revise", "--dry-run", "--show", "-1"], "--show is -1; it must be at least 0"),
        (["judge", "a", "--dry-run", "--show", "-1"], "--show is -1; it must be at least 0"),
        (["evaluate-tokens", "--spans", "a", "--show", "-1"], "--show is -1; it must be at least 0"),
        (["serve", "--dtype", "int8"], "--dtype is int8; it must be one of float32, bfloat16"),
        (["serve", "--discriminator", "x", "--io-seconds", "1e400"], "--io-seconds is inf; it must be finite"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tlcr: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert calls == []


def test_a_command_with_a_config_of_its_own_reads_a_file_and_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("temperature: null\nendpoint:\n  model: m\n  retries: 2\n", encoding="utf-8")
    command = ["judge", "a.json", "--config", str(path), "--endpoint.retries", "3", "--print-config"]
    assert cli.main(command) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["temperature"], shown["endpoint"]["model"], shown["endpoint"]["retries"]) == (None, "m", 3)
    assert set(shown) == {f.name for f in dataclasses.fields(JudgeConfig)}
    path.write_text("endpoint:\n  retris: 2\n", encoding="utf-8")
    assert cli.main(command) == 2
    message = f"tlcr: error: {path}:2: unknown key endpoint.retris; did you mean endpoint.retries?\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("command", "cls"), [("answer", AnswerConfig), ("judge", JudgeConfig)])
def test_their_help_lists_every_knob(
    command: str, cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        cli.main([command, "--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    for knob in knobs(cls):
        assert f"--{knob.path} " in shown and " ".join(knob.metadata["help"].split()) in shown


def test_an_unknown_key_in_the_file_names_line_and_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nppo:\n  updats: 3\n", encoding="utf-8")
    assert cli.main(["run", str(path)]) == 2
    assert capsys.readouterr().err == (f"tlcr: error: {path}:3: unknown key ppo.updats; did you mean ppo.updates?\n")


def test_an_error_of_many_lines_is_shown_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise ConfigError("first\n  second")

    monkeypatch.setitem(cli.HANDLERS, "run", fail)
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == "tlcr: error: first second\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> int:
        raise KeyError("bug")

    monkeypatch.setitem(cli.HANDLERS, "run", fail)
    with pytest.raises(KeyError):
        cli.main(["run"])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["run", "a b.yaml"], "go on with: tlcr run 'a b.yaml' --resume"),
        (["train", "ppo", "--resume"], "go on with: tlcr train ppo --resume"),
        (["label"], "start again with: tlcr label"),
        (["revise", "a.yaml"], "what was answered is kept; go on with: tlcr revise a.yaml"),
        (["answer", "m", "--prompts", "p"], "what was answered is kept; go on with: tlcr answer m --prompts p"),
        (["judge", "a", "b"], "what was answered is kept; go on with: tlcr judge a b"),
    ],
)
def test_ctrl_c_says_how_to_go_on_and_exits_130(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.HANDLERS, arguments[0], interrupt)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.strip().endswith(shown)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered: str) -> None:
    """`tlcr run --print-config | head -0`: the pipe breaks, and nobody complains."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "tlcr", "run", "--print-config"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=60, env=environment)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- several processes


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process is one of two, which are not joined; what ends it is recorded instead."""
    from tlcr.cli import together

    ended: list[str] = []

    def fail(code: int, error: BaseException, message: str) -> None:
        ended.append(message)
        raise SystemExit(code)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(together, "begin", lambda: None)
    monkeypatch.setattr(together, "fail", fail)
    monkeypatch.setattr(together, "end", sys.exit)
    return ended


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["report", "x"],
        ["analyse", "x"],
        ["score", "--response", "x"],
        ["revise"],
        ["revise", "--dry-run"],
        ["evaluate-tokens", "--spans", "x"],
        ["answer", "m"],
        ["judge", "a", "b"],
    ],
)
def test_what_several_processes_cannot_share_is_refused(
    arguments: list[str], second_of_two: list[str], calls: list[Any]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert second_of_two == [
        f"tlcr: error: 'tlcr {arguments[0]}' works in one process, and the launcher started 2; run it without the "
        "launcher (what several can share: run, train, label, evaluate)\n"
    ]
    assert calls == []


def test_one_of_several_processes_prints_the_config(
    second_of_two: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "--print-config"])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "--print-config"])
    assert "output_dir" in capsys.readouterr().out


def test_an_exception_of_one_process_is_a_traceback_and_a_line(
    second_of_two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(arguments: Any) -> int:
        raise MemoryError("of\nthe device")

    monkeypatch.setitem(cli.HANDLERS, "run", break_down)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["run", "c.yaml"])
    (message,) = second_of_two
    assert message.startswith("Traceback (most recent call last):") and "in break_down" in message
    assert message.splitlines()[-1] == (
        "tlcr: error: process 1 of 2 failed (MemoryError: of the device); what was saved is kept; go on under the "
        "same launcher with: tlcr run c.yaml --resume"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory ran out: 'tlcr doctor CONFIG' says what a run takes"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried"), "the memory ran out ("),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), "runs/a cannot be read or written: Read-only file"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence_with_the_way_to_go_on(
    error: Exception, said: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: RunConfig, resume: bool) -> None:
        raise error

    monkeypatch.setattr(sys.modules["tlcr.experiment.pipeline"], "run", run)
    assert cli.main(["run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"tlcr: error: {said}") and line.endswith("go on with: tlcr run --resume")


def test_an_error_of_a_program_keeps_its_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cfg: RunConfig, resume: bool) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(sys.modules["tlcr.experiment.pipeline"], "run", run)
    with pytest.raises(KeyError):
        cli.main(["run"])

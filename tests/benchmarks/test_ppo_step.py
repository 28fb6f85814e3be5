"""PPO rounds beside TRL: what stops a run before anything is timed, what the interpreter with TRL has to have, what a
process that is cut off has told, and how a profile is summed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import rollout
from benchmarks.ppo_step import __main__ as command
from benchmarks.ppo_step import cases, journal
from benchmarks.ppo_step.journal import Journal
from benchmarks.ppo_step.profiling import OUTSIDE, parts_of, table
from benchmarks.ppo_step.task import PHASES, SHAPES, TRL, TRL_VERSION, Task, causal_lm, config_of, scorer, tokenizer_of

ROOT = Path(__file__).parents[2]


def interpreter(folder: Path, version: str | None) -> str:
    """This Python, with a distribution of TRL that has this version and nothing else in it, or without packages."""
    site = folder / "site"
    if version is not None:
        (site / f"trl-{version}.dist-info").mkdir(parents=True)
        (site / f"trl-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n"
        )
    option = "-S" if version is None else ""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" {option} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("version", [None, "0.9.6"])
def test_a_wrong_trl_is_refused_before_anything_is_timed(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = interpreter(tmp_path, version)
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("was timed"))
    monkeypatch.setattr(sys, "argv", ["ppo_step", "--trl-python", python])
    said = rf"has TRL {version or 'none'}, wanted 1\.11\.0: .*pip install trl==1\.11\.0.*--trl-python"
    with pytest.raises(SystemExit, match=said):
        command.main()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--trl-python .*nowhere cannot be run: .*No such file"):
        command.check_trl(str(tmp_path / "nowhere"))


def test_the_trl_that_is_compared_with_is_let_through(tmp_path: Path) -> None:
    command.check_trl(interpreter(tmp_path, TRL_VERSION))
    assert TRL == "TRL 1.11.0"


def test_the_side_of_trl_needs_no_tlcr(tmp_path: Path) -> None:
    """All that its process imports before TRL itself, with a TRL that ends the process and without any tlcr."""
    (tmp_path / "trl.py").write_text("raise SystemExit('reached TRL')\n")
    code = (
        "import runpy, sys; sys.modules['tlcr'] = None; "
        "runpy.run_module('benchmarks.ppo_step.with_trl', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == "reached TRL"


MADE_UP_TRL = """
import gc, os, sys, types
import numpy as np

__version__ = "1.11.0"

class PPOConfig:
    def __init__(self, **given):
        self.__dict__ |= given

class PPOTrainer:
    def __init__(self, args, train_dataset, **given):
        args.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * {times}
        self.args, self.rows = args, len(train_dataset)

    def train(self):
        args = self.args
        print(args.batch_size, args.gradient_accumulation_steps, args.num_mini_batches, self.rows)

def batch_generation():
    pass

for name in ("trl.experimental", "trl.experimental.ppo", "trl.experimental.ppo.ppo_trainer"):
    sys.modules[name] = sys.modules["trl"]
experimental = ppo = ppo_trainer = sys.modules["trl"]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("times", "said"), [(1, "8 4 2 32"), (2, "TRL takes 16 answers a round, wanted 8")])
def test_trl_is_given_the_batch_that_is_counted(times: int, said: str, tmp_path: Path) -> None:
    """It was given half of it where a minibatch was half of the batch, and credited with the whole."""
    (tmp_path / "trl.py").write_text(MADE_UP_TRL.replace("{times}", str(times)))
    task = Task(batch=8, minibatch=4, micro_batch=2, prompt_tokens=4, response_tokens=4, rounds=2)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ppo_step.with_trl", task.to_json(), str(tmp_path / "journal")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr and done.returncode == (times != 1), done.stderr


# ---- the models


@pytest.mark.parametrize(("shape", "weights"), [("135m", 134_515_008), ("1b", 1_235_814_400)])
def test_the_shapes_are_those_of_the_models_that_they_are_named_after(shape: str, weights: int) -> None:
    """The published numbers of parameters of SmolLM-135M and Llama-3.2-1B."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) == weights


def test_both_trainers_get_the_same_random_weights_in_their_dtype() -> None:
    task = Task(dtype="bfloat16")
    tokenizer = tokenizer_of(task)
    one, other, value = causal_lm(task, tokenizer), causal_lm(task, tokenizer), scorer(task, tokenizer)
    assert one.dtype == value.dtype == torch.bfloat16 and value.num_labels == 1
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert one.config.eos_token_id == config_of(task, tokenizer).eos_token_id == tokenizer.eos_token_id
    logits = one(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits[..., tokenizer.eos_token_id].max() < -1e8 < logits[..., 2:].min()


# ---- what a process tells


def test_a_journal_is_read_while_it_is_written_and_without_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert journal.read(path) == []
    written = Journal(path)
    with written.making("models"):
        pass
    for number in range(3):
        written.phase("rollout", 1.0 + number)
        written.round(dict.fromkeys((*PHASES, "total"), 2.0 + number))
    with path.open("a") as file:
        file.write('{"at": 1, "event": "ph')
    events = journal.read(path)
    assert [event["event"] for event in events] == ["made", *["phase", "round"] * 3]
    assert [event["round"] for event in events[1:]] == [0, 0, 1, 1, 2, 2]
    assert [seconds["total"] for seconds in journal.counted_rounds(events)] == [3.0, 4.0]  # the first warms up
    assert all(event["peak_bytes"] > 0 for event in events if event["event"] == "round")


def trainer(folder: Path, then: str) -> str:
    """An interpreter that is a trainer: its journal tells of two rounds and a rollout, and then `then` is run."""
    times = dict.fromkeys((*PHASES, "total"), 1.5)
    events: list[dict[str, Any]] = [{"event": "made", "what": "models", "seconds": 2.0}]
    events += [{"event": "round", "round": number, "seconds": times, "peak_bytes": 2**30} for number in (0, 1)]
    events += [{"event": "phase", "round": 2, "phase": "rollout", "seconds": 7.25}]
    lines = "\n".join(json.dumps({"at": 0.0, **event}) for event in events)
    script = folder / "python"
    script.write_text(f"#!/bin/sh\ncat > \"$4\" <<'END'\n{lines}\nEND\n{then}\n")
    script.chmod(0o755)
    return str(script)


def test_a_process_that_is_cut_off_has_told_where_its_time_went(tmp_path: Path) -> None:
    side = command.Side(trainer(tmp_path, "exec sleep 600"), "with_tlcr", Task())
    shown = io.StringIO()
    events = command.run(side, 2.0, Console(file=shown, width=100))
    assert "models: 2 s" in shown.getvalue() and "round 2, rollout: 7.25 s" in shown.getvalue()
    assert "round 1: 1.5 s, peak 1.00 GiB" in shown.getvalue() and "cut off after 2 s" in shown.getvalue()
    row = command.row("tlcr", Task(), [events])
    assert (row["rounds"], row["seconds"]["total"], row["peak_bytes"], row["versions"]) == (1, 1.5, 2**30, {})
    assert "speed" in str(command.table([row]).columns[-2].header)


def test_a_process_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    side = command.Side(trainer(tmp_path, "echo out of memory >&2; exit 3"), "with_trl", Task())
    with pytest.raises(SystemExit, match=r"with_trl failed with code 3:\nout of memory"):
        command.run(side, None, Console(file=io.StringIO()))


@pytest.mark.slow
def test_a_round_is_measured_and_profiled_and_nothing_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    options = ["--batch", "4", "--response-tokens", "5", "--rounds", "1", "--repeats", "1", "--epochs", "2"]
    options += ["--value-model", "shared", "--no-trl", "--threads", "1", "--profile", str(tmp_path / "profile")]
    monkeypatch.setattr(sys, "argv", ["ppo_step", *options])
    command.main()
    out = capsys.readouterr().out
    assert "value model and discriminator" in out and "round 1, update" in out and "tokens/s" in out
    assert list(temporary.iterdir()) == []
    folder = tmp_path / "profile" / "tlcr-shared-value-head"
    parts = {part["name"]: part for part in json.loads((folder / "parts.json").read_text())}
    steps = ["update: forward", "update: backward", "update: gradient norms", "update: optimiser"]
    names = ["rollout", "rollout: generate", "score", "score: policy and values", "score: reference"]
    names += ["reward", "advantages", "update"]
    assert [name for name in parts if name != OUTSIDE] == names + steps
    assert all(parts[name]["calls"] == 2 for name in steps)  # a step for each pass over the answers
    assert sum(parts[name]["host"] for name in steps) < parts["update"]["host"]
    assert parts["update: backward"]["operations"]["aten::mm"] > 0
    assert (folder / "trace.json.gz").stat().st_size > 0 and "update: backward" in (folder / "parts.txt").read_text()


# ---- profiles


def event(kind: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_time_on_a_gpu_counts_for_the_part_that_launched_it() -> None:
    """Microseconds: an update of 100, a backward pass from 20 to 60; its thread launches kernels that run later."""
    events = [
        event("user_annotation", "tlcr: update", 0, 100),
        event("user_annotation", "tlcr: update: backward", 20, 40),
        event("gpu_user_annotation", "tlcr: update", 0, 500),
        event("user_annotation", "Optimizer.step", 70, 5),
        event("cpu_op", "aten::mm", 22, 6, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 10, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernel", 25, 2, tid=2, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 70, 2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 130, 2, correlation=4),
        event("kernel", "gemm", 40, 10, correlation=1),
        event("kernel", "gemm", 400, 30, correlation=2),
        event("gpu_memcpy", "Memcpy DtoH", 440, 7, correlation=3),
        event("kernel", "fill", 450, 1, correlation=4),
        event("kernel", "replayed", 30, 2),
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    update, backward, outside = parts_of(events)
    assert (update.name, update.calls, update.host) == ("update", 1, pytest.approx(100e-6))
    assert (update.device, update.launches) == (pytest.approx(49e-6), 4)
    assert (backward.name, backward.device, backward.launches) == ("update: backward", pytest.approx(32e-6), 2)
    assert dict(update.operations) == {"gemm": pytest.approx(10e-6), "Memcpy DtoH": pytest.approx(7e-6)}
    assert dict(backward.operations) == {"gemm": pytest.approx(30e-6), "replayed": pytest.approx(2e-6)}
    assert (outside.name, outside.device) == (OUTSIDE, pytest.approx(1e-6))
    text = table([update, backward, outside])
    assert "update: backward" in text and "Memcpy DtoH" in text


def test_time_on_a_cpu_is_that_of_an_operation_without_those_it_calls() -> None:
    events = [
        event("user_annotation", "tlcr: score", 0, 50),
        event("user_annotation", "tlcr: score", 60, 20),
        event("cpu_op", "aten::matmul", 5, 20),
        event("cpu_op", "aten::mm", 8, 15),
        event("cpu_op", "aten::mm", 62, 10),
        event("cpu_op", "aten::add", 6, 3, tid=9),
        event("cpu_op", "aten::add", 90, 4),
    ]
    score, outside = parts_of(events)
    assert (score.calls, score.host) == (2, pytest.approx(70e-6))
    wanted = {"aten::matmul": 5e-6, "aten::mm": 25e-6, "aten::add": 3e-6}
    assert dict(score.operations) == {name: pytest.approx(seconds) for name, seconds in wanted.items()}
    assert dict(outside.operations) == {"aten::add": pytest.approx(4e-6)}


# ---- the cases for a GPU


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("trl", [None, "python-with-trl"])
def test_the_cases_are_commands_that_are_understood(small: bool, trl: str | None, monkeypatch: Any) -> None:
    found = list(cases.cases(small=small, trl=trl))
    assert [case.name for case in found[:2]] == ["1b_separate", "1b_shared"]  # the most important first
    for case in found:
        module, *options = case.command
        monkeypatch.setattr(sys, "argv", [module, *options])
        parsed = command.arguments() if module == "benchmarks.ppo_step" else rollout.arguments()
        assert parsed.shape == ("embedded" if small else "135m" if case.name == "135m" else "1b")
        if module == "benchmarks.ppo_step":
            sides = (2 if parsed.value_model == "both" else 1) + (not parsed.no_trl)
            assert sides * parsed.limit < case.limit
    measured = [case for case in found if trl is not None and f"{trl}" in case.command]
    assert [case.name for case in measured] == ([] if trl is None else ["1b_separate", "135m"])


def test_a_case_that_is_cut_off_has_been_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('round 0', flush=True)\ntime.sleep(600)\n")
    (tmp_path / "broken.py").write_text("raise SystemExit('no GPU')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        assert cases.run("slow", ["slow"], 3.0, tmp_path / "slow.txt") == "cut off"
        assert cases.run("broken", ["broken"], 60.0, tmp_path / "broken.txt") == "failed with code 1"
    assert (tmp_path / "slow.txt").read_text() == "round 0\n" and "round 0" in capsys.readouterr().out
    assert (tmp_path / "broken.txt").read_text() == "no GPU\n"

"""benchmarks.gpu: steps that fail, hang or cannot run, what is written of them, and the calls that are sanitized."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import build
from benchmarks.gpu.process import Status, run
from benchmarks.gpu.steps import PYTEST, SANITIZER, TOOLS, Step, steps
from tests.ops import every_op
from tests.ops.examples import CALLS
from tlcr import ops
from tlcr.ops import _extension

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def script(name: str, code: str, **changes: object) -> Step:
    return Step(name, (sys.executable, "-c", code), **{"limit": 60, **changes})  # type: ignore[arg-type]


def test_a_step_that_is_cut_off_has_told_what_it_did_and_leaves_nothing_running(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", HANGS], limit=3, log=tmp_path / "logs" / "a.log", cwd=tmp_path)
    assert ended.status is Status.CUT_OFF and ended.seconds >= 3
    child = int(ended.output)
    assert (tmp_path / "logs" / "a.log").read_text() == ended.output
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what the step started goes on"
        time.sleep(0.05)


def test_a_step_that_fails_stops_no_other_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = (
        script("good", "print('1 passed in 0.1s'); print('bye')", says=PYTEST),
        script("bad", "print('half'); raise SystemExit(3)"),
        script("absent", "raise AssertionError", missing="no such tool"),
        script("figures", "print('12 TB/s')", shown=True, environment={"NAME": "value"}),
    )
    monkeypatch.setattr(program, "steps", lambda device, results: made)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert program.main(options) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["step"]: row for row in summary["rows"]}
    assert [(name, row["status"], row["said"]) for name, row in rows.items()] == [
        ("good", "passed", "1 passed in 0.1s"),
        ("bad", "failed", "half"),
        ("absent", "not here", "no such tool"),
        ("figures", "passed", "12 TB/s"),
    ]
    assert rows["figures"]["command"] == "python -c 'print('\"'\"'12 TB/s'\"'\"')'"
    assert rows["figures"]["environment"] == {"NAME": "value"}
    assert summary["kind"] == "gpu" and summary["versions"]["torch"] == torch.__version__ and summary["commit"]
    printed = capsys.readouterr().out
    assert printed.count("12 TB/s") == 3  # as it came, in its line, in the table
    assert (tmp_path / "logs" / "bad.log").read_text() == "half\n"

    assert program.main([*options, "--only", "good", "absent"]) == 0
    assert program.main([*options, "--only", "good", "--minutes", "0"]) == 1
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert row["status"] == "not reached"
    with pytest.raises(SystemExit, match=r"unknown steps \['better'\]; the steps are 'good', 'bad'"):
        program.main([*options, "--only", "better"])


def test_without_a_gpu_the_run_is_refused_and_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu takes the path of every step without one"):
        program.main([])


def test_the_steps_of_a_gpu_and_those_in_small_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    on_gpu, in_small = steps("cuda", tmp_path), steps("cpu", None)
    assert [step.name for step in on_gpu] == [step.name for step in in_small]
    assert len({step.name for step in on_gpu}) == len(on_gpu) and set(TOOLS) < {step.name for step in on_gpu}
    for step in on_gpu:
        if step.name in TOOLS:
            assert step.command[:3] == (str(tool), "--tool", step.name) and step.command[-1] == "cuda"
        assert step.missing is None
    files = [Path(part).name for step in on_gpu for part in step.command if part.endswith(".json")]
    assert files == ["ops_nvidia-h100-80gb-hbm3.json", "ppo_step_nvidia-h100-80gb-hbm3.json"]
    assert all("--json" not in step.command for step in in_small)


def test_a_build_that_is_not_loaded_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build.subprocess, "run", lambda *command, check: None)
    monkeypatch.setattr(_extension, "unavailable", lambda device: f"no kernels for {device}")
    with pytest.raises(SystemExit, match="what was built is not loaded: no kernels for cuda"):
        build.main("cuda")
    monkeypatch.setattr(_extension, "unavailable", lambda device: None)
    build.main("cuda")
    assert capsys.readouterr().out.startswith("built for torch ")


def test_what_the_table_says_of_pytest_and_of_the_sanitizer() -> None:
    def said(pattern: str, output: str) -> str:
        return program._said(Step("a", (), 1, says=pattern), output)

    assert said(PYTEST, "..F\n== short ==\nFAILED x\n1 failed, 3 passed, 2 skipped in 4.20s\n").startswith(
        "1 failed, 3"
    )
    assert said(PYTEST, "===== 3 passed in 101.10s (0:01:41) =====") == "3 passed in 101.10s (0:01:41)"
    assert said(SANITIZER, "10 calls\n========= ERROR SUMMARY: 0 errors\n") == "ERROR SUMMARY: 0 errors"
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert said(SANITIZER, race).startswith("RACECHECK SUMMARY: 0 hazards")
    assert said(SANITIZER, "a\nno such device\n\n") == "no such device" and said(PYTEST, "") == "it printed nothing"


def test_every_op_that_has_kernels_is_called_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    differentiated: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda result, leaves: differentiated.append(len(leaves)) or grad(result, leaves)
    )
    every_op.main(["--small", "--impl", "reference"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        f"{status.op} reference" for status in ops.available() if status.device == "cpu" and status.op in CALLS
    ]
    assert {status.op for status in ops.available()} == CALLS.keys()
    wanted = {name for name, (_, leaves) in CALLS.items() if leaves}
    assert len(differentiated) >= 4 * len(wanted) and set(differentiated) == {len(CALLS[name][1]) for name in wanted}


def test_the_sizes_of_every_op_end_inside_a_vector_and_a_tile() -> None:
    widths = [inputs["policy"].shape[-1] for inputs in every_op.examples("score_tokens", "cpu", small=False)]
    assert {5, 50, 2049, 50_257} < set(widths)
    for inputs in every_op.examples("score_tokens", "cpu", small=True):
        assert int(inputs["ids"].max()) < inputs["policy"].shape[-1]
    lengths = {inputs["pair"].shape[1] for inputs in every_op.examples("fused_gae", "cpu", small=False)}
    assert lengths == {1, 7, 1025, 2500}

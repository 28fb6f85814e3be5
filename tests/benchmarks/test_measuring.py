"""The benchmarks: what they refuse to time or to keep, and that what they write is what they measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tlcr
from benchmarks import clocks, record
from benchmarks.ops import cases, rivals, runs
from tlcr import ops

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, which Python imports a tlcr from."""
    import tlcr

    folder = (tmp_path / "checkout").resolve()
    (folder / "tlcr").mkdir(parents=True)
    (folder / "tlcr" / "__init__.py").write_text("")
    monkeypatch.setattr(tlcr, "__file__", str(folder / "tlcr" / "__init__.py"))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_of_a_clean_checkout(checkout: Path) -> None:
    assert record.clean_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_changed_file_is_refused_and_named(checkout: Path) -> None:
    (checkout / "tlcr" / "__init__.py").write_text("changed = True\n")
    with pytest.raises(SystemExit, match=r"differs from commit .*commit or stash[\s\S]*tlcr/__init__.py"):
        record.clean_commit(checkout)


def test_an_untracked_file_is_refused_unless_it_is_a_result(checkout: Path) -> None:
    results = checkout / record.RESULTS
    results.mkdir(parents=True)
    (results / "ops.json").write_text("{}")
    record.clean_commit(checkout)
    (checkout / "tlcr" / "new.py").write_text("")
    with pytest.raises(SystemExit, match=r"new\.py"):
        record.clean_commit(checkout)


def test_no_commit_is_refused(checkout: Path) -> None:
    git(checkout, "update-ref", "-d", "HEAD")
    with pytest.raises(SystemExit, match="no git checkout with a commit"):
        record.clean_commit(checkout)


def test_code_from_elsewhere_is_refused(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcr.__file__", str(tmp_path / "elsewhere" / "tlcr" / "__init__.py"))
    with pytest.raises(SystemExit, match=r"imported from .*elsewhere.*PYTHONPATH"):
        record.clean_commit(checkout)


def test_a_record_holds_the_facts_and_nothing_of_this_machine_s_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ROOT / "benchmarks" / "ops" / "__main__.py"
    monkeypatch.setattr(sys, "argv", [str(module), "--json", str(tmp_path / "x.json"), "--python", "/opt/x/python"])
    made = record.record("ops", [{"op": "x"}], commit="0" * 40, clocks={"wall": "time"}, packages=["nowhere"], more=1)
    assert made["command"] == "python -m benchmarks.ops --json x.json --python python"
    assert set(made["versions"]) >= {"python", "torch", "tlcr"} and "nowhere" not in made["versions"]
    assert made["machine"]["threads"] == torch.get_num_threads() and made["machine"]["memory_bytes"] > 2**30
    assert made["machine"]["last_level_cache_bytes"] is None or made["machine"]["last_level_cache_bytes"] >= 2**18
    assert set(made["build"]) == set(record.BUILD_FACTS) and made["more"] == 1
    assert str(ROOT) not in json.dumps(made) and str(tmp_path) not in json.dumps(made)
    record.write(tmp_path / "results" / "x.json", made)
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == made


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write(path, {"x": float("nan")})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# Bytes that must move, counted by hand.


@pytest.mark.parametrize(
    ("op", "name", "shape", "dtype", "which", "wanted"),
    [
        # Per token: 2 float32 logits, a mask, a float32 kl and a float32 reward; per row a float32 terminal reward.
        ("fused_reward", "", (3, 5), torch.float32, "forward", 15 * (8 + 1 + 4 + 4) + 3 * 4),
        ("fused_reward", "3 classes", (3, 5), torch.bfloat16, "forward", 15 * (6 + 1 + 4 + 4) + 3 * 4),
        # Rewards and values in, advantages and returns out; the mask; offsets of 3 sequences.
        ("fused_gae", "", (3, 5), torch.float32, "forward", 15 * 16),
        ("fused_gae", "padded rows", (3, 5), torch.float32, "forward", 15 * 17),
        ("fused_gae", "packed", (3, 5), torch.float32, "forward", 15 * 16 + 4 * 4),
        # 7 rows of 11 logits, an id, log-probability and entropy; backward the gradients of these, and the logits'.
        ("score_tokens", "", (7, 11), torch.float32, "forward", 77 * 4 + 7 * (8 + 4 + 4)),
        ("score_tokens", "", (7, 11), torch.bfloat16, "backward", 77 * (2 + 2) + 7 * (8 + 4 + 4)),
        ("score_tokens", "with reference and KL", (7, 11), torch.bfloat16, "forward", 2 * 77 * 2 + 7 * (8 + 4 * 4)),
        ("score_tokens", "with reference and KL", (7, 11), torch.float32, "backward", 3 * 77 * 4 + 7 * (8 + 3 * 4)),
        # Hidden states 7 x 2 and a head 11 x 2.
        ("score_hidden", "", (7, 2, 11), torch.float32, "forward", (14 + 22) * 4 + 7 * 16),
        ("score_hidden", "", (7, 2, 11), torch.float32, "both", 3 * (14 + 22) * 4 + 2 * 7 * 16),
        # Six float32 values and a mask in; five scalars out; backward also two gradients out.
        ("ppo_loss", "", (3, 5), torch.float32, "forward", 15 * 25 + 5 * 4),
        ("ppo_loss", "", (3, 5), torch.float32, "both", 15 * 25 + 5 * 4 + 15 * (25 + 8) + 4),
    ],
)
def test_bytes_moved_are_those_counted_by_hand(
    op: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, which: str, wanted: int
) -> None:
    assert cases.traffic(cases.Case(op, name, shape, dtype), which).bytes == wanted


def test_products_of_a_head_are_those_counted_by_hand() -> None:
    case = cases.Case("score_hidden", "with reference and KL", (7, 2, 11))
    # Forward the logits of two models; backward the gradients of hidden states and head; 2 a multiply-add.
    assert cases.traffic(case, "forward").flops == 2 * 2 * 7 * 2 * 11
    assert cases.traffic(case, "both").flops == (2 + 2) * 2 * 7 * 2 * 11
    assert cases.traffic(cases.Case("ppo_loss", "", (3, 5)), "both").flops is None


def test_every_case_has_its_bytes_and_its_rivals() -> None:
    for listed, device in (
        (cases.cpu_cases, "cpu"),
        (cases.gpu_cases, "cuda"),
        (cases.interpreted_cases, "cpu"),
        (lambda: cases.short_cases("cpu"), "cpu"),
        (lambda: cases.short_cases("cuda"), "cuda"),
    ):
        for case in listed():
            for which in case.passes:
                assert cases.traffic(case, which).bytes > 0
            names = [rival.name for rival in rivals.rivals(case, device)]
            assert names and len(set(names)) == len(names), case


def test_no_two_rows_say_the_same() -> None:
    short = (cases.short_cases(device) for device in ("cpu", "cuda"))
    for listed in (cases.cpu_cases(), cases.gpu_cases(), cases.interpreted_cases(), *short):
        rows = [(case.op, case.name, case.shape, case.dtype) for case in cases.once(listed)]
        assert len(set(rows)) == len(rows)


def test_the_cases_have_the_vocabularies_and_double_one_axis_at_a_time() -> None:
    for listed in (cases.once(cases.cpu_cases()), cases.once(cases.gpu_cases())):
        scored = [case for case in listed if case.op == "score_tokens"]
        assert {case.axes["V"] for case in scored} >= {32_000, 50_257, 128_256, 151_936}
        for op, axes in (("fused_gae", "BT"), ("ppo_loss", "BT"), ("score_tokens", "NV"), ("score_hidden", "NV")):
            for axis in axes:
                assert any(len(points) >= 4 for points in doublings(listed, op, axis)), (op, axis)


def doublings(listed: list[Any], op: str, axis: str) -> Iterator[list[int]]:
    """Sizes along one axis with everything else equal, from each on as long as they double."""
    groups: dict[Any, list[int]] = {}
    for case in listed:
        if case.op == op:
            rest = tuple(size for name, size in case.axes.items() if name != axis)
            groups.setdefault((case.name, case.dtype, rest), []).append(case.axes[axis])
    for sizes in groups.values():
        for size in sizes:
            run = [size]
            while 2 * run[-1] in sizes:
                run.append(2 * run[-1])
            yield run


# Correct first.


def small() -> Any:
    return cases.Case("score_tokens", "with reference and KL", (12, 40))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of one short round a case, of which the copy is not measured."""
    monkeypatch.setattr(clocks, "COPIED", (2**16,))
    monkeypatch.setattr(clocks, "TURN", 0.0)
    return runs.Run(clocks.CPUClocks(rounds=2, case_seconds=0), "cpu", minutes=5)


def planted(**functions: Callable[[], Any]) -> Callable[..., list[Any]]:
    return lambda case, device: [rivals.Rival(name, make) for name, make in functions.items()]


def test_rows_have_the_fields_that_the_report_reads(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise ModuleNotFoundError("No module named 'liger'")

    monkeypatch.setattr(runs, "rivals", planted(eager=lambda: rivals._scores, liger=absent))
    rows = run.measure(small())
    assert [row["pass"] for row in rows if row["implementation"] == "eager"] == ["forward", "backward", "both"]
    assert {row["implementation"].split()[0] for row in rows} == {"tlcr", "eager", "liger"}
    for row in rows:
        assert row["op"] == "score_tokens" and row["case"] == "with reference and KL"
        assert row["shape"] == {"N": 12, "V": 40} and row["dtype"] == "float32"
        assert row["bytes_moved"] > 0 and "N V s" in row["bytes_formula"]
        if row["implementation"] == "liger":
            assert row["status"] == "not run" and row["reason"] == "ModuleNotFoundError: No module named 'liger'"
            assert row["seconds"] == {} and row["peak_bytes"] is None and row["bandwidth_share"] is None
        elif row["status"] == "measured":
            assert row["reason"] == "" and 0 <= row["error"] < 1e-4 and row["first_call_seconds"] > 0
            assert set(row["seconds"]) == {"processor", "wall"} and row["bandwidth_share"] > 0
            for timing in row["seconds"].values():
                assert len(timing["rounds"]) == 2
                assert 0 < timing["lower"] <= timing["median"] <= timing["upper"]
        else:
            assert "no compiled kernels" in row["reason"], row
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    text = runs.table(rows, "processor")
    assert "No module named 'liger'" in text and "score_tokens, with reference and KL, backward" in text


@pytest.mark.parametrize("where", ["result", "result without gradient", "gradient", "shape"])
def test_a_wrong_rival_is_not_timed(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def wrong(**inputs: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy, kl, ref_logprobs = rivals._scores(**inputs)
        if where == "result" or (where == "result without gradient" and not torch.is_grad_enabled()):
            entropy = entropy + 1e-3
        if where == "gradient":
            entropy = entropy.detach() + 0 * kl
        return (logprobs[:-5] if where == "shape" else logprobs), entropy, kl, ref_logprobs

    monkeypatch.setattr(runs, "rivals", planted(wrong=lambda: wrong, right=lambda: rivals._scores))
    rows = run.measure(small())
    refused = [row for row in rows if row["implementation"] == "wrong"]
    assert [row["status"] for row in refused] == ["not run"] * 3
    assert all("wrong" in row["reason"] or "shape" in row["reason"] for row in refused)
    assert {row["status"] for row in rows if row["implementation"] == "right"} == {"measured"}


def test_a_wrong_tlcr_stops_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.score_tokens

    def wrong(*args: Any, impl: Any, **options: Any) -> Any:
        scores = right(*args, impl=impl, **options)
        return scores if impl == "reference" else scores._replace(kl=scores.kl * 1.001)

    monkeypatch.setattr(ops, "score_tokens", wrong)
    monkeypatch.setattr(runs, "tlcr_implementations", lambda *_, **__: [("auto", None)])
    with pytest.raises(SystemExit, match=r"tlcr auto is wrong on score_tokens.*relative error 1\.0e-03"):
        run.measure(small())
    assert run.rows == []


@pytest.mark.parametrize("name", ["", "padded rows", "holes", "packed", "padded rows, whitened"])
def test_every_loop_and_scan_of_gae_is_right(name: str) -> None:
    case = cases.Case("fused_gae", name, (16, 512), passes=("forward",))
    problem = cases.Problem(case, "cpu")
    for rival in rivals.rivals(case, "cpu"):
        if "torchrl" in rival.name or "masked_whiten" in rival.name or "compile" in rival.name:
            continue  # packages of another environment; what is compiled, eagerly below
        problem.error(rival.make())
    if name in ("", "padded rows"):
        problem.error(rivals._chunks)
    if name in ("", "padded rows", "holes"):
        problem.error(rivals._doubling)


def test_a_missing_package_is_a_row_with_the_exception(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl", None)
    rows = run.measure(cases.Case("fused_gae", "packed", (4, 16), passes=("forward",)))
    (row,) = (row for row in rows if row["implementation"] == "torchrl vec_gae")
    assert row["status"] == "not run" and row["reason"].startswith("ModuleNotFoundError: ")


def test_no_path_of_this_machine_stands_in_a_reason() -> None:
    said = runs.one_line(RuntimeError(f"cannot open {ROOT}/x.so,\n  {Path.home()}/y"))
    assert said == "RuntimeError: cannot open .../x.so, .../y"


# Time and memory.


def test_what_the_budget_leaves_no_time_for_is_a_row(run: Any) -> None:
    run.deadline = 0.0
    rows = run.measure(small())
    assert [(row["pass"], row["implementation"], row["status"]) for row in rows] == [
        (which, "all", "not run") for which in ("forward", "backward", "both")
    ]
    assert {row["reason"] for row in rows} == {"not reached within 5 minutes; --minutes gives more"}


def test_a_rival_that_the_budget_does_not_reach_is_a_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> Any:
        run.deadline = 0.0
        return rivals._scores

    monkeypatch.setattr(runs, "rivals", planted(slow=slow, late=lambda: pytest.fail("was begun")))
    rows = run.measure(small())
    assert all("not reached" in row["reason"] for row in rows if row["implementation"] in ("slow", "late"))
    assert {row["implementation"] for row in rows} >= {"slow", "late"}


def test_a_case_that_does_not_fit_is_a_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_free_memory", lambda device: 1000)
    rows = run.measure(small())
    assert {row["reason"] for row in rows} == {"needs about 0.0 GiB and 0.0 GiB are free"}


def test_peak_memory_is_what_is_held_at_once() -> None:
    x = torch.ones(1000)

    def two_at_a_time() -> Tensor:
        return (x * 2).mul(3).mul(4)  # the first is let go before the third comes

    assert clocks.CPUClocks().peak(clocks.calls(two_at_a_time)) in range(8000, 8100)
    held = clocks.calls_after(lambda: two_at_a_time)
    assert clocks.CPUClocks().peak(held) in range(8000, 8100)
    saved = clocks.calls_after(lambda: (lambda kept: lambda: kept + 1)(x * 2))  # what is made ready counts too
    assert clocks.CPUClocks().peak(saved) in range(8000, 8100)


def test_the_clocks_time_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "TURN", 0.0)
    order: list[str] = []
    works = {name: clocks.calls(lambda name=name: order.append(name)) for name in "ab"}
    timings = clocks.CPUClocks(rounds=4, case_seconds=60).alternate(works)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 4
    assert len(timings["a"]["wall"].rounds) == 4


def test_a_turn_is_as_long_where_the_first_call_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = 0.0, [5.0, *[clocks.TURN / 4] * 8]

    def call() -> None:
        nonlocal now
        now += taken.pop(0)

    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now)
    assert clocks.CPUClocks()._calls_of_a_turn(clocks.calls(call), None) == 4


def test_a_share_of_the_copy_is_taken_at_the_nearest_size() -> None:
    copies = [{"bytes": 100, "bytes_per_second": 10.0}, {"bytes": 10_000, "bytes_per_second": 5.0}]
    assert clocks.bandwidth_share(200, 40.0, copies) == 0.5
    assert clocks.bandwidth_share(9_000, 3_600.0, copies) == 0.5


class FakeCUDA:
    """What GPUClocks asks of torch.cuda, with a clock that a test can read: nothing here is a measurement."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(record=lambda: self.said.append("event"), elapsed_time=lambda end: 3.0)

    def synchronize(self) -> None:
        self.said.append("wait")

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(L2_cache_size=2**20)

    def current_device(self) -> int:
        return 0

    def memory_allocated(self) -> int:
        return 100

    def reset_peak_memory_stats(self) -> None:
        self.said.append("reset")

    def max_memory_allocated(self) -> int:
        return 164


def test_the_gpu_s_clocks_wait_flush_and_count_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, empty = FakeCUDA(), torch.empty
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    measured = clocks.GPUClocks(rounds=2, case_seconds=0)
    flushed = SimpleNamespace(zero_=lambda: cuda.said.append("flush"))
    measured.flushed = flushed
    work = clocks.calls(lambda: cuda.said.append("call"))
    found = measured.turn(work, 3)
    assert cuda.said == [
        *("wait", "call", "wait"),
        *("wait", "call", "call", "call", "wait"),
        *("wait", "flush", "event", "call", "event", "wait"),
    ]
    assert found["device"] == 3e-3 and set(found) == set(clocks.GPUClocks.descriptions)
    cuda.said.clear()
    assert measured.peak(work) == 64 and cuda.said == ["reset", "call"]


# `python -m benchmarks.ops`.

NOT_NEEDED = (
    *(
        "rich",
        "pytest",
        "transformers",
        "accelerate",
        "datasets",
        "safetensors",
        "tokenizers",
        "jsonargparse",
        "jinja2",
    ),
    *("matplotlib", "scipy", "sklearn", "rapidfuzz", "psutil", "liger_kernel", "cut_cross_entropy", "trl", "torchrl"),
)
RUNNER = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
del sys.argv[1]
runpy.run_module("benchmarks.ops", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def bare_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository that `benchmarks.ops` needs, at a commit, without what was built or installed."""
    folder = tmp_path_factory.mktemp("bare").resolve() / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "results", "kernels")
    for name in ("benchmarks", "tlcr"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tlcr" / "kernels").symlink_to("../kernels")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def run_ops(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """It with torch and triton alone; without compiling, which would take most of the test's time."""
    command = [sys.executable, "-c", RUNNER, ",".join(NOT_NEEDED), *arguments]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=checkout
    )


@pytest.mark.slow
def test_the_path_of_a_gpu_run_at_tiny_sizes(bare_checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_ops(bare_checkout, "--interpret", "--json", str(tmp_path / "ops.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ops.json").read_text())
    assert found["kind"] == "ops" and found["interpreted"] and found["machine"]["device"] == "cpu"
    assert found["commit"] == git(bare_checkout, "rev-parse", "HEAD")
    assert all("nothing about a GPU follows" in meaning for meaning in found["clocks"].values())
    assert {"call", "amortised"} == set(found["clocks"]) and found["copy_bandwidth"][0]["bytes"] == 2**17
    measured = {(row["op"], row["pass"], row["implementation"]) for row in found["rows"] if row["status"] == "measured"}
    for op in ("fused_gae", "fused_reward"):
        assert (op, "forward", "tlcr triton") in measured
    for which in ("forward", "backward", "both"):
        assert ("ppo_loss", which, "tlcr triton") in measured
        for op in ("score_tokens", "score_hidden"):
            assert (op, which, "tlcr reference") in measured and (op, which, "eager torch") in measured
    reasons = {row["implementation"]: row["reason"] for row in found["rows"] if row["status"] == "not run"}
    assert "runs on cuda tensors" in reasons["tlcr cuda"]
    assert "torchrl" in reasons["torchrl vec_gae"] and "liger" in reasons["Liger scaled cross-entropy"]


def test_a_gpu_run_without_a_gpu_is_refused(bare_checkout: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_ops(bare_checkout, "--device", "cuda")
    assert done.returncode == 1 and "torch sees no GPU" in done.stderr and "--interpret" in done.stderr
    done = run_ops(bare_checkout, "--device", "cuda", "--interpret")
    assert done.returncode == 2 and "leave out --device cuda" in done.stderr


def test_a_changed_checkout_is_refused_before_anything_is_measured(bare_checkout: Path, tmp_path: Path) -> None:
    changed = bare_checkout / "tlcr" / "changed.py"
    changed.touch()
    done = run_ops(bare_checkout, "--interpret", "--json", str(tmp_path / "ops.json"))
    changed.unlink()
    assert done.returncode == 1 and "changed.py" in done.stderr and "commit or stash" in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_the_version_of_tlcr_is_recorded() -> None:
    assert record.versions()["tlcr"] == tlcr.__version__


@pytest.mark.parametrize("options", [[], ["--no-launch"]])
def test_host_time_has_a_row_for_every_call(options: list[str]) -> None:
    if options:
        pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.host_time", "--rounds", "3", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    rows = dict(re.findall(r"^ (\S.*?) +[\d.]+ +([\d.]+) *$", printed, flags=re.MULTILINE))
    assert rows["torch.add"] == "1.0"
    wanted = {"fused_gae", "fused_reward", "ppo_loss", "ppo_loss, forward and backward"}
    assert wanted <= set(rows) and all(float(value) > 0 for value in rows.values())
    assert ("score_tokens" in rows) == (not options)

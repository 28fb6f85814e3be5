"""Two commits compared: the statistics by hand, what is refused, and a whole run over a made-up repository."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.clocks import CPUClocks
from benchmarks.compare import __main__ as command
from benchmarks.compare import cases, commits, process, ratios, rounds
from tlcr import ops

ROOT = Path(__file__).parents[2]

# ---- statistics


def test_the_ratio_and_its_interval_by_hand() -> None:
    base = [1.0, 2.0, 4.0] * 4  # each round as slow as it likes: only the ratio within it counts
    slower = [1.10, 1.02, 1.12, 1.04, 1.06, 1.08, 1.03, 1.11, 1.05, 1.07, 1.09, 1.01]
    (found,) = ratios.compare({"op": base}, {"op": [b * r for b, r in zip(base, slower, strict=True)]})
    assert found.ratio == pytest.approx(math.sqrt(1.06 * 1.07))
    # 12 signs: 2 or fewer on one side have 79 chances in 4096, 3 or fewer 299, of which 102.4 are allowed.
    assert found.interval == pytest.approx((1.03, 1.10))
    assert found.beyond_noise and found.verdict == "slower"


def test_faster_is_called_faster() -> None:
    (found,) = ratios.compare({"op": [1.0] * 8}, {"op": [0.5 + 0.01 * k for k in range(8)]})
    assert found.verdict == "faster" and found.interval[1] < 1


def test_one_disturbed_round_changes_nothing() -> None:
    head = [1.0 + 0.01 * (-1) ** k for k in range(12)]
    (quiet,) = ratios.compare({"op": [1.0] * 12}, {"op": head})
    (found,) = ratios.compare({"op": [1.0] * 12}, {"op": [100.0, *head[1:]]})
    assert found.ratio == pytest.approx(quiet.ratio) and found.verdict == "within the noise"


def test_a_commit_against_itself_is_within_the_noise() -> None:
    """Of 50 cases some 2 would be beyond intervals of 95%: over all cases none is."""
    generator = random.Random(0)

    def noise() -> dict[str, list[float]]:
        return {str(case): [generator.lognormvariate(0, 0.1) for _ in range(12)] for case in range(50)}

    found = ratios.compare(noise(), noise())
    assert not any(one.beyond_noise for one in found)
    assert any(not one.interval[0] <= 1 <= one.interval[1] for one in found)


def test_a_change_is_found_among_many_cases() -> None:
    generator = random.Random(1)
    sides = [{str(c): [generator.lognormvariate(0, 0.02) for _ in range(12)] for c in range(20)} for _ in range(2)]
    sides[1]["7"] = [1.2 * seconds for seconds in sides[1]["7"]]
    assert [one.case for one in ratios.compare(*sides) if one.beyond_noise] == ["7"]


def test_nothing_measured_is_nothing_found() -> None:
    assert ratios.compare({}, {}) == []


# ---- what is refused


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up checkout of two commits, whose tlcr takes one second and then two, with benchmarks that say so."""
    root = tmp_path / "made-up"
    (root / "tlcr").mkdir(parents=True)
    (root / "setup.py").write_text("from setuptools import setup; setup(name='tlcr', packages=['tlcr'])\n")
    (root / ".gitignore").write_text("build/\n*.egg-info/\n__pycache__/\n")
    git(root, "init", "-q", "-b", "main")
    for seconds in (1.0, 2.0):
        (root / "tlcr" / "__init__.py").write_text(f"SECONDS = {seconds}\n{'PPO = 3.0' if seconds > 1 else ''}\n")
        git(root, "add", "-A")
        git(root, "commit", "-qm", f"{seconds} seconds")
    package = tmp_path / "made-up benchmarks" / "benchmarks"
    for folder in (package, package / "compare", package / "ppo_step"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (package / "compare" / "cases.py").write_text(
        "import json, sys, tlcr; json.dump({'op': {'seconds': tlcr.SECONDS}}, open(sys.argv[1], 'w'))\n"
    )
    (package / "ppo_step" / "with_tlcr.py").write_text(
        "import json, sys, tlcr\n"
        "times = dict.fromkeys(('rollout', 'score', 'reward', 'update', 'total'), tlcr.PPO)\n"
        "rounds = [{'event': 'round', 'round': number, 'seconds': times} for number in (0, 1)]\n"
        "open(sys.argv[2], 'w').write(''.join(json.dumps(one) + '\\n' for one in rounds))\n"
    )
    monkeypatch.setattr(commits, "ROOT", root)
    shutil.copy(process.__file__, package / "compare")
    monkeypatch.setattr(rounds, "ROOT", package.parent)
    return root


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_an_unknown_revision_is_refused(repository: Path) -> None:
    for pair in (("nowhere", "HEAD"), ("HEAD", "nowhere"), ("--all", "HEAD")):
        with pytest.raises(SystemExit, match="is no revision"):
            commits.revisions(*pair)


def test_revisions_are_commits(repository: Path) -> None:
    base, head = commits.revisions("HEAD~1", "HEAD")
    assert (base.commit, head.commit) == (git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD"))
    git(repository, "-c", "tag.gpgsign=false", "tag", "-a", "v1", "-m", "one")
    assert commits.revisions("v1", "main")[0].commit == head.commit  # and not the tag's own name


def test_a_checkout_with_changes_is_refused_unless_asked_for(repository: Path) -> None:
    (repository / "new.py").touch()
    with pytest.raises(SystemExit, match=r"differs from HEAD.*--dirty.*\n.*new\.py"):
        commits.revisions("HEAD~1", "HEAD")
    assert commits.revisions("HEAD~1", "main")[1].commit  # a commit is a commit, whatever lies about
    _, head = commits.revisions("HEAD", "HEAD", dirty=True)
    assert head.dirty and "and changes" in str(head)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["HEAD", "--rounds", "5"], "at least 6"), (["HEAD", "main", "--dirty"], "leave out 'main'"), ([], "base")],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.arguments(arguments)
    assert said in capsys.readouterr().err


# ---- whole runs


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--rounds", "6"])
    command.main()


@pytest.mark.slow
def test_two_commits_are_built_timed_and_told_apart(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, result = tmp_path / "kept", tmp_path / "result.json"
    run(monkeypatch, "HEAD~1", "--folder", str(kept), "--json", str(result))
    told = capsys.readouterr().out
    assert "base runs WITHOUT compiled kernels" in told and "op: slower, 2.000 times base's time" in told
    assert "base did not run it: AttributeError" in " ".join(told.split())
    content = json.loads(result.read_text())
    assert content["seconds"] == {"base": {"op": [1.0] * 6}, "head": {"op": [2.0] * 6}}
    assert set(content["lacking"]["PPO round"]) == {"base"} and content["head"]["name"] == "HEAD"

    assert len(list(kept.iterdir())) == 2  # both commits, and nothing half-made
    with pytest.raises(SystemExit, match=r"more than 1\.2 times base's time: op"):
        run(monkeypatch, "HEAD~1", "--folder", str(kept), "--fail-above", "1.2", "--only", "op")
    assert "building" not in capsys.readouterr().out
    run(monkeypatch, "HEAD~1", "--folder", str(kept), "--fail-above", "3", "--only", "op")

    (repository / "tlcr" / "__init__.py").write_text("SECONDS = 0.5\n")
    run(monkeypatch, "HEAD~1", "--dirty", "--folder", str(kept), "--only", "op")
    assert "op: faster, 0.500 times base's time" in capsys.readouterr().out
    assert len(list(kept.iterdir())) == 2  # what is not committed is not kept
    assert git(repository, "worktree", "list").count("\n") == 0 and not (repository / "build").exists()


@pytest.mark.slow
def test_a_commit_that_cannot_be_built_leaves_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "setup.py").write_text("raise SystemExit('no compiler today')\n")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(SystemExit, match=r"(?s)building HEAD.* failed.*no compiler today"):
        run(monkeypatch, "HEAD", "--folder", str(tmp_path / "kept"))
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_sides_take_turns_in_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def one_round(folder: str, options: Any) -> dict[str, Any]:
        order.append(folder)
        return {"op": {"seconds": len(order)}}

    monkeypatch.setattr(rounds, "one_round", one_round)
    options = command.arguments(["HEAD", "--rounds", "6"])
    taken, lacking = rounds.alternate({"base": "b", "head": "h"}, options, Console(quiet=True))
    assert "".join(order) == "hb" + "bhhb" * 3 and lacking == {}
    assert taken["base"]["op"] == [3, 6, 7, 10, 11, 14]  # the first round is not counted


def test_an_interrupted_run_reports_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def one_round(folder: str, options: Any) -> dict[str, Any]:
        calls.append(folder)
        if len(calls) == 2 * 9:
            raise KeyboardInterrupt
        return {"op": {"seconds": 1.0}}

    monkeypatch.setattr(rounds, "one_round", one_round)
    options = command.arguments(["HEAD", "--rounds", "12"])
    taken, _ = rounds.alternate({"base": "b", "head": "h"}, options, Console(quiet=True))
    assert taken == {"base": {"op": [1.0] * 7}, "head": {"op": [1.0] * 7}}
    calls[:] = ["b"] * 14  # in the second round
    with pytest.raises(KeyboardInterrupt):
        rounds.alternate({"base": "b", "head": "h"}, options, Console(quiet=True))


@pytest.mark.parametrize("fails_in", [{*range(14)}, {5}])
def test_a_side_that_fails_lacks_the_case_and_its_phases(fails_in: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every round, or in one: what base took is compared with nothing."""
    ran = {"b": 0, "h": 0}

    def one_round(folder: str, options: Any) -> dict[str, Any]:
        number, ran[folder] = ran[folder], ran[folder] + 1
        if folder == "h" and number in fails_in:
            return {"op": {"seconds": 1.0}, rounds.PPO: {"reason": "no memory"}}
        return {name: {"seconds": 1.0} for name in ("op", rounds.PPO, f"{rounds.PPO}, rollout")}

    monkeypatch.setattr(rounds, "one_round", one_round)
    options = command.arguments(["HEAD", "--rounds", "12"])
    taken, lacking = rounds.alternate({"base": "b", "head": "h"}, options, Console(quiet=True))
    assert taken == {"base": {"op": [1.0] * 12}, "head": {"op": [1.0] * 12}}
    assert lacking == {rounds.PPO: {"head": "no memory"}}


# ---- what a round imports


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as pip leaves it, with a tlcr in which there is nothing."""
    folder = tmp_path / "installed"
    (folder / "tlcr").mkdir(parents=True)
    (folder / "tlcr" / "__init__.py").touch()
    return folder


MODULE = """
import importlib, sys
import benchmarks.compare, tlcr
print(benchmarks.compare.__file__, tlcr.__file__, *sys.argv[1:], sep="\\n")
for name in ("tlcr.there", "tlcr.ops", "tlcr._C"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""


def test_a_process_of_a_round_has_the_installed_tlcr_and_no_part_of_another(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that the installed tlcr lacks, where another tlcr is in the checkout, on the path and installed."""
    monkeypatch.chdir(ROOT)
    (installed / "tlcr" / "there.py").touch()
    (installed / "asked.py").write_text(MODULE)
    done = rounds.start("asked", "--an-argument", installed=installed, threads=1)
    assert done.returncode == 0, done.stderr
    ours, theirs, *rest = done.stdout.splitlines()
    assert Path(ours) == ROOT / "benchmarks" / "compare" / "__init__.py"
    assert Path(theirs) == installed / "tlcr" / "__init__.py"
    assert rest == ["--an-argument", "tlcr.ops", "tlcr._C"]


def test_a_commit_without_ops_ends_the_run(installed: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"(?s)timing the ops of installed failed.*cannot import name 'ops' from 'tlcr'"
    ):
        rounds.one_round(installed, command.arguments(["HEAD", "--only", "fused_gae"]))


@pytest.mark.slow
def test_a_commit_without_the_trainer_s_modules_lacks_its_rounds(installed: Path) -> None:
    found = rounds.one_round(installed, command.arguments(["HEAD", "--only", rounds.PPO]))
    assert set(found) == {rounds.PPO} and "ModuleNotFoundError: No module named 'tlcr." in found[rounds.PPO]["reason"]


# ---- the cases


@pytest.fixture(scope="module")
def clocks() -> Any:
    return CPUClocks(rounds=3, case_seconds=0.0)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [f"{case} {which}" for case in cases.CASES for which in case.passes]
    assert len(set(names)) == len(names) > 10
    assert {case.op for case in cases.CASES} == {
        "fused_reward",
        "fused_gae",
        "ppo_loss",
        "score_tokens",
        "score_hidden",
    }


def test_a_case_is_measured_by_the_seconds_of_its_passes(clocks: Any) -> None:
    found = cases.measure(cases.Case("ppo_loss", "", (2, 8), passes=("forward", "backward")), clocks, "cpu")
    assert list(found) == [f"ppo_loss (B=2 x T=8, float32, {which})" for which in ("forward", "backward")]
    assert all(result["seconds"] > 0 for result in found.values())


def test_what_a_commit_lacks_is_said(clocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ops, "ppo_loss")
    found = cases.measure(cases.Case("ppo_loss", "", (2, 8)), clocks, "cpu")
    assert len(found) == 3 and all("AttributeError" in result["reason"] for result in found.values())


def test_an_older_signature_is_said(clocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(rewards: Tensor, values: Tensor) -> Tensor:
        return rewards - values

    monkeypatch.setattr(ops, "fused_gae", older)
    (result,) = cases.measure(cases.Case("fused_gae", "", (2, 8), passes=("forward",)), clocks, "cpu").values()
    assert "TypeError" in result["reason"] and "unexpected keyword" in result["reason"]


def test_a_wrong_result_is_not_timed(clocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.fused_reward

    def wrong(*args: Any, impl: str, **options: Any) -> Tensor:
        return right(*args, impl=impl, **options) + (0.01 if impl == "auto" else 0)

    monkeypatch.setattr(ops, "fused_reward", wrong)
    (result,) = cases.measure(cases.Case("fused_reward", "", (2, 8), passes=("forward",)), clocks, "cpu").values()
    assert "relative error" in result["reason"] and "seconds" not in result


def test_another_tlcr_than_the_one_asked_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    given = ["--installed", tmp_path, "--device", "cpu", "--threads", "1", "--only", ""]
    monkeypatch.setattr(sys, "argv", ["cases", str(tmp_path / "result.json"), *map(str, given)])
    with pytest.raises(SystemExit, match="tlcr is imported from"):
        cases.main()
    assert torch.get_num_threads() == threads and not (tmp_path / "result.json").exists()

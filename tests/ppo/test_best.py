"""The best policy of a run: which evaluation wins, what is on the disk, and what survives a stop at any moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tlcr.config.schema import PPOConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.ppo.best import BestPolicy


class Policy:
    """Stands for what saves the policy: writes which one it is, and can fail on the way."""

    def __init__(self) -> None:
        self.update = 0
        self.saves = 0

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(self.update))
        self.saves += 1


def see(best: BestPolicy, policy: Policy, update: int, own_reward: float, kl: float, **others: float) -> None:
    policy.update = update
    best.consider(update, {"proxy_per_token": own_reward, "kl_per_token": kl, **others}, policy.save)


def on_disk(folder: Path) -> tuple[str, int]:
    return (folder / "policy" / "weights").read_text(), json.loads((folder / "best.json").read_text())["update"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "best"


def test_the_highest_own_reward_under_the_ceiling_is_kept(folder: Path) -> None:
    best, policy = BestPolicy(folder, max_kl=0.5), Policy()
    best.begin(resumed=False)
    assert best.metrics() == {"best_update": 0.0} and "none was evaluated" in str(best)
    kept = []
    for update, own_reward, kl in [(1, 0.9, 0.6), (2, 0.1, 0.2), (3, 0.3, 0.5), (4, 0.3, 0.1), (5, 0.8, 0.51)]:
        see(best, policy, update, own_reward, kl)
        kept.append(best.metrics()["best_update"])
    assert kept == [0, 2, 3, 3, 3] and policy.saves == 2
    assert on_disk(folder) == ("3", 3)
    record = json.loads((folder / "best.json").read_text())
    assert record["evaluation"] == {"proxy_per_token": 0.3, "kl_per_token": 0.5} and record["max_kl"] == 0.5
    assert "update 3" in str(best) and "at most 0.5 nats per token" in str(best)
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_without_a_ceiling_the_own_reward_alone_decides(folder: Path) -> None:
    best, policy = BestPolicy(folder, max_kl=None), Policy()
    best.begin(resumed=False)
    see(best, policy, 1, 0.3, 0.2)
    see(best, policy, 2, 0.4, 99.0)
    assert on_disk(folder) == ("2", 2) and "at any KL" in str(best)


def test_the_exact_kl_counts_where_there_is_one(folder: Path) -> None:
    best, policy = BestPolicy(folder, max_kl=0.5), Policy()
    best.begin(resumed=False)
    see(best, policy, 1, 0.3, 0.4, exact_kl_per_token=0.6)
    assert best.kept is None
    see(best, policy, 2, 0.3, 0.6, exact_kl_per_token=0.4)
    assert best.kept is not None and best.kept.kl == 0.4


def test_a_resumed_run_keeps_what_was_best_and_a_new_one_throws_it_away(folder: Path) -> None:
    first, policy = BestPolicy(folder, max_kl=0.5), Policy()
    first.begin(resumed=False)
    see(first, policy, 20, 0.3, 0.2)
    again = BestPolicy(folder, max_kl=0.5)
    again.begin(resumed=True)
    assert again.kept == first.kept
    see(again, policy, 30, 0.2, 0.3)  # worse than the one before the stop
    assert on_disk(folder) == ("20", 20)
    BestPolicy(folder, max_kl=0.5).begin(resumed=False)
    assert not folder.exists()


def test_a_resumed_run_logs_what_the_uninterrupted_one_does(folder: Path) -> None:
    """Stopped after update 4, it goes on from 2: at 3 the policy of 4, which is kept, is not yet there."""
    course = [(1, 0.2, 0.1), (2, 0.1, 0.1), (3, 0.3, 0.1), (4, 0.4, 0.1), (5, 0.3, 0.1)]
    best, policy = BestPolicy(folder, max_kl=0.5), Policy()
    best.begin(resumed=False)
    logged, states = [], []
    for evaluation in course:
        see(best, policy, *evaluation)
        logged.append(best.metrics()["best_update"])
        states.append(json.loads(json.dumps(best.state_dict())))
    assert logged == [1, 1, 3, 4, 4]
    again = BestPolicy(folder, max_kl=0.5)
    again.begin(resumed=True, state=states[1])
    assert again.metrics() == {"best_update": 1.0} and on_disk(folder) == ("4", 4)
    for evaluation, update in zip(course[2:], logged[2:], strict=True):
        see(again, policy, *evaluation)
        assert again.metrics() == {"best_update": update} and on_disk(folder) == ("4", 4)
    assert again.state_dict() == states[-1]
    lower = BestPolicy(folder, max_kl=0.05)
    lower.begin(resumed=True, state=states[1])
    assert lower.metrics() == {"best_update": 0.0}


@pytest.mark.parametrize("named", [False, True], ids=["while it is written", "before it has its name"])
def test_a_stop_while_a_policy_is_kept_loses_neither(folder: Path, named: bool) -> None:
    best, policy = BestPolicy(folder, max_kl=0.5), Policy()
    best.begin(resumed=False)
    see(best, policy, 10, 0.1, 0.2)
    policy.update = 20
    aside = folder.with_name("best.new")
    policy.save(aside / "policy")
    if named:
        record = {"update": 20, "own_reward_per_token": 0.4, "kl_per_token": 0.3}
        (aside / "best.json").write_text(json.dumps(record))
    resumed = BestPolicy(folder, max_kl=0.5)
    resumed.begin(resumed=True)
    assert on_disk(folder) == (("20", 20) if named else ("10", 10)) and not aside.exists()
    assert resumed.metrics() == {"best_update": 20.0 if named else 10.0}


def test_a_lower_ceiling_does_not_keep_what_is_above_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, policy = BestPolicy(folder, max_kl=0.5), Policy()
    first.begin(resumed=False)
    see(first, policy, 20, 0.3, 0.4)
    lower = BestPolicy(folder, max_kl=0.3)
    lower.begin(resumed=True)
    assert lower.kept is None and "above ppo.best_max_kl = 0.3" in caplog.text
    see(lower, policy, 30, 0.1, 0.2)
    assert on_disk(folder) == ("30", 30)


def test_a_score_of_a_whole_answer_is_not_divided_by_its_tokens(folder: Path) -> None:
    """Scores of -1 in 10 tokens and of -2 in 40, and then what earlier versions kept: by the token, the second wins."""
    best, policy = BestPolicy(folder, max_kl=None), Policy()
    best.begin(resumed=False)
    for update, score, tokens in [(1, -1.0, 10), (2, -2.0, 40)]:
        policy.update = update
        figures = {"proxy_per_token": score / tokens, "proxy_per_answer": score, "kl_per_token": 0.1}
        best.consider(update, figures, policy.save, per="answer")
    assert on_disk(folder) == ("1", 1) and "-1 per answer" in str(best)
    record = json.loads((folder / "best.json").read_text())
    assert record["own_reward_per_answer"] == -1.0 and "own_reward_per_token" not in record
    again = BestPolicy(folder, max_kl=None)
    again.begin(resumed=True)
    assert again.kept == best.kept
    record["own_reward_per_token"] = record.pop("own_reward_per_answer")
    (folder / "best.json").write_text(json.dumps(record))
    earlier = BestPolicy(folder, max_kl=None)
    earlier.begin(resumed=True, state={"reached": {"update": 1, "own_reward": -0.1, "kl": 0.1}})
    policy.update = 3
    earlier.consider(3, {"proxy_per_answer": -3.0, "kl_per_token": 0.1}, policy.save, per="answer")
    assert on_disk(folder) == ("3", 3) and earlier.metrics() == {"best_update": 3.0}


def test_what_cannot_be_chosen_by_is_refused(folder: Path) -> None:
    best = BestPolicy(folder, max_kl=0.5)
    with pytest.raises(ConfigError, match=r"the evaluation gave gold, wanted proxy_per_token and kl_per_token"):
        best.consider(1, {"gold": 1.0}, Policy().save)
    with pytest.raises(ConfigError, match=r"wanted proxy_per_answer and kl_per_token"):
        best.consider(1, {"proxy_per_token": 1.0, "kl_per_token": 0.1}, Policy().save, per="answer")
    with pytest.raises(ConfigError, match=r"set evaluate_every"):
        PPOConfig(keep_best=True)
    folder.mkdir()
    (folder / "best.json").write_text('{"update": 3}')
    with pytest.raises(CheckpointError, match=r"best\.json cannot be read"):
        best.begin(resumed=True)

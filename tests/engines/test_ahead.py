"""One step off: batches of weights that are one update old, sampled while the trainer works, and resumed exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import wait_none
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.engines.vllm_server import VLLM, serving
from tests.http_server import Reply
from tests.ppo.helpers import StopAt, Stopped, run_ppo, small_config, without_times
from tests.ppo.test_conversation import known_conversation
from tlcr.config.schema import RolloutConfig, RunConfig
from tlcr.engines import vllm_client
from tlcr.errors import BackendUnavailable, ConfigError
from tlcr.ppo.ahead import _of_json, _to_json
from tlcr.rewards.sources import CallableSource
from tlcr.training.metrics import read_metrics
from tlcr.types import RewardSignal, Rollout

LM = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "BACKOFF", wait_none())


def config(address: str, *, ahead: int = 1, **ppo: Any) -> RunConfig:
    cfg = small_config(updates=3, epochs=1, save_every=1, **ppo)
    return replace(cfg, rollout=replace(cfg.rollout, engine="server", server=(address,), ahead=ahead))


def figures(folder: Path) -> list[dict[str, float]]:
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]


class Watched(CallableSource):
    """A reward that keeps the prompts of each rollout, and waits in each for what it is given."""

    def __init__(self, wait: Callable[[int], object] = lambda _: None) -> None:
        super().__init__("tests.ppo.helpers:reward_low_ids")
        self.prompts: list[tuple[str, ...]] = []
        self.rollouts: list[Rollout] = []
        self.wait = wait

    def __call__(self, rollout: Rollout) -> RewardSignal:
        self.wait(len(self.rollouts))
        self.rollouts.append(rollout)
        return super().__call__(rollout)


def test_batches_are_one_update_old_and_of_the_same_prompts(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    seen = []
    for ahead in (0, 1):
        server, source = VLLM(tiny_causal_lm(seed=3)), Watched()
        with serving(server) as (address,):
            run_ppo(
                config(address, ahead=ahead),
                tiny_causal_lm,
                tiny_tokenizer,
                tmp_path / str(ahead),
                reward_source=source,
            )
        seen.append(source.rollouts)
        assert len(server.loaded) == (2 if ahead else 3)  # the first weights make the first two batches
    on_time, late = figures(tmp_path / "0"), figures(tmp_path / "1")
    assert [rollout.prompts for rollout in seen[0]] == [rollout.prompts for rollout in seen[1]]
    assert on_time[0] == late[0]
    assert all(row["mismatch/kl"] < 1e-8 for row in on_time) and late[0]["mismatch/kl"] < 1e-8
    assert all(row["mismatch/kl"] > 1e-6 for row in late[1:])
    # the second batch was drawn by the weights that the run began with, and the third was not
    assert worst(tiny_causal_lm(seed=1), seen[1][1]) < 1e-5 < worst(tiny_causal_lm(seed=1), seen[1][2])


def worst(policy: PreTrainedModel, rollout: Rollout) -> float:
    """How far the log-probabilities that answers were drawn with are from those of a policy."""
    assert rollout.engine_logprobs_BT is not None
    found = []
    for b, said_T in enumerate(rollout.engine_logprobs_BT):
        prompt = rollout.prompt_ids_BP[b][rollout.prompt_mask_BP[b]]
        answer = rollout.response_ids_BT[b][rollout.mask_BT[b]]
        with torch.no_grad():
            logprobs_LV = policy(torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
        own_T = logprobs_LV[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0]
        found.append(float((said_T[: len(answer)] - own_T).abs().max()))
    return max(found)


def test_servers_sample_while_the_trainer_works(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The reward of a round waits until the next one's prompts are asked for; the server waits for that reward."""
    asked, paid = threading.Event(), threading.Event()
    answered = 0

    def reply(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        nonlocal answered
        if path == "/v1/completions" and request["max_tokens"] == 6:  # no probe
            answered += 1
            if answered > 8:
                asked.set()
                assert paid.wait(30)
        return None

    def wait(number: int) -> None:
        if number == 0:
            assert asked.wait(30)
            paid.set()

    with serving(VLLM(tiny_causal_lm(seed=3), reply)) as (address,):
        run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path, reward_source=Watched(wait))
    assert len(figures(tmp_path)) == 3


def test_a_run_that_was_cut_goes_on_with_the_batch_that_was_sampled(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with serving(VLLM(tiny_causal_lm(seed=3)), VLLM(tiny_causal_lm(seed=4))) as (address, another):
        run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path / "whole")
        with pytest.raises(Stopped):
            run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", callbacks=[StopAt(2)])
        run_ppo(config(another), tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", resume=True)
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole") and len(figures(tmp_path / "cut")) == 3


@pytest.mark.slow
def test_servers_that_fail_ahead_lose_no_round_that_was_trained(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The batch of the third round fails: the second is trained and saved, and the third one's prompts come again."""
    broken, source = threading.Event(), Watched(lambda number: broken.set() if number == 0 else None)

    def reply(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        return Reply(b"", 500) if broken.is_set() and len(server.loaded) > 1 else None

    server = VLLM(tiny_causal_lm(seed=3), reply)
    with serving(server) as (address,):
        run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path / "whole", reward_source=(whole := Watched()))
        server.loaded.clear()
        with pytest.raises(BackendUnavailable, match=r"no server left of 1, .*status 500"):
            run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", reward_source=source)
        trained = len(figures(tmp_path / "cut"))
        assert trained == len(source.rollouts) and list((tmp_path / "cut" / "checkpoints").iterdir())
        server.fault = None
        run_ppo(config(address), tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", resume=True, reward_source=source)
    taken = [rollout.prompts for rollout in source.rollouts]
    assert [prompts for n, prompts in enumerate(taken) if n == 0 or prompts != taken[n - 1]] == [
        rollout.prompts for rollout in whole.rollouts
    ]
    assert len(figures(tmp_path / "cut")) == 3


def test_an_evaluation_waits_for_the_answers_that_are_under_way(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    open_requests: list[int] = []
    lock = threading.Lock()
    count = 0

    def reply(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        nonlocal count
        if path == "/v1/completions":
            with lock:
                count += 1
            threading.Event().wait(0.02)
            with lock:
                count -= 1
        return None

    def evaluate(actor_critic: Any, update: int) -> dict[str, float]:
        with lock:
            open_requests.append(count)
        return {"figure": 1.0}

    with serving(VLLM(tiny_causal_lm(seed=3), reply)) as (address,):
        cfg = config(address, evaluate_every=1)
        run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path, evaluate=evaluate)
    assert open_requests == [0] * 4


def test_the_batch_in_a_checkpoint_is_the_batch() -> None:
    """As JSON, to the last bit of its log-probabilities, with its messages."""
    rollout = known_conversation()
    logprobs_BT = torch.where(rollout.mask_BT, -torch.rand(rollout.mask_BT.shape), 0.0)
    width = int(rollout.read_BT.sum(1).max())
    read = _of_json(
        json.loads(json.dumps(_to_json(replace(rollout, engine_logprobs_BT=logprobs_BT)))), 98, torch.device("cpu")
    )
    assert torch.equal(read.engine_logprobs_BT, logprobs_BT[:, :width])  # type: ignore[arg-type]
    for name in ("response_ids_BT", "mask_BT", "messages_BT"):
        assert torch.equal(getattr(read, name), getattr(rollout, name)[:, :width])
    assert torch.equal(read.prompt_mask_BP, rollout.prompt_mask_BP) and torch.equal(read.ended_B, rollout.ended_B)
    assert torch.equal(read.prompt_ids_BP[read.prompt_mask_BP], rollout.prompt_ids_BP[rollout.prompt_mask_BP])
    assert (read.prompts, read.responses) == (rollout.prompts, rollout.responses)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "generate"}, "ahead is 1 with engine 'generate': .* nothing is gained; set ahead: 0"),
        ({"engine": "auto"}, "ahead is 1 with engine 'auto'"),
        ({"engine": "server", "server": ("http://a",), "correction": "none"}, "ahead is 1 with correction 'none'"),
    ],
)
def test_settings_that_gain_nothing_or_are_wrong_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RolloutConfig(ahead=1, **settings)

"""OpenRLHF: from the executor to the advantages; the real package, with stubs for what needs a GPU."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import stub

openrlhf = pytest.importorskip("openrlhf")
stub("deepspeed", "flash_attn", "vllm", "bitsandbytes")

import golden  # noqa: E402
import page  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from openrlhf.trainer import ppo_trainer, ppo_trainer_async  # noqa: E402
from openrlhf.trainer.ppo_utils import experience_maker  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # noqa: E402
from openrlhf.trainer.ray.vllm_engine import _load_agent_executor  # noqa: E402

from tlcr.errors import HostError  # noqa: E402
from tlcr.hosts import openrlhf as adaptor  # noqa: E402
from tlcr.hosts import openrlhf_agent  # noqa: E402
from tlcr.hosts.guard import require  # noqa: E402
from tlcr.hosts.remote import URL  # noqa: E402

GOLDEN = golden.load()
FULL = [(number, item) for number, item in enumerate(GOLDEN["items"]) if item["response_ids"]]
ESTIMATORS = ["gae", "reinforce", "reinforce_baseline", "rloo", "group_norm", "dr_grpo", "flash_reinforce"]

pytestmark = pytest.mark.usefixtures("address")


class Ids:
    """A tokenizer whose text is a list of ids: ``5 11 7``."""

    pad_token_id, bos_token_id, eos_token_id = golden.PAD, None, golden.EOS

    def __call__(self, text: str, **unused: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(50)}


class Decoding(Ids):
    """``Ids`` with the way back."""

    def decode(self, ids: list[int], **unused: Any) -> str:
        return " ".join(map(str, ids))


class Engine:
    """The place of a vLLM engine: it answers what it is told."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    async def generate(self, ids: list[int], parameters: Any, multi_modal_data: Any = None) -> Any:
        reason = "stop" if self.answer[-1:] == [golden.EOS] else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.answer, logprobs=None, finish_reason=reason)])


def ranges_of(item: dict[str, Any]) -> list[tuple[int, int]]:
    """The spans that the policy wrote, as OpenRLHF's multi-turn executor records them."""
    start, spans = len(item["prompt_ids"]), []
    for position, counts in enumerate(item["mask"]):
        if counts and spans and spans[-1][1] == start + position:
            spans[-1] = (spans[-1][0], start + position + 1)
        elif counts:
            spans.append((start + position, start + position + 1))
    return spans


class Turns(openrlhf_agent.AgentExecutorBase):
    """The place of an executor of several turns: tokens of tools stand between those of the policy."""

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = item

    async def execute(self, prompt: Any, label: Any, *unused: Any) -> dict[str, Any]:
        item = self.item
        tokens = item["prompt_ids"] + item["response_ids"]
        # OpenRLHF reads the prompt up to the first action: a tool that speaks first belongs to it.
        return {
            "prompt": prompt,
            "label": label,
            "reward": 0.25,
            "scores": 0.25,
            "observation_tokens": tokens,
            "action_ranges": ranges_of(item),
            "rollout_log_probs": None,
            "truncated": False,
            "extra_logs": {"turns": 2.0},
        }


class TurnsPaid(openrlhf_agent.TokenRewards, Turns):
    pass


def respond(item: dict[str, Any], max_length: int = 64) -> dict[str, Any]:
    executor = _load_agent_executor(openrlhf_agent.__file__)
    prompt = " ".join(map(str, item["prompt_ids"]))
    parameters = SimpleNamespace(max_tokens=32, logprobs=None)
    engine = Engine(item["response_ids"])
    result: dict[str, Any] = asyncio.run(executor.execute(prompt, "", parameters, max_length, Ids(), engine))
    return result


def experience(response: dict[str, Any], number: int, max_length: int = 64) -> Experience:
    made = SamplesGenerator._process_response_into_experience(None, response, max_len=max_length)
    made.index = [number]
    return made


def batch_of(items: list[dict[str, Any]]) -> Experience:
    rows = [
        experience(asyncio.run(TurnsPaid(item).execute("", "", None, 64, None, None)), i)
        for i, item in enumerate(items)
    ]
    return Experience.concat_experiences(rows, golden.PAD)


def maker(estimator: str, answers: int = 1) -> adaptor.TokenRewardExperienceMaker:
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=True)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=answers),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    strategy = SimpleNamespace(args=args)
    return adaptor.TokenRewardExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, Ids())


def expected_rows(items: list[dict[str, Any]]) -> torch.Tensor:
    rows = [[0.0] * (len(item["prompt_ids"]) - 1) + item["rewards"] for item in items]
    return torch.tensor(golden.padded(rows))


class Asking(openrlhf_agent.AgentExecutor):
    """The single-turn executor with a reward server of the user's own, which answers ``says``."""

    def __init__(self, says: Any) -> None:
        super().__init__("http://mine")
        self.says = says

    async def _fetch_rewards_via_http(self, *unused: Any) -> Any:
        if isinstance(self.says, Exception):
            raise self.says
        return [self.says]


def test_a_reward_that_openrlhf_asks_for_is_the_outcome() -> None:
    item = GOLDEN["items"][0]
    prompt = " ".join(map(str, item["prompt_ids"]))
    given = (prompt, "", SimpleNamespace(max_tokens=32, logprobs=None), 64, Decoding(), Engine(item["response_ids"]))
    response = asyncio.run(Asking({"rewards": 0.5}).execute(*given))
    assert response["extra_logs"][openrlhf_agent.OUTCOME] == 0.5
    for broken in (OSError("gone"), None, {"other": 1.0}):
        with pytest.raises(HostError, match="executor got no reward from http://mine"):
            asyncio.run(Asking(broken).execute(*given))


def test_every_private_name_is_there() -> None:
    require("OpenRLHF", "openrlhf", adaptor.TESTED, adaptor.NAMES)


def test_each_reward_stands_at_the_action_that_emits_its_token() -> None:
    """A single turn: OpenRLHF's own executor samples, its own code makes the experience."""
    for number, item in FULL:
        if all(item["mask"]):
            response = respond(item)
            made = experience(response, number)
            expected = torch.tensor(GOLDEN["hosts"]["openrlhf"]["token_rewards_BA"][number])
            width = made.action_mask.shape[1]
            torch.testing.assert_close(made.info[openrlhf_agent.REWARDS][0], expected[:width])
            assert not expected[width:].any()
            assert (
                response["reward"] == response["scores"] == pytest.approx(sum(item["rewards"]) / len(item["rewards"]))
            )


def test_tokens_of_tools_are_paid_nothing() -> None:
    item = GOLDEN["items"][2]
    merged = batch_of([item])
    torch.testing.assert_close(merged.info[openrlhf_agent.REWARDS], expected_rows([item]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_sees_them(estimator: str) -> None:
    """The tensor that the estimator reads is the golden one, the outcome (0.25) at the last action among it."""
    if estimator not in inspect.getsource(experience_maker):
        pytest.skip(f"this OpenRLHF has no {estimator}")
    items = [GOLDEN["items"][number] for number in (0, 1, 2)]
    merged = batch_of(items)
    rewards_BA = expected_rows(items)
    merged.kl, merged.values = torch.zeros_like(rewards_BA), torch.zeros_like(rewards_BA)
    ours = maker(estimator, answers=3)
    seen = []
    for name in ("get_advantages_and_returns", "get_cumulative_returns"):
        theirs = getattr(ours, name)

        def watch(*args: Any, theirs: Any = theirs) -> Any:
            seen.append(args[1] if len(args) == 5 else args[0])
            return theirs(*args)

        setattr(ours, name, watch)
    last_B = merged.action_mask.long().cumsum(1).argmax(1)
    outcome = {"gae": 0.25, "reinforce": 0.25}.get(estimator, 0.0)  # others subtract a baseline, and all have the same
    (found,) = ours.compute_advantages_and_returns([merged])
    expected = rewards_BA.clone()
    expected[torch.arange(3), last_B] += outcome
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)
    returns = expected.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found.returns, returns, atol=1e-6, rtol=1e-6)
    assert openrlhf_agent.REWARDS not in found.info and openrlhf_agent.OUTCOME not in found.info
    assert experience_maker.compute_reward.__module__ == "openrlhf.models.utils"


def test_rloo_compares_outcomes() -> None:
    items = [GOLDEN["items"][0], GOLDEN["items"][1]]
    merged = batch_of(items)
    merged.info[openrlhf_agent.OUTCOME] = torch.tensor([1.0, 0.0])
    rewards_BA = expected_rows(items)
    merged.kl = torch.zeros_like(rewards_BA)
    (found,) = maker("rloo", answers=2).compute_advantages_and_returns([merged])
    torch.testing.assert_close(found.returns[:, 0], rewards_BA.sum(1) + torch.tensor([1.0, -1.0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shift_by_one_action_is_caught(shift: int) -> None:
    merged = batch_of([GOLDEN["items"][0], GOLDEN["items"][2]])
    merged.info[openrlhf_agent.REWARDS] = merged.info[openrlhf_agent.REWARDS].roll(shift, dims=1)
    merged.kl = torch.zeros(merged.action_mask.shape)
    with pytest.raises(HostError, match="rewards stand where OpenRLHF has no action"):
        maker("reinforce").compute_advantages_and_returns([merged])


def test_rewards_survive_batching() -> None:
    """Merged with a longer answer they are padded as OpenRLHF pads its own actions."""
    items = [GOLDEN["items"][number] for number in (0, 1, 2)]
    merged = batch_of(items)
    assert merged.info[openrlhf_agent.REWARDS].shape == merged.action_mask.shape
    torch.testing.assert_close(merged.info[openrlhf_agent.REWARDS], expected_rows(items))


def test_an_answer_that_openrlhf_cuts() -> None:
    item = GOLDEN["items"][1]
    response = respond(item, max_length=64)
    response["extra_logs"][openrlhf_agent.REWARDS] = response["extra_logs"][openrlhf_agent.REWARDS][:7]
    made = experience(response, 0, max_length=8)
    assert made.info[openrlhf_agent.REWARDS].shape == made.action_mask.shape == (1, 7)


def test_an_experience_that_was_not_scored() -> None:
    merged = batch_of([GOLDEN["items"][0]])
    del merged.info[openrlhf_agent.REWARDS]
    with pytest.raises(HostError, match=r"run it by 'python -m tlcr.hosts.openrlhf'"):
        maker("reinforce").compute_advantages_and_returns([merged])


def test_an_answer_without_tokens() -> None:
    with pytest.raises(HostError, match="sampled 0 tokens after a prompt of 6"):
        respond(GOLDEN["items"][3])


@pytest.mark.parametrize(("wrong", "says"), [("nan", "nan"), ("short", "5 tokens and 4 rewards")])
def test_rewards_that_are_none_end_the_run(server: Any, monkeypatch: pytest.MonkeyPatch, wrong: str, says: str) -> None:
    monkeypatch.setattr(server, "wrong", wrong)
    with pytest.raises(HostError, match=says):
        respond(GOLDEN["items"][0])


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://127.0.0.1:9")
    with pytest.raises(HostError, match="cannot be reached"):
        respond(GOLDEN["items"][0])


def test_baselines_of_whole_answers_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    adaptor.logger.addHandler(caplog.handler)
    maker("rloo")
    maker("gae")
    assert caplog.text.count("rewards of tokens stay uncentred") == 1


def test_the_launcher_puts_both_halves_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenRLHF's command would start: its trainer class, whose process builds our experience maker."""
    ran = []
    monkeypatch.setattr("sys.argv", ["x"])
    for module, name in ((ppo_trainer, "PPOTrainer"), (ppo_trainer_async, "PPOTrainerAsync")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(adaptor.runpy, "run_module", lambda name, **kw: ran.append((name, list(adaptor.sys.argv))))
    adaptor.launch(["--actor.model_name_or_path", "m"])
    (name, argv) = ran[0]
    assert name == "openrlhf.cli.train_ppo_ray"
    assert argv[-2:] == ["--train.agent_func_path", openrlhf_agent.__file__]
    adaptor.launch(["--train.agent_func_path=mine.py"])
    assert ran[1][1][1:] == ["--train.agent_func_path=mine.py"]
    for flag in adaptor.UNHEARD:
        for given in ([flag, "x"], [f"{flag}=x"], [flag[:-3], "x"], ["--train.agent_func_path", "mine.py", flag, "x"]):
            with pytest.raises(HostError, match=f"does not ask what {flag} names where an agent gives the rewards"):
                adaptor.launch(given)
    assert len(ran) == 2
    assert issubclass(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class, ppo_trainer.BasePPOTrainer)


def test_the_command_of_the_page_is_openrlhfs() -> None:
    (command,) = page.modules("openrlhf")
    found = find_spec(command)
    assert found is not None and found.origin is not None
    source, flags = Path(found.origin).read_text(encoding="utf-8"), page.flags("openrlhf")
    assert len(flags) > 5 and [flag for flag in flags if f'"--{flag}"' not in source] == []


def test_openrlhfs_own_command_hands_both_halves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's command, up to where Ray would start processes on GPUs: OpenRLHF reads its flags and calls ours."""
    from openrlhf import utils
    from openrlhf.trainer import ray as of_ray
    from openrlhf.trainer.ray import launcher, ppo_actor, ppo_critic  # noqa: F401  (before ray.remote is replaced)

    seen: dict[str, Any] = {}

    class Group:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: []

    class Remote:
        """``ray.remote`` of a class, whose methods say that they were called."""

        def __init__(self, cls: type) -> None:
            self.cls, self.__ray_metadata__ = cls, SimpleNamespace(modified_class=cls)

        def remote(self, *args: Any, **kwargs: Any) -> Any:
            seen.update(trainer=self.cls, model=args[0], engines=args[6])
            calls = {
                name: SimpleNamespace(remote=lambda name=name: seen.update({name: True}))
                for name in ("get_max_steps", "fit")
            }
            return SimpleNamespace(**calls)

    def engines(*args: Any, agent_func_path: str, remote_rm_url: list[str], **kwargs: Any) -> list[str]:
        seen.update(agent=agent_func_path, url=remote_rm_url)
        return ["engine"]

    for module, name in ((ppo_trainer, "PPOTrainer"), (ppo_trainer_async, "PPOTrainerAsync")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(ray, "remote", Remote)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", lambda found: found)
    monkeypatch.setattr(of_ray, "create_vllm_engines", engines)
    monkeypatch.setattr(launcher, "RayActorGroup", Group)
    monkeypatch.setattr(utils, "get_strategy", lambda args: SimpleNamespace(print=lambda args: seen.update(args=args)))
    flags = ["--actor.model_name_or_path", "MODEL", "--data.prompt_dataset", "DATA", "--vllm.num_engines", "1"]
    adaptor.launch([*flags, "--algo.advantage.estimator", "gae", "--logger.tensorboard_dir", "curves"])
    assert issubclass(seen["trainer"], ppo_trainer.BasePPOTrainer) and seen["trainer"].__name__ == "PPOTrainer"
    assert (seen["model"], seen["engines"], seen["agent"]) == ("MODEL", ["engine"], openrlhf_agent.__file__)
    assert seen["url"] == ["agent"] and seen["args"].critic.model_name_or_path == "MODEL"  # the critic of gae
    assert seen["get_max_steps"] and seen["fit"]


def test_the_trainers_process_builds_ours(start_ray: Callable[..., None]) -> None:
    """Ray runs OpenRLHF's actor class, subclassed: its constructor meets our name."""

    @ray.remote
    class Theirs:
        def __init__(self) -> None:
            from openrlhf.trainer import ppo_trainer

            self.made = ppo_trainer.RemoteExperienceMaker.__name__

        def name(self) -> str:
            return self.made

    import conftest

    setup = {
        "env_vars": {"PYTHONPATH": f"{conftest.__file__.rpartition('/')[0]}"},
        "worker_process_setup_hook": _stubbed,
    }
    ray.cloudpickle.register_pickle_by_value(sys.modules[_stubbed.__module__])
    start_ray(num_cpus=2, runtime_env=setup)
    assert ray.get(adaptor.paying(Theirs).remote().name.remote()) == "TokenRewardExperienceMaker"


def _stubbed() -> None:
    from stubs import stub

    stub("deepspeed", "flash_attn", "vllm", "bitsandbytes")

"""verl: from an agent loop, or a discriminator that verl serves, to the estimator; the real package, with Ray."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

verl = pytest.importorskip("verl")

import golden  # noqa: E402
import numpy as np  # noqa: E402
import page  # noqa: E402
import torch  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls  # noqa: E402

from tlcr.errors import HostError  # noqa: E402
from tlcr.hosts import verl_plugin  # noqa: E402
from tlcr.hosts.guard import require  # noqa: E402
from tlcr.hosts.remote import TRIES, URL  # noqa: E402
from tlcr.hosts.verl import (  # noqa: E402
    DenseOutput,
    TokenRewardManager,
    _TokenRewards,
    group_advantages,
)

GOLDEN = golden.load()
EXPECTED = GOLDEN["hosts"]["verl"]
FULL = [item for item in GOLDEN["items"] if item["response_ids"]]


def output_of(item: dict[str, Any]) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=item["prompt_ids"],
        response_ids=item["response_ids"],
        response_mask=item["mask"],
        metrics=AgentLoopMetrics(),
        num_turns=2,
    )


class Replaying(AgentLoopBase):
    """The place of verl's loop: it answers what it is told."""

    def __init__(self, config: Any, item: dict[str, Any]) -> None:
        self.config, self.item, self.tokenizer = config, item, None

    async def run(self, sampling_params: Any, **kwargs: Any) -> AgentLoopOutput:
        return output_of(self.item)


class Loop(_TokenRewards, Replaying):
    pass


def scored(item: dict[str, Any], **options: Any) -> DenseOutput:
    loop = Loop({"tlcr": options}, item)
    result: DenseOutput = asyncio.run(loop.run({}))
    return result


def padded_batch(rm_scores: list[torch.Tensor]) -> DataProto:
    """What V1 gives its estimators: the rows of the queue, padded on the right."""
    masks = [torch.tensor(item["mask"]) for item in FULL]
    pad = torch.nn.utils.rnn.pad_sequence
    tensors = {
        "token_level_rewards": pad(rm_scores, batch_first=True),
        "response_mask": pad(masks, batch_first=True),
    }
    uids = np.array(
        [f"prompt-{group}" for group, item in zip(GOLDEN["group"], GOLDEN["items"], strict=True) if item["mask"]]
    )
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids.astype(object)})


def test_every_private_name_is_there() -> None:
    require("verl", "verl", verl_plugin.TESTED, verl_plugin.NAMES)


def test_importing_verl_registers_all_three() -> None:
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    assert _agent_loop_registry["tlcr_single_turn"]["_target_"] == "tlcr.hosts.verl.TokenRewardSingleTurn"
    assert _agent_loop_registry["tlcr_tools"]["_target_"] == "tlcr.hosts.verl.TokenRewardTools"
    assert get_reward_manager_cls("tlcr") is TokenRewardManager
    assert get_adv_estimator_fn("tlcr_group") is group_advantages


def test_rm_scores_are_the_golden_ones(server: Any) -> None:
    for item, expected in zip(GOLDEN["items"], EXPECTED["rm_scores"], strict=True):
        if expected:
            fields = scored(item, url=server.url).as_dict()
            torch.testing.assert_close(fields["rm_scores"], torch.tensor(expected))
            assert fields["rm_scores"].shape == fields["response_mask"].shape == fields["responses"].shape
            assert "token_rewards" not in fields and "with_outcome" not in fields


def test_a_shift_by_one_token_is_caught(server: Any) -> None:
    shifted = golden.GoldenScorer(shift=1)
    for item, expected in zip(GOLDEN["items"], EXPECTED["rm_scores"], strict=True):
        if len(expected) > 1:
            loop = Loop({"tlcr": {"url": server.url}}, item)
            loop.scorer = shifted
            found = asyncio.run(loop.run({})).as_dict()["rm_scores"]
            assert not torch.allclose(found, torch.tensor(expected), atol=1e-3)


def test_verls_own_reward_is_added_at_the_last_token(server: Any) -> None:
    output = scored(GOLDEN["items"][0], url=server.url, with_outcome=True, scale=0.5)
    assert output.reward_score is None  # so verl asks its reward loop, and writes:
    output.reward_score = 2.0
    expected = torch.tensor(EXPECTED["rm_scores"][0]) * 0.5
    expected[-1] += 2.0
    torch.testing.assert_close(output.as_dict()["rm_scores"], expected)


def test_figures_of_the_answer_reach_verls_validation(server: Any) -> None:
    figures = scored(GOLDEN["items"][2], url=server.url).extra_fields["reward_extra_info"]
    rewards = GOLDEN["items"][2]["rewards"]
    assert figures["reward/mean_token"] == pytest.approx(sum(rewards) / 4)
    assert figures["reward/masked_paid"] == 0


def test_the_mean_instead_of_a_sum(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    item = GOLDEN["items"][2]
    loop = Loop({"tlcr": {"url": server.url, "mean": True}, "algorithm": {"adv_estimator": "grpo"}}, item)
    assert "pays for length" not in caplog.text
    found = asyncio.run(loop.run({})).as_dict()["rm_scores"]
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0, 0, sum(item["rewards"]) / 4]))
    Loop({"tlcr": {"url": server.url}, "algorithm": {"adv_estimator": "grpo"}}, item)
    assert "verl's estimator 'grpo' adds the rewards" in caplog.text


def test_an_unknown_option() -> None:
    with pytest.raises(HostError, match=r"no tlcr.ulr"):
        Loop({"tlcr": {"ulr": "http://127.0.0.1:1"}}, GOLDEN["items"][0])


def test_an_answer_without_tokens_is_refused(server: Any) -> None:
    with pytest.raises(HostError, match="an answer without a token"):
        scored(GOLDEN["items"][3], url=server.url)


def test_an_answer_that_changed_after_scoring_is_refused(server: Any) -> None:
    output = scored(GOLDEN["items"][0], url=server.url)
    output.response_ids, output.response_mask = output.response_ids[:-1], output.response_mask[:-1]
    with pytest.raises(HostError, match="4 tokens and 5 rewards"):
        output.as_dict()


def test_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL, raising=False)
    with pytest.raises(HostError, match=r"set \+tlcr.url in verl's config or TLCR_REWARD_URL"):
        Loop({}, GOLDEN["items"][0])


@pytest.mark.parametrize(("wrong", "says"), [("nan", "nan"), ("short", "5 tokens and 4 rewards")])
def test_rewards_that_are_none(server: Any, wrong: str, says: str) -> None:
    server.wrong = wrong
    try:
        with pytest.raises(HostError, match=says):
            scored(GOLDEN["items"][0], url=server.url)
    finally:
        server.wrong = ""


def test_estimators_of_verl_see_dense_rewards(server: Any) -> None:
    rows = [scored(item, url=server.url).as_dict()["rm_scores"] for item in FULL]
    batch = compute_advantage(
        padded_batch(rows), adv_estimator="tlcr_group", config={"gamma": 1.0, "tlcr": {"baseline": "position"}}
    )
    mask_BT = batch.batch["response_mask"]
    found_BT = batch.batch["advantages"]
    group = [group for group, item in zip(GOLDEN["group"], GOLDEN["items"], strict=True) if item["mask"]]
    expected = golden.centred_to_go([item["rewards"] for item in FULL], [item["mask"] for item in FULL], group)
    torch.testing.assert_close(found_BT, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert bool((found_BT[mask_BT == 0] == 0).all())

    values_BT = torch.zeros_like(found_BT)
    dense = padded_batch(rows)
    dense.batch["values"] = values_BT
    config = SimpleNamespace(get=lambda name, default=None: default)
    gae = compute_advantage(dense, adv_estimator="gae", gamma=1.0, lam=1.0, config=config)
    returns = golden.padded([golden.to_go(item["rewards"]) for item in FULL])
    counted = mask_BT.bool()
    torch.testing.assert_close(gae.batch["returns"][counted], torch.tensor(returns)[counted], atol=1e-5, rtol=1e-5)


def test_an_unknown_option_of_the_estimator() -> None:
    rewards_BT = torch.zeros(2, 3)
    with pytest.raises(HostError, match="no option 'normalize'"):
        group_advantages(rewards_BT, torch.ones(2, 3), {"tlcr": {"normalize": "batch"}}, ["a", "a"])


# ---- a discriminator that verl serves


def config_of(**changes: bool) -> Any:
    model = SimpleNamespace(enable=True, enable_resource_pool=False, model_path="discriminator")
    for name in ("enable", "enable_resource_pool"):
        setattr(model, name, changes.get(name, getattr(model, name)))
    multi_turn = SimpleNamespace(enable=changes.get("multi_turn", False))
    rollout = SimpleNamespace(multi_turn=multi_turn)
    return SimpleNamespace(
        reward=SimpleNamespace(reward_model=model), actor_rollout_ref=SimpleNamespace(rollout=rollout)
    )


class Words:
    def __init__(self, size: int = 50) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self.size)}


def test_the_manager_lays_rewards_on_the_tokens(server: Any) -> None:
    """Prompts padded on either side: V1 pads both on the right."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    manager = TokenRewardManager(config_of(), Words(), None, server.url.removeprefix("http://"), Words())
    unmasked = [server.rewards[tuple(i["prompt_ids"]), tuple(i["response_ids"])] for i in GOLDEN["items"]]
    for left in (False, True):
        pad = golden.padded
        prompts = torch.tensor(pad([i["prompt_ids"] for i in GOLDEN["items"]], left=left)).long()
        masks = torch.tensor(pad([[1] * len(i["prompt_ids"]) for i in GOLDEN["items"]], left=left)).long()
        answers = torch.tensor(pad([i["response_ids"] for i in GOLDEN["items"]])).long()
        answer_masks = torch.tensor(pad([[1] * len(i["response_ids"]) for i in GOLDEN["items"]])).long()
        tensors = {"prompts": prompts, "responses": answers, "attention_mask": torch.cat([masks, answer_masks], 1)}
        data = DataProto.from_dict(tensors=tensors)
        scores = [asyncio.run(manager.run_single(data[i : i + 1]))["reward_score"] for i in range(len(data))]
        found = TokenRewardManager.assemble_rm_scores(data, scores)
        torch.testing.assert_close(found, torch.tensor(pad(unmasked)))
        with pytest.raises(HostError, match="5 tokens and 4 rewards"):
            TokenRewardManager.assemble_rm_scores(data, [scores[0][1:], *scores[1:]])


def test_the_manager_asks_through_verls_own_router(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of a vLLM verl puts a process that passes requests on; the temperature is that of the folder."""
    from verl.experimental.reward_loop.router.naive_router import launch_router_process

    asyncio.set_event_loop(asyncio.new_event_loop())
    (tmp_path / "config.json").write_text(json.dumps({"tlcr_temperature": golden.TEMPERATURE}), encoding="utf-8")
    monkeypatch.setattr(server, "vllm", str(tmp_path))
    monkeypatch.delenv(TRIES, raising=False)  # the router takes a while to start
    address, router = launch_router_process([server.url])
    try:
        manager = TokenRewardManager(config_of(), Words(), None, address, Words())
        assert manager.scorer.info()["server"] == "vllm"
        for item in FULL:
            ids, answer = torch.tensor([item["prompt_ids"]]), torch.tensor([item["response_ids"]])
            tensors = {
                "prompts": ids,
                "responses": answer,
                "attention_mask": torch.ones(1, len(ids[0]) + len(answer[0])),
            }
            found = asyncio.run(manager.run_single(DataProto.from_dict(tensors=tensors)))["reward_score"]
            expected = server.rewards[tuple(item["prompt_ids"]), tuple(item["response_ids"])]
            assert found == pytest.approx(expected, abs=1e-9)
            assert len(found) == 1 or found[1:] != pytest.approx(expected[:-1], abs=1e-6)
    finally:
        router.terminate()
        router.join(60)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"enable": False}, "take one number an answer"),
        ({"enable_resource_pool": True}, "take one number an answer"),
        ({"multi_turn": True}, "use the agent loop tlcr_tools"),
    ],
)
def test_configs_in_which_verl_would_drop_rewards(changes: dict[str, bool], says: str) -> None:
    asyncio.set_event_loop(asyncio.new_event_loop())
    with pytest.raises(HostError, match=says):
        TokenRewardManager(config_of(**changes), Words(), None, "127.0.0.1:1", Words())


def test_a_discriminator_that_vllm_reads_otherwise(tmp_path: Path) -> None:
    asyncio.set_event_loop(asyncio.new_event_loop())
    (tmp_path / "config.json").write_text(json.dumps({"tlcr_bidirectional_layers": 2}), encoding="utf-8")
    config = config_of()
    config.reward.reward_model.model_path = str(tmp_path)
    with pytest.raises(HostError, match=r"the top 2 layers of .* are bidirectional"):
        TokenRewardManager(config, Words(), None, "127.0.0.1:1", Words())


def test_two_tokenizers() -> None:
    asyncio.set_event_loop(asyncio.new_event_loop())
    with pytest.raises(HostError, match="do not share a tokenizer"):
        TokenRewardManager(config_of(), Words(), None, "127.0.0.1:1", Words(51))


# ---- the whole way, with Ray and verl's queue


class Engine:
    """The place of verl's inference servers: to a known prompt the golden answers, one after the other."""

    def __init__(self) -> None:
        self.answers: dict[tuple[int, ...], list[list[int]]] = {}
        for item in GOLDEN["items"]:
            self.answers.setdefault(tuple(item["prompt_ids"]), []).append(item["response_ids"])

    async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        answers = self.answers[tuple(prompt_ids)]
        answers.append(answers.pop(0))
        return TokenOutput(token_ids=answers[-1])


def model_folder(folder: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(50)}, unk_token="t01"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", eos_token="t02", unk_token="t01")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaConfig(vocab_size=50, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(folder)
    return str(folder)


def verl_config(folder: str, url: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"actor_rollout_ref.model.path={folder}",
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.n=2",
                "actor_rollout_ref.rollout.prompt_length=8",
                "actor_rollout_ref.rollout.response_length=8",
                "actor_rollout_ref.rollout.agent.num_workers=1",
                "actor_rollout_ref.rollout.agent.default_agent_loop=tlcr_single_turn",
                "algorithm.adv_estimator=tlcr_group",
                "+algorithm.tlcr.normalise=none",
                "transfer_queue.enable=true",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
                f"+tlcr.url={url}",
            ],
        )


def test_the_yaml_of_the_page_is_a_config_of_verl(tmp_path: Path) -> None:
    """What docs/hosts/verl.md has users paste, composed as verl's command composes it."""
    from hydra import compose, initialize_config_dir

    text = (page.FOLDER / "verl.md").read_text(encoding="utf-8")
    pasted, served = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(pasted + served, encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("mine")
    assert config.trainer.use_v1 and config.algorithm.adv_estimator == "tlcr_group"
    assert config.tlcr.url == "http://localhost:8765" and config.algorithm.tlcr.normalise == "none"
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "tlcr_single_turn"
    assert resolve_reward_manager_cls(config) is TokenRewardManager
    assert get_custom_reward_fn(config) is not None
    assert config.get("no such key") is None  # as a config without tlcr's options is read
    (command,) = page.modules("verl")
    assert find_spec(command) is not None


def sample(manager: Any, prompts: list[int], step: int) -> dict[str, Any]:
    """Has verl sample answers to some prompts; returns the status of each, and the queue's rows of what succeeded."""
    import transfer_queue as tq
    from tensordict import NonTensorData, NonTensorStack, TensorDict

    content = [" ".join(f"t{i:02}" for i in golden.PROMPTS[prompt]) for prompt in prompts]
    uids = [f"step{step}prompt{prompt}" for prompt in prompts]
    batch = TensorDict(
        {
            "raw_prompt": NonTensorStack(*[NonTensorData([{"role": "user", "content": text}]) for text in content]),
            "uid": NonTensorStack(*[NonTensorData(uid) for uid in uids]),
            "index": torch.arange(len(prompts)),
            "global_steps": NonTensorData(step),
        },
        batch_size=len(prompts),
    )
    manager.generate_sequences(batch)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        tags = (tq.kv_list() or {}).get("train", {})
        status = {uid: tags.get(uid, {}).get("status") for uid in uids}
        if all(value in ("finished", "failure") for value in status.values()):
            keys = sorted(key for key in tags if key.rsplit("_", 2)[0] in uids and key not in uids)
            return {"status": status, "keys": keys}
        time.sleep(0.1)
    raise AssertionError(f"verl did not end within five minutes: {status}")


def test_verl_samples_scores_and_estimates(
    server: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], start_ray: Callable[..., None]
) -> None:
    """Agent loop, queue and V1's own advantage step; then rewards that are none, and a server that is gone."""
    import ray
    import transfer_queue as tq
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[Engine.__module__])
    start_ray(num_cpus=16, runtime_env={"env_vars": {TRIES: "1"}})  # logical CPUs
    try:
        config = verl_config(model_folder(tmp_path), server.url)
        tq.init(config.transfer_queue)
        # Handles of no worker: verl would ask one for a reward if ours did not stand there.
        manager = AgentLoopManagerTQ.create(
            config=config, llm_client=Engine(), teacher_client=None, reward_loop_worker_handles=[]
        )
        found = sample(manager, [0, 2], step=1)
        assert set(found["status"].values()) == {"finished"} and len(found["keys"]) == 4
        data = tq.kv_batch_get(
            keys=found["keys"],
            partition_id="train",
            select_fields=["prompts", "responses", "response_mask", "rm_scores"],
        )
        for row in range(4):
            ids = data["prompts"][row].tolist(), data["responses"][row].tolist()
            expected = torch.tensor(server.rewards[tuple(ids[0]), tuple(ids[1])])
            torch.testing.assert_close(data["rm_scores"][row], expected)
            assert not torch.allclose(data["rm_scores"][row].roll(1), expected) or len(expected) == 1

        trainer = SimpleNamespace(config=config)
        batch = KVBatchMeta(keys=found["keys"], tags=[{}] * 4, partition_id="train")
        PPOTrainer._compute_advantage(trainer, batch, metrics={})
        advantages = tq.kv_batch_get(keys=found["keys"], partition_id="train", select_fields=["advantages"])[
            "advantages"
        ]
        rows = [data["rm_scores"][row].tolist() for row in range(4)]
        centred = golden.centred_to_go(rows, [[1] * len(row) for row in rows], [0, 0, 1, 1])
        for row in range(4):
            torch.testing.assert_close(
                advantages[row], torch.tensor(centred[row][: len(rows[row])]), atol=1e-5, rtol=1e-5
            )

        server.wrong = "nan"
        lost = sample(manager, [0], step=2)
        assert set(lost["status"].values()) == {"failure"} and lost["keys"] == []
        server.wrong = ""
        partly = sample(manager, [1], step=3)  # one of its two answers has no token
        assert set(partly["status"].values()) == {"failure"} and len(partly["keys"]) == 1
        server.shutdown()
        server.server_close()
        lost = sample(manager, [0], step=4)
        assert set(lost["status"].values()) == {"failure"} and lost["keys"] == []
    finally:
        tq.close()
    log = "".join(capfd.readouterr())
    for sentence in ("the reward of token 0 of answer 0 is nan", "an answer without a token", "cannot be reached"):
        assert sentence in log

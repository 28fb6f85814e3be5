"""SkyRL: from its generator's output to the tensors that its estimators read; the real package, with stubs for vLLM."""

from __future__ import annotations

import asyncio
import sys
import typing
from types import SimpleNamespace
from typing import Any

import pytest

skyrl = pytest.importorskip("skyrl")

import transformers.integrations.flash_attention  # noqa: E402, F401  (asks once whether there is one)
from stubs import stub  # noqa: E402

stub("vllm", "flash_attn")
if sys.version_info < (3, 12):  # pydantic wants this one before 3.12, and SkyRL's own Python is 3.12
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict

import golden  # noqa: E402
import page  # noqa: E402
import torch  # noqa: E402
from loguru import logger  # noqa: E402
from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors  # noqa: E402
from skyrl.train.entrypoints.main_base import BasePPOExp  # noqa: E402
from skyrl.train.generators.base import BatchMetadata, GeneratorInterface  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402

from tlcr.errors import HostError  # noqa: E402
from tlcr.hosts import skyrl as adaptor  # noqa: E402
from tlcr.hosts.guard import require  # noqa: E402
from tlcr.hosts.remote import URL, scorer_at  # noqa: E402

GOLDEN = golden.load()
EXPECTED = GOLDEN["hosts"]["skyrl"]
FULL = [item for item in GOLDEN["items"] if item["response_ids"]]
REWARDS = [item["rewards"] for item in FULL]
UIDS = [f"prompt{group}" for group, item in zip(GOLDEN["group"], GOLDEN["items"], strict=True) if item["response_ids"]]
TRAIN = {"batch_metadata": BatchMetadata(global_step=1, training_phase="train")}
EVAL = {"batch_metadata": BatchMetadata(global_step=1, training_phase="eval")}

pytestmark = pytest.mark.usefixtures("address")


class Playing(GeneratorInterface):
    """The place of SkyRL's generator, which needs an engine: what it returns of the golden answers."""

    def __init__(self, environment: Any = 0.0, items: list[dict[str, Any]] = FULL, **more: Any) -> None:
        self.environment, self.items, self.more = environment, items, more

    async def generate(self, input_batch: Any) -> Any:
        rewards = self.environment if isinstance(self.environment, list) else [self.environment] * len(self.items)
        return {
            "prompt_token_ids": [list(item["prompt_ids"]) for item in self.items],
            "response_ids": [list(item["response_ids"]) for item in self.items],
            "loss_masks": [list(item["mask"]) for item in self.items],
            "rewards": rewards,
            "stop_reasons": None,
            "rollout_metrics": {"generate/tokens": 1},
            "rollout_logprobs": None,
            **self.more,
        }


def generated(inner: Playing, batch: Any = TRAIN, **options: Any) -> Any:
    scorer = options.pop("scorer", None) or scorer_at()
    return asyncio.run(adaptor.TokenRewardGenerator(inner, scorer, **options).generate(batch))


def trainer_of() -> Any:
    generator = SimpleNamespace(step_wise_trajectories=False, merge_stepwise_output=False, n_samples_per_prompt=2)
    algorithm = SimpleNamespace(zero_variance_filter=False)
    config = SimpleNamespace(generator=generator, trainer=SimpleNamespace(algorithm=algorithm))
    return SimpleNamespace(cfg=config, all_metrics={})


def tensors(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and the answers' mask in SkyRL's batch, by its own post-processing and batching."""
    output, _ = RayPPOTrainer.postprocess_generator_output(trainer_of(), output, UIDS)
    _, _, mask_BT, rewards_BT, *_ = convert_prompts_responses_to_batch_tensors(
        SimpleNamespace(pad_token_id=golden.PAD),
        output["prompt_token_ids"],
        output["response_ids"],
        output["rewards"],
        output["loss_masks"],
    )
    return rewards_BT, mask_BT


def test_every_private_name_is_there() -> None:
    require("SkyRL", "skyrl", adaptor.TESTED, adaptor.NAMES)


def test_the_estimator_reads_the_golden_tensor() -> None:
    output = generated(Playing())
    for found, expected in zip(output["rewards"], REWARDS, strict=True):
        assert found == pytest.approx(expected)
    expected = [row for row, item in zip(EXPECTED["rewards_BT"], GOLDEN["items"], strict=True) if item["response_ids"]]
    torch.testing.assert_close(tensors(output)[0], torch.tensor(expected))


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shift_by_one_token_is_caught(shift: int) -> None:
    rewards_BT, _ = tensors(generated(Playing(), scorer=golden.GoldenScorer(shift=shift)))
    expected = [row for row, item in zip(EXPECTED["rewards_BT"], GOLDEN["items"], strict=True) if item["response_ids"]]
    for found, row in zip(rewards_BT, torch.tensor(expected), strict=True):
        assert not torch.allclose(found, row, atol=1e-3)


def test_what_the_environment_pays_is_added_where_skyrl_lays_it() -> None:
    once = generated(Playing(2.0), scale=0.5)["rewards"]
    each = generated(Playing([[1.0] * len(row) for row in REWARDS]))["rewards"]
    for found, per_token, expected in zip(once, each, REWARDS, strict=True):
        assert found == pytest.approx([0.5 * value for value in expected[:-1]] + [0.5 * expected[-1] + 2])
        assert per_token == pytest.approx([value + 1 for value in expected])


def test_the_mean_instead_of_a_sum() -> None:
    found = generated(Playing(), mean=True)["rewards"][2]
    assert found == pytest.approx([0, 0, 0, 0, 0, sum(REWARDS[2]) / 4])


def test_evaluation_keeps_the_environments_rewards() -> None:
    assert generated(Playing(1.0), EVAL)["rewards"] == [1.0] * len(FULL)


def test_figures_reach_skyrls_metrics() -> None:
    metrics = generated(Playing(0.5))["rollout_metrics"]
    counted = [value for item in FULL for value, counts in zip(item["rewards"], item["mask"], strict=True) if counts]
    assert metrics["tlcr/reward/mean_token"] == pytest.approx(sum(counted) / len(counted))
    assert metrics["tlcr/reward/masked_paid"] == 0 and metrics["tlcr/environment/mean_answer"] == 0.5
    assert metrics["generate/tokens"] == 1


def advantages_by(estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    rewards_BT, mask_BT = tensors(generated(Playing()))
    advantages_BT, _ = ppo_utils.compute_advantages_and_returns(
        token_level_rewards=rewards_BT,
        response_mask=mask_BT,
        index=UIDS,
        adv_estimator=estimator,
        config=SimpleNamespace(),
        values=torch.zeros_like(rewards_BT),
        grpo_norm_by_std=False,
    )
    return advantages_BT, mask_BT


def test_our_estimator_compares_the_same_tokens_though_answers_end_together() -> None:
    advantages_BT, mask_BT = advantages_by("tlcr_group")
    group = [int(uid.removeprefix("prompt")) for uid in UIDS]
    centred = golden.centred_to_go(REWARDS, [[1] * len(row) for row in REWARDS], group)
    expected = golden.padded([row[: len(answer)] for row, answer in zip(centred, REWARDS, strict=True)], left=True)
    torch.testing.assert_close(advantages_BT, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert bool((advantages_BT[mask_BT == 0] == 0).all())


@pytest.mark.parametrize(("estimator", "is_dense"), [("gae", True), ("reinforce++", True), ("grpo", False)])
def test_which_of_skyrls_estimators_keep_them(estimator: str, is_dense: bool) -> None:
    advantages_BT, mask_BT = advantages_by(estimator)
    assert (len(set(advantages_BT[0][mask_BT[0].bool()].tolist())) > 1) is is_dense


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (Playing(is_last_step=[True] * 5), "step_wise_trajectories"),
        (Playing(items=GOLDEN["items"]), "an answer without a token"),
        (Playing([[1.0]] * 5), "paid 1 rewards for 5 tokens"),
    ],
)
def test_output_that_cannot_be_paid(inner: Playing, says: str) -> None:
    with pytest.raises(HostError, match=says):
        generated(inner)


@pytest.mark.parametrize(("wrong", "says"), [("nan", "nan"), ("short", "5 tokens and 4 rewards")])
def test_rewards_that_are_none(server: Any, monkeypatch: pytest.MonkeyPatch, wrong: str, says: str) -> None:
    monkeypatch.setattr(server, "wrong", wrong)
    with pytest.raises(HostError, match=says):
        generated(Playing())


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://127.0.0.1:9")
    with pytest.raises(HostError, match="cannot be reached"):
        generated(Playing())


def test_a_policy_with_another_tokenizer(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = SimpleNamespace(bos_token_id=None, eos_token_id=2, get_vocab=lambda: {"a": 0})
    monkeypatch.setattr(server, "fingerprint", "0123456789abcdef")
    monkeypatch.setenv("TLCR_REWARD_TOKEN", "another client")
    with pytest.raises(HostError, match="is not that of the discriminator"):
        generated(Playing(), tokenizer=Hashable(words))


class Hashable:
    def __init__(self, words: Any) -> None:
        self.bos_token_id, self.eos_token_id, self.get_vocab = words.bos_token_id, words.eos_token_id, words.get_vocab


def config(**changes: Any) -> Any:
    algorithm = SimpleNamespace(advantage_estimator="grpo", zero_variance_filter=True)
    generator = SimpleNamespace(step_wise_trajectories=changes.get("step_wise", False))
    return SimpleNamespace(generator=generator, trainer=SimpleNamespace(algorithm=algorithm))


def test_the_experiment_wraps_skyrls_generator_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, said = Playing(), []
    monkeypatch.setattr(BasePPOExp, "get_generator", lambda *args: inner)
    sink = logger.add(lambda message: said.append(str(message)))
    experiment = adaptor.TokenRewardExp.__new__(adaptor.TokenRewardExp)
    found = experiment.get_generator(config(), None, None)
    logger.remove(sink)
    assert isinstance(found, adaptor.TokenRewardGenerator) and found.inner is inner
    assert "SkyRL's estimator 'grpo' adds the rewards" in said[0] and "zero_variance_filter" in said[1]
    with pytest.raises(HostError, match="step_wise_trajectories=false"):
        experiment.get_generator(config(step_wise=True), None, None)


def test_skyrls_command_takes_our_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main_base trainer.override_entrypoint=tlcr.hosts.skyrl``, up to where Ray and GPUs would start."""
    from skyrl.train import utils
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.entrypoints import main_base

    assert page.modules("skyrl") == {main_base.__name__}
    seen: dict[str, Any] = {}
    monkeypatch.setattr(utils, "validate_cfg", lambda cfg: seen.update(validated=cfg))
    monkeypatch.setattr(utils.utils, "initialize_ray", lambda cfg: seen.update(started=cfg))
    monkeypatch.setattr(adaptor, "_run", SimpleNamespace(remote=lambda experiment, cfg: (experiment, cfg)))
    monkeypatch.setattr(adaptor.ray, "get", lambda run: seen.update(ran=run))
    flags = ["trainer.override_entrypoint=tlcr.hosts.skyrl", "trainer.algorithm.advantage_estimator=tlcr_group"]
    monkeypatch.setattr(sys, "argv", ["main_base", *flags])
    main_base.main()
    experiment, cfg = seen["ran"]
    assert experiment is adaptor.TokenRewardExp and isinstance(cfg, SkyRLTrainConfig)
    assert cfg.trainer.algorithm.advantage_estimator == "tlcr_group"
    assert "tlcr_group" in ppo_utils.AdvantageEstimatorRegistry.list_available()

"""The loop of one's own: short, made of public functions, and in step with tlcr's own stages on the same input.

Everything is compared in float64, where two ways of one computation differ by rounding only: one column off is far off.
"""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tlcr
from examples import ppo_loop
from tests.ppo.helpers import PROMPTS, bigram_lm, double_actor_critic, known_rollout
from tlcr.config.schema import DataConfig, KLConfig, LabelConfig, ModelConfig, PPOConfig, RewardConfig, RolloutConfig
from tlcr.data import embedded
from tlcr.data.labels import label_pairs
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.discriminator import collate_pairs, discriminator_loss, labels_of
from tlcr.models.loading import load_token_classifier
from tlcr.models.sft import completion_loss
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.rollout import generate
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import ppo_update
from tlcr.rewards.centre import RunningMean
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import DiscriminatorSource, FrozenModel
from tlcr.text.padding import collate_completions
from tlcr.text.tokenization import encode_answers
from tlcr.types import Advantages, EditPair, PolicyScores, PreferencePair, Rollout

SCRIPT = Path(ppo_loop.__file__)
TINY = ["--pairs", "40", "--rounds", "2", "--batch", "6", "--seed", "3"]

LM = Callable[..., PreTrainedModel]


# ---- the script as its reader sees it


def test_it_is_read_in_one_sitting() -> None:
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 200


def test_it_uses_public_functions_only() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    taken = {
        f"{node.module}.{alias.name}" if node.module == "tlcr.data" else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported | taken == {"argparse", "copy", "torch", "transformers", "tlcr", "tlcr.data.embedded"}
    attributes = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    of_tlcr = {name for owner, name in attributes if owner == "tlcr"}
    assert of_tlcr <= set(tlcr.ops.__all__) & set(tlcr.__all__)
    assert {"token_labels", "score_tokens", "fused_reward", "fused_gae", "ppo_loss"} <= of_tlcr
    assert {name for owner, name in attributes if owner == "embedded"} <= set(embedded.__all__)


@pytest.mark.slow
def test_it_says_the_same_again_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = ppo_loop.main(TINY)
    said = capsys.readouterr().out
    again = subprocess.run([sys.executable, str(SCRIPT), *TINY], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout == said
    rows = [line.split()[:5] for line in said.splitlines() if line.startswith(("     1", "     2", "before", " after"))]
    assert [row[0] for row in rows] == ["1", "2", "before", "after"]
    assert rows[0][2] == "0.000", "a policy that has not moved is at no distance from its reference"
    for row, figures in ((rows[2], before), (rows[3], after)):
        assert row[1:] == [f"{value:.3f}" for value in figures.values()]
    assert before["KL"] == pytest.approx(0, abs=1e-6) and after["KL"] != before["KL"]


@pytest.mark.slow
def test_it_learns() -> None:
    before, after = ppo_loop.main(["--pairs", "2000", "--rounds", "20"])
    assert after["reward"] > before["reward"] + 0.1
    assert after["gold"] > before["gold"] + 0.1


def test_others_data_and_another_architecture_go_in_by_load(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_gpt2: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPT-2 with dropout in its config, and one id for padding and end of sequence."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    policy = tiny_gpt2()
    assert policy.config.resid_pdrop > 0
    texts = [(prompt, f" {word} good.", f" {word} bad.") for prompt in PROMPTS for word in ("was", "is")]
    preferences = [PreferencePair("", prompt, good, bad) for prompt, good, bad in texts]
    edits = [EditPair("", prompt, bad, good) for prompt, good, bad in texts]
    monkeypatch.setattr(ppo_loop, "load", lambda seed, pairs: (tokenizer, policy, preferences, edits, PROMPTS))
    monkeypatch.setattr(embedded, "score", lambda prompts, answers: [answer.count("good") for answer in answers])
    before, after = ppo_loop.main(["--rounds", "2", "--batch", "4"])
    assert before["KL"] == pytest.approx(0, abs=1e-6), "dropout would make two passes of one policy differ"
    assert after["KL"] != before["KL"]


# ---- data and losses, against those of the recipes


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return embedded.build_tokenizer(0)


def doubled(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """In float64, with weights of some size instead of zeros in a classifier's head."""
    head = getattr(model, "score", None)
    if head is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.double()


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return doubled(embedded.build_model(tokenizer, 1).eval())


def test_labels_are_those_of_the_labelling_stage(tokenizer: PreTrainedTokenizerFast) -> None:
    _, edits = embedded.generate_pairs(200, 5)
    whole = DataConfig(max_prompt_tokens=1000, max_answer_tokens=1000)
    pairs, _ = label_pairs(edits, tokenizer, whole, LabelConfig(end_of_sequence="neutral"))
    for edit, pair in zip(edits, pairs, strict=True):
        for (ids, targets), side in zip(ppo_loop.labelled(tokenizer, edit), (pair.rejected, pair.revised), strict=True):
            start = side.encoded.answer_start
            assert tuple(ids) == side.encoded.ids
            assert targets[:start] == [ppo_loop.NO_TARGET] * start
            assert tuple(targets[start:]) == side.labels


def test_the_loss_of_sft_is_that_of_the_recipe(tokenizer: PreTrainedTokenizerFast, policy: PreTrainedModel) -> None:
    pairs, _ = embedded.generate_pairs(6, 5)
    encoded = encode_answers(
        tokenizer,
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        max_prompt_tokens=1000,
        max_answer_tokens=None,
    )
    parts = completion_loss(policy, collate_completions(encoded, pad_token_id=tokenizer.pad_token_id))
    own = [ppo_loop.encode(tokenizer, pair.prompt, pair.chosen) for pair in pairs]
    ids, mask = ppo_loop.pad([prompt + answer for prompt, answer in own], 0)
    targets, _ = ppo_loop.pad(
        [[ppo_loop.NO_TARGET] * len(prompt) + answer for prompt, answer in own], ppo_loop.NO_TARGET
    )
    loss = ppo_loop.sft_loss(ppo_loop.forward(policy, ids, mask), targets)
    torch.testing.assert_close(loss, parts.total / parts.weight)


def test_the_discriminator_and_its_loss_are_those_of_the_recipe(
    tokenizer: PreTrainedTokenizerFast, policy: PreTrainedModel
) -> None:
    weights = copy.deepcopy(policy.state_dict())
    model = ppo_loop.with_new_head(policy, 2)
    theirs = load_token_classifier(policy, ModelConfig(), id2label=labels_of("soft"))
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in weights.items())

    model = doubled(model)
    _, edits = embedded.generate_pairs(6, 5)
    whole = DataConfig(max_prompt_tokens=1000, max_answer_tokens=1000)
    pairs, _ = label_pairs(edits, tokenizer, whole, LabelConfig(end_of_sequence="neutral"))
    batch = collate_pairs(pairs, pad_token_id=tokenizer.pad_token_id, targets="soft")
    logits_BLC = ppo_loop.forward(model, batch["ids"], batch["attention_mask"])
    total, weight = discriminator_loss(logits_BLC, batch["labels"], batch["weights"])
    ids, targets = zip(*(row for edit in edits for row in ppo_loop.labelled(tokenizer, edit)), strict=True)
    loss = ppo_loop.discriminator_loss(
        ppo_loop.forward(model, *ppo_loop.pad(ids, 0)), ppo_loop.pad(targets, ppo_loop.NO_TARGET)[0]
    )
    torch.testing.assert_close(loss, total / weight)


# ---- a round, against the stages of train_ppo


def test_answers_begin_and_end_where_those_of_the_rollout_do(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a policy that follows each token by the next of a cycle through the end of sequence."""
    V, eos = len(tiny_tokenizer), tiny_tokenizer.eos_token_id
    logits_VV = 100.0 * torch.eye(V).roll(1, dims=1)
    logits_VV[50] = 100.0 * torch.eye(V)[eos]
    policy = bigram_lm(logits_VV)
    prompts = [*PROMPTS, tiny_tokenizer.decode([49]), tiny_tokenizer.decode([50])]
    sampling = RolloutConfig(max_new_tokens=64, batch_size=len(prompts))
    rollout = generate(policy, tiny_tokenizer, prompts, sampling, max_prompt_tokens=1000)
    ids_BL, mask_BL, P = ppo_loop.sample(policy, tiny_tokenizer, prompts)
    assert torch.equal(ids_BL, rollout.ids_BL) and torch.equal(mask_BL, rollout.attention_mask_BL)
    assert rollout.prompt_ids_BP.shape[1] == P
    lengths = mask_BL[:, P:].sum(dim=1).tolist()
    assert lengths[-2:] == [2, 1] and 64 in lengths, "answers that end, with their end, and such that are cut off"
    assert rollout.ended_B.any() and not rollout.ended_B.all()


@pytest.mark.parametrize("family", ["tiny_causal_lm", "tiny_gpt2"])  # rotary positions, and learned ones
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 2)])
def test_scores_are_those_of_the_actor_critic(
    request: pytest.FixtureRequest, family: str, left: int, right: int
) -> None:
    make_lm: LM = request.getfixturevalue(family)
    actor_critic = double_actor_critic(make_lm)
    reference = make_lm(seed=7).double()
    rollout = known_rollout(extra_left=left, extra_right=right)
    P, mask_BT = rollout.prompt_ids_BP.shape[1], rollout.mask_BT
    assert actor_critic.value_model is not None
    scores, values_BT = ppo_loop.score(
        actor_critic.policy, actor_critic.value_model, rollout.ids_BL, rollout.attention_mask_BL, P, reference
    )
    theirs = score_rollout(actor_critic, reference, rollout, temperature=1.0, micro_batch_size=None, exact_kl=False)
    for own_BT, their_BT in (
        (scores.logprobs, theirs.logprobs_BT),
        (scores.ref_logprobs, theirs.ref_logprobs_BT),
        (scores.entropy, theirs.entropy_BT),
        (values_BT, theirs.values_BT),
    ):
        torch.testing.assert_close(own_BT[mask_BT], their_BT[mask_BT])
        one_off_BT = their_BT.roll(1, dims=1)
        assert (own_BT - one_off_BT)[mask_BT].abs().max() > 0.01


class Round:
    """One round's experience of the loop, and the same answers as a rollout of tlcr's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, policy: PreTrainedModel) -> None:
        self.tokenizer, self.policy = tokenizer, policy
        self.reference = doubled(embedded.build_model(tokenizer, 2).eval())
        self.value_model = doubled(ppo_loop.with_new_head(policy, 1), seed=3)
        self.discriminator = doubled(ppo_loop.with_new_head(policy, 2), seed=4)
        self.prompts = embedded.prompts(8, 0)
        self.experience, self.figures, texts = ppo_loop.experience(
            tokenizer, policy, self.value_model, self.reference, self.discriminator, self.prompts
        )
        P, ids_BL, mask_BL = self.experience[:3]
        self.rollout = Rollout(
            prompts=tuple(self.prompts),
            responses=tuple(texts),
            prompt_ids_BP=ids_BL[:, :P],
            prompt_mask_BP=mask_BL[:, :P],
            response_ids_BT=ids_BL[:, P:],
            mask_BT=mask_BL[:, P:],
            ended_B=(ids_BL[:, P:] == tokenizer.eos_token_id).any(dim=1),
        )
        self.actor_critic = ActorCritic(copy.deepcopy(policy), copy.deepcopy(self.value_model))

    def scores(self) -> PolicyScores:
        return score_rollout(
            self.actor_critic, self.reference, self.rollout, temperature=1.0, micro_batch_size=None, exact_kl=False
        )


@pytest.fixture
def round_(tokenizer: PreTrainedTokenizerFast, policy: PreTrainedModel) -> Round:
    return Round(tokenizer, policy)


def close_where_counted(own_BT: Tensor, their_BT: Tensor, mask_BT: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(own_BT[mask_BT], their_BT[mask_BT].to(own_BT.dtype), rtol=tolerance, atol=tolerance)
    assert their_BT[mask_BT].std() > 100 * tolerance, "the numbers are all alike: any alignment would do"


def test_rewards_and_advantages_are_those_of_the_stages(round_: Round) -> None:
    tokenizer, rollout, mask_BT = round_.tokenizer, round_.rollout, round_.rollout.mask_BT
    scores = round_.scores()
    kl_BT = scores.logprobs_BT - scores.ref_logprobs_BT
    frozen = FrozenModel(round_.discriminator, tokenizer, tokenizer, max_prompt_tokens=1000)
    signal = DiscriminatorSource(frozen)(rollout)
    uncentred, centred = (
        compose_rewards(
            signal,
            mask_BT,
            ended_B=rollout.ended_B,
            kl_BT=kl_BT,
            kl_coef=ppo_loop.KL_COEF,
            cfg=RewardConfig(centre=centre),
            temperature=1.0,
            centre=RunningMean(),
        )
        for centre in (False, True)
    )
    P, ids_BL, mask_BL, old_logprobs_BT, old_values_BT, advantages_BT, returns_BT = round_.experience
    with torch.no_grad():
        rewards_BT = ppo_loop.token_rewards(round_.discriminator, ids_BL, mask_BL, P, kl_BT)
    close_where_counted(rewards_BT, uncentred.rewards_BT, mask_BT)
    assert (rewards_BT - uncentred.rewards_BT.roll(1, dims=1))[mask_BT].abs().max() > 0.01

    close_where_counted(old_logprobs_BT, scores.logprobs_BT, mask_BT)
    close_where_counted(old_values_BT, scores.values_BT, mask_BT)
    theirs = compute_advantages(centred, scores, mask_BT, gamma=1.0, lam=ppo_loop.LAM, whiten=True)
    close_where_counted(advantages_BT, theirs.advantages_BT, mask_BT)
    close_where_counted(returns_BT, theirs.returns_BT, mask_BT)

    assert round_.figures["reward"] == pytest.approx(uncentred.parts["dense"][mask_BT].mean().item(), abs=1e-5)
    assert round_.figures["KL"] == pytest.approx(kl_BT[mask_BT].mean().item(), abs=1e-5)
    gold = sum(embedded.score(rollout.prompts, rollout.responses))
    assert round_.figures["gold"] == pytest.approx(gold / mask_BT.sum().item())
    assert round_.figures["length"] == pytest.approx(mask_BT.sum().item() / 8)


def test_an_update_is_that_of_the_stage(round_: Round) -> None:
    cfg = PPOConfig(batch_size=8, minibatch_size=3, epochs=2, learning_rate=1e-3, value_learning_rate=1e-3)
    _, _, _, old_logprobs_BT, old_values_BT, advantages_BT, returns_BT = round_.experience

    def adamw(*models: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for model in models for p in model.parameters()], 1e-3, weight_decay=0.0)

    actor_critic = round_.actor_critic
    assert actor_critic.value_model is not None
    before = copy.deepcopy(round_.policy.state_dict())
    torch.manual_seed(11)
    ppo_loop.update(
        round_.policy, round_.value_model, adamw(round_.policy, round_.value_model), *round_.experience, minibatch=3
    )
    ppo_update(
        actor_critic,
        adamw(actor_critic),
        round_.rollout,
        PolicyScores(old_logprobs_BT, old_logprobs_BT, old_values_BT, old_logprobs_BT),
        Advantages(advantages_BT, returns_BT),
        cfg,
        KLConfig(),
        kl_coef=ppo_loop.KL_COEF,
        temperature=1.0,
        reference=round_.reference,
        accelerator=Accelerator(),
        generator=torch.Generator().manual_seed(11),
    )
    for own, theirs in ((round_.policy, actor_critic.policy), (round_.value_model, actor_critic.value_model)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)
    moved = max((before[name] - value).abs().max() for name, value in round_.policy.state_dict().items())
    assert moved > 1e-3

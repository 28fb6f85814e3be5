"""Reward sources: the frozen model's word lands on exactly the action that emitted the token, through any tokenizer."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.rewards.rollouts import (
    PADDINGS,
    Rigged,
    Row,
    character_tokenizer,
    frozen_model,
    ids_of,
    random_rows,
    rollout_of,
)
from tlcr.config.schema import DataConfig, ModelConfig, RewardConfig
from tlcr.errors import CheckpointError, ConfigError, DataError, ShapeError
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.saving import save_model
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import (
    CallableSource,
    CombinedSource,
    DiscriminatorSource,
    FrozenModel,
    LoadedModel,
    RandomSource,
    SequenceRewardSource,
    build_reward_source,
    same_tokenizer,
)
from tlcr.types import RewardSignal, Rollout


def positive(source: DiscriminatorSource, rollout: Rollout) -> list[list[float]]:
    """The positive logit of every counted token, row by row; the negative one must be 0."""
    logits = source(rollout).logits_BTC
    assert logits is not None and (logits[..., 0][rollout.mask_BT] == 0).all()
    return [row[mask].tolist() for row, mask in zip(logits[..., 1], rollout.mask_BT, strict=True)]


# ---- the discriminator, with the policy's tokenizer


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_the_reward_sits_on_the_action_that_emitted_the_token(
    tiny_tokenizer: PreTrainedTokenizerFast, left: int, right: int
) -> None:
    x, a, b, eos = 50, 60, 70, tiny_tokenizer.eos_token_id
    rows = [
        Row("The food", [a, x, b, a, eos], True),
        Row("Human: a longer prompt", [x, a], False),
        Row("I", [b, b, x], False),
        Row("The", [a, eos], True),
    ]
    # padding that looks like the rewarded token, or like the end of sequence, earns nothing
    for filler in (x, eos):
        rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=filler)
        source = DiscriminatorSource(frozen_model(Rigged({x: 5.0, eos: 2.0}), tiny_tokenizer, tiny_tokenizer))
        assert positive(source, rollout) == [[0, 5, 0, 0, 2], [5, 0], [0, 0, 5], [0, 2]]
        rewards = compose_rewards(
            source(rollout),
            rollout.mask_BT,
            ended_B=rollout.ended_B,
            kl_BT=None,
            kl_coef=0.0,
            cfg=RewardConfig(kind="sign"),
            temperature=1.0,
            centre=None,
        ).rewards_BT
        worked = [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
        assert rewards.tolist() == [row + [0] * right for row in worked]


@pytest.fixture
def discriminator(tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(5)
    return LlamaForTokenClassification(tiny_causal_lm().config).eval()


@pytest.mark.parametrize(("left", "right"), PADDINGS)
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_padding_and_batching_do_not_matter_to_a_real_model(
    tiny_tokenizer: PreTrainedTokenizerFast,
    discriminator: PreTrainedModel,
    left: int,
    right: int,
    micro_batch_size: int | None,
) -> None:
    rows = random_rows(tiny_tokenizer)
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=17)
    of = frozen_model(discriminator, tiny_tokenizer, tiny_tokenizer, micro_batch_size=micro_batch_size)
    logits = DiscriminatorSource(of)(rollout).logits_BTC
    for b, row in enumerate(rows):
        ids = ids_of(tiny_tokenizer, row.prompt) + row.ids
        with torch.no_grad():
            truth = discriminator(input_ids=torch.tensor([ids])).logits[0, -len(row.ids) :]
        torch.testing.assert_close(logits[b, : len(row.ids)], truth, rtol=1e-4, atol=1e-5)
        # one position off is far off
        assert (
            logits[b, 0] - discriminator(input_ids=torch.tensor([ids])).logits[0, -len(row.ids) - 1]
        ).abs().max() > 0.01


def test_a_token_masked_inside_a_row_is_not_there_for_the_judge(
    tiny_tokenizer: PreTrainedTokenizerFast, discriminator: PreTrainedModel
) -> None:
    whole = rollout_of([Row("The food", [50, 60, 70, 80], False)], tiny_tokenizer)
    holed = rollout_of([Row("The food", [50, 99, 60, 99, 70, 80], False, masked=(1, 3))], tiny_tokenizer, left=2)
    source = DiscriminatorSource(frozen_model(discriminator, tiny_tokenizer, tiny_tokenizer))
    truth, logits = source(whole).logits_BTC[0], source(holed).logits_BTC[0][holed.mask_BT[0]]
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-5)


# ---- the discriminator, with a tokenizer of its own


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_a_character_judge_rewards_the_policy_token_that_holds_the_character(
    tiny_tokenizer: PreTrainedTokenizerFast, left: int, right: int
) -> None:
    characters = character_tokenizer()
    w, end = ids_of(characters, "w")[0], characters.eos_token_id
    eos = tiny_tokenizer.eos_token_id
    answer, cut = ids_of(tiny_tokenizer, " was wonderful, the waiter"), ids_of(tiny_tokenizer, " not cold")
    rows = [Row("The food", [*answer, eos], True), Row("w w w I would", cut, False), Row("w", [eos], True)]
    source = DiscriminatorSource(frozen_model(Rigged({w: 6.0, end: 2.0}), characters, tiny_tokenizer))
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=answer[0])
    texts = [tiny_tokenizer.decode([id]) for id in answer]
    assert len({len(text) for text in texts}) > 1, "the test needs tokens of several lengths"
    worked = [6.0 * text.count("w") / len(text) for text in texts]
    got = positive(source, rollout)
    assert got[0] == pytest.approx([*worked, 2.0], abs=1e-6)
    assert got[1:] == [[0.0] * len(cut), [2.0]]
    assert (source(rollout).logits_BTC[~rollout.mask_BT] == 0).all()


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_a_word_judge_rewards_each_of_the_policys_characters(
    tiny_tokenizer: PreTrainedTokenizerFast, left: int, right: int
) -> None:
    characters = character_tokenizer()
    (good,) = ids_of(tiny_tokenizer, " good")
    prompt, text = "The food was", " not good at"
    rows = [
        Row(prompt, [*ids_of(characters, text), characters.eos_token_id], True),
        Row(prompt, ids_of(characters, text), False),
    ]
    source = DiscriminatorSource(
        frozen_model(Rigged({good: 5.0, tiny_tokenizer.eos_token_id: -3.0}), tiny_tokenizer, characters)
    )
    got = positive(source, rollout_of(rows, characters, left=left, right=right, filler=ids_of(characters, "g")[0]))
    worked = [5.0 if 4 <= i < 9 else 0.0 for i in range(len(text))]
    assert got == [[*worked, -3.0], worked]


def chunk_tokenizer(size: int, text: str) -> PreTrainedTokenizerFast:
    """Tokens of `size` characters, as they stand in `text`."""
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["<eos>", *chunks]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{1,{size}}}"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def test_overlaps_are_weighed_by_their_characters() -> None:
    text = "prompt" + "abcdef"
    policy, of_two = chunk_tokenizer(3, text), chunk_tokenizer(2, text)
    ab, cd = ids_of(of_two, "abcd")
    source = DiscriminatorSource(frozen_model(Rigged({ab: 3.0, cd: 6.0}), of_two, policy))
    rollout = rollout_of([Row("prompt", ids_of(policy, "abcdef"), False)], policy)
    # "abc" is two characters of "ab" and one of "cd"; "def" one of "cd" and two of "ef"
    assert positive(source, rollout)[0] == pytest.approx([(2 * 3 + 1 * 6) / 3, (1 * 6 + 2 * 0) / 3])


def test_one_character_of_several_tokens_is_shared_by_all_of_them(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    characters = character_tokenizer()
    ids = ids_of(tiny_tokenizer, "e\u00dfe")
    assert len(ids) == 4, "the test needs a character that the policy spells with two tokens"
    (sharp,) = ids_of(characters, "\u00df")
    source = DiscriminatorSource(frozen_model(Rigged({sharp: 4.0}), characters, tiny_tokenizer))
    assert positive(source, rollout_of([Row("A", ids, False)], tiny_tokenizer)) == [[0, 4, 4, 0]]
    # and back: two of the frozen model's tokens make one of the policy's, each with half a say
    back = DiscriminatorSource(frozen_model(Rigged({ids[1]: 4.0}), tiny_tokenizer, characters))
    row = Row("A", ids_of(characters, "e\u00dfe"), False)
    assert positive(back, rollout_of([row], characters)) == [[0, 2, 0]]


def test_a_judge_that_changes_text_is_aligned_by_what_it_read(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lower = character_tokenizer(lowercase=True)
    w = ids_of(lower, "w")[0]
    ids = ids_of(tiny_tokenizer, "Human:    Would   never")
    source = DiscriminatorSource(frozen_model(Rigged({w: 6.0}), lower, tiny_tokenizer))
    texts = [tiny_tokenizer.decode([id]) for id in ids]
    worked = [6.0 * text.lower().count("w") / len(text) for text in texts]
    assert sum(value > 0 for value in worked) == 1
    row = Row("The W", ids, False)
    assert positive(source, rollout_of([row], tiny_tokenizer))[0] == pytest.approx(worked, abs=1e-6)


def test_a_special_token_inside_an_answer_is_neutral(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    characters = character_tokenizer()
    w, bos = ids_of(characters, "w")[0], tiny_tokenizer.bos_token_id
    source = DiscriminatorSource(
        frozen_model(Rigged({w: 6.0, ids_of(characters, "b")[0]: 9.0}), characters, tiny_tokenizer)
    )
    (single,) = ids_of(tiny_tokenizer, "w")
    row = Row("A", [single, bos, single], False)
    assert positive(source, rollout_of([row], tiny_tokenizer)) == [[6, 0, 6]]


@pytest.mark.parametrize("own_bos", [None, "<s>"])
def test_what_the_other_tokenizer_reads(tiny_tokenizer: PreTrainedTokenizerFast, own_bos: str | None) -> None:
    characters = character_tokenizer(bos=own_bos)
    model = Rigged({})
    eos = tiny_tokenizer.eos_token_id
    rows = [
        Row("<bos>The food", [*ids_of(tiny_tokenizer, " was bad"), eos], True),
        Row("<bos>I", ids_of(tiny_tokenizer, " would"), False),
    ]
    DiscriminatorSource(frozen_model(model, characters, tiny_tokenizer))(rollout_of(rows, tiny_tokenizer))
    start = [characters.bos_token_id] if own_bos else []
    first = start + ids_of(characters, "The food was bad") + [characters.eos_token_id]
    assert sorted(model.shown) == sorted([first, start + ids_of(characters, "I would")])


def test_special_tokens_that_both_know_stay(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    characters = character_tokenizer()
    characters.add_special_tokens({"additional_special_tokens": ["<bos>"]})
    model = Rigged({})
    row = Row("<bos>I<pad>", ids_of(tiny_tokenizer, " would"), False)
    DiscriminatorSource(frozen_model(model, characters, tiny_tokenizer))(rollout_of([row], tiny_tokenizer))
    assert model.shown == [[characters.convert_tokens_to_ids("<bos>"), *ids_of(characters, "I would")]]


def test_a_judge_with_few_positions_loses_the_prompt_first(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    characters = character_tokenizer()
    d, end = ids_of(characters, "d")[0], characters.eos_token_id
    ids = ids_of(tiny_tokenizer, " and dull")
    row = Row("The food", [*ids, tiny_tokenizer.eos_token_id], True)
    rollout = rollout_of([row], tiny_tokenizer)
    whole = positive(DiscriminatorSource(frozen_model(Rigged({d: 6.0, end: 2.0}), characters, tiny_tokenizer)), rollout)

    short = Rigged({d: 6.0, end: 2.0}, positions=11)
    assert positive(DiscriminatorSource(frozen_model(short, characters, tiny_tokenizer)), rollout) == whole
    assert short.shown == [[*ids_of(characters, "d and dull"), end]]
    (said,) = caplog.messages
    assert said.startswith(
        "rigged has 11 positions, and a prompt with its answer has 18 tokens: such prompts lose their beginning, here 7"
    )
    caplog.clear()

    shorter = Rigged({d: 6.0, end: 2.0}, positions=4)
    with caplog.at_level(logging.WARNING):
        source = DiscriminatorSource(frozen_model(shorter, characters, tiny_tokenizer))
        got, _ = positive(source, rollout)[0], positive(source, rollout)
    assert shorter.shown == [ids_of(characters, " and")] * 2
    kept = len(ids_of(tiny_tokenizer, " and"))
    assert got[:kept] == whole[0][:kept] and got[kept:] == [0.0] * (len(ids) + 1 - kept)
    assert caplog.text.count("an answer has 10 tokens for rigged, which has 4 positions") == 1


def test_a_prompt_that_is_too_long_in_the_judge_s_own_tokens_is_said_once(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    characters = character_tokenizer()
    frozen = replace(frozen_model(Rigged({}), characters, tiny_tokenizer), max_prompt_tokens=5)
    source = DiscriminatorSource(frozen)
    rows = [
        Row(text, [*ids_of(tiny_tokenizer, " dull"), tiny_tokenizer.eos_token_id], True) for text in ("abc", "The food")
    ]
    for _ in range(2):
        source(rollout_of(rows, tiny_tokenizer))
    (said,) = caplog.messages
    assert said.startswith(
        "rigged, whose tokens are not the policy's, in the first rollout with such prompts: 1 of 2 prompts"
    )
    assert "loses the first 3 of its 8 tokens, which begin 'The food'" in said


def test_the_prompt_keeps_its_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    characters = character_tokenizer()
    model = Rigged({})
    source = DiscriminatorSource(frozen_model(model, characters, tiny_tokenizer, max_prompt_tokens=4))
    source(rollout_of([Row("The food", ids_of(tiny_tokenizer, " was"), False)], tiny_tokenizer))
    assert model.shown == [ids_of(characters, "food was")]


def test_tokenizers_are_compared_by_what_their_ids_mean(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def copy(**changes: str) -> PreTrainedTokenizerFast:
        names = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", **changes}
        backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    assert same_tokenizer(tiny_tokenizer, copy())
    assert same_tokenizer(tiny_tokenizer, copy(pad_token="<eos>"))
    assert not same_tokenizer(tiny_tokenizer, copy(eos_token="<bos>"))
    more = copy()
    more.add_tokens(["<tool>"])
    assert not same_tokenizer(tiny_tokenizer, more)
    assert not same_tokenizer(tiny_tokenizer, character_tokenizer())


# ---- the sequence reward model


@pytest.fixture
def reward_model(
    tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    torch.manual_seed(7)
    config = tiny_causal_lm().config
    config.num_labels = 1
    # padding by the end of sequence, as so many models do: nothing may be read off the ids
    config.pad_token_id = tiny_tokenizer.eos_token_id
    return LlamaForSequenceClassification(config).eval()


def score_alone(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])[0]


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_the_sequence_score_is_read_at_the_last_token(
    tiny_tokenizer: PreTrainedTokenizerFast, reward_model: PreTrainedModel, left: int, right: int
) -> None:
    eos = tiny_tokenizer.eos_token_id
    rows = [*random_rows(tiny_tokenizer), Row("The", [60, 70, eos], True)]
    source = SequenceRewardSource(frozen_model(reward_model, tiny_tokenizer, tiny_tokenizer, micro_batch_size=4))
    scores = source(rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=eos)).terminal_B
    truth = torch.stack([score_alone(reward_model, ids_of(tiny_tokenizer, row.prompt) + row.ids) for row in rows])
    torch.testing.assert_close(scores, truth, rtol=1e-4, atol=1e-5)
    assert (truth[-1] - score_alone(reward_model, [*ids_of(tiny_tokenizer, "The"), 60, 70])).abs() > 1e-3


def test_the_sequence_model_reads_text_where_its_tokenizer_differs(
    tiny_tokenizer: PreTrainedTokenizerFast, reward_model: PreTrainedModel
) -> None:
    characters = character_tokenizer()
    prompt, text = "The food was", " not good"
    rows = [
        Row(prompt, [*ids_of(characters, text), characters.eos_token_id], True),
        Row(prompt, ids_of(characters, text), False),
    ]
    source = SequenceRewardSource(frozen_model(reward_model, tiny_tokenizer, characters))
    own = ids_of(tiny_tokenizer, prompt + text)
    truth = torch.stack(
        [score_alone(reward_model, [*own, tiny_tokenizer.eos_token_id]), score_alone(reward_model, own)]
    )
    torch.testing.assert_close(source(rollout_of(rows, characters)).terminal_B, truth, rtol=1e-4, atol=1e-5)


# ---- functions of the user's own

RESULT: list[object] = []
CALLS: list[dict[str, Any]] = []


def returned(**keywords: object) -> object:
    """The reward function of these tests: keeps what it was given and returns what the test put in RESULT."""
    CALLS.append(keywords)
    return RESULT[0]


def failing(**_: object) -> object:
    raise KeyError("no such word")


@pytest.fixture
def three_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> Rollout:
    """Answers of 3, 1 and 2 counted tokens; T = 4."""
    rows = [
        Row("The", [50, 60, tiny_tokenizer.eos_token_id], True),
        Row("I", [70], False),
        Row("A", [80, 99, 90], False, masked=(1,)),
    ]
    return rollout_of(rows, tiny_tokenizer, right=1)


def call(result: object, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> RewardSignal:
    monkeypatch.setitem(globals(), "RESULT", [result])
    CALLS.clear()
    return CallableSource("tests.rewards.test_sources:returned")(rollout)


DENSE = [[1.0, 2.0, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0], [5.0, 0.0, 6.0, 0.0]]
RAGGED = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    "result",
    [
        RAGGED,
        tuple(tuple(row) for row in RAGGED),
        [torch.tensor(row) for row in RAGGED],
        [np.array(row) for row in RAGGED],
        [[torch.tensor(value) for value in row] for row in RAGGED],
        [[np.float32(value) for value in row] for row in RAGGED],
        [[1, 2, 3], [4], [5, 6]],
        torch.tensor(DENSE, requires_grad=True),
        torch.tensor(DENSE, dtype=torch.float64),
        np.array(DENSE),
    ],
)
def test_a_function_may_return_a_reward_for_each_token(
    result: object, three_rows: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal = call(result, three_rows, monkeypatch)
    assert signal.terminal_B is None and signal.dense_BT is not None
    assert signal.dense_BT.dtype == torch.float32 and not signal.dense_BT.requires_grad
    assert signal.dense_BT.tolist() == DENSE


@pytest.mark.parametrize(
    "result",
    [
        [1.5, -2, 0],
        (1.5, -2.0, 0.0),
        torch.tensor([1.5, -2, 0]),
        np.array([1.5, -2, 0]),
        [torch.tensor(1.5), -2, np.float32(0)],
    ],
)
def test_a_function_may_return_a_score_for_each_answer(
    result: object, three_rows: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal = call(result, three_rows, monkeypatch)
    assert signal.dense_BT is None and signal.terminal_B is not None and signal.terminal_B.tolist() == [1.5, -2, 0]


def test_a_function_may_return_a_signal(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    given = RewardSignal(dense_BT=torch.ones(3, 4), terminal_B=torch.ones(3))
    signal = call(given, three_rows, monkeypatch)
    assert signal.dense_BT is given.dense_BT and signal.terminal_B is given.terminal_B and signal.logits_BTC is None


def test_what_a_function_is_given(
    three_rows: Rollout, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    call([0.0] * 3, three_rows, monkeypatch)
    (given,) = CALLS
    assert given["prompts"] == ["The", "I", "A"]
    assert given["responses"] == list(three_rows.responses)
    assert given["response_ids"] == [[50, 60, tiny_tokenizer.eos_token_id], [70], [80, 90]]
    assert torch.equal(given["mask"], three_rows.mask_BT) and given["ended"] == [True, False, False]
    assert set(given) == {"prompts", "responses", "response_ids", "mask", "ended"}


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ([1.0, 2.0], "returned a list of 2"),
        ([[1.0, 2.0, 3.0], [4.0], [5.0]], "returned 1 rewards for answer 2, which has 2 tokens"),
        ([[1.0, 2.0, 3.0], 4.0, [5.0, 6.0]], "returned a float for answer 1"),
        ([[1.0, "2", 3.0], [4.0], [5.0, 6.0]], "returned a str among the rewards of answer 0"),
        ([1.0, None, 2.0], "returned a float for answer 0"),
        (torch.zeros(3, 3), r"returned a Tensor of shape \(3, 3\)"),
        (np.zeros((3, 1)), r"returned a Tensor of shape \(3, 1\)"),
    ],
)
def test_a_return_of_the_wrong_shape_is_refused_with_the_legal_ones(
    result: object, said: str, three_rows: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShapeError, match=said + r".*; wanted 3 numbers .* shape \(3,\) or \(3, 4\)"):
        call(result, three_rows, monkeypatch)


def test_an_error_inside_a_function_says_where_it_was_raised(three_rows: Rollout) -> None:
    source = CallableSource("collections:OrderedDict")
    source.function = failing
    with pytest.raises(DataError, match=r"raised KeyError: 'no such word' \(.*test_sources.py:\d+\)") as caught:
        source(three_rows)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rewards.py", "write it as 'package.module:function'"),
        ("tlcr.no_such:f", "there is no module 'tlcr.no_such'"),
        ("tlcr.errors:no_such", r"errors.py has no function 'no_such'"),
    ],
)
def test_a_function_that_cannot_be_imported(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"reward.callable is '{path}'.*{said}"):
        CallableSource(path)


# ---- random, combined, built


def test_random_rewards_are_reproducible_and_resume(three_rows: Rollout) -> None:
    source, again, other = RandomSource(3), RandomSource(3), RandomSource(4)
    first, second = source(three_rows).dense_BT, source(three_rows).dense_BT
    assert torch.equal(again(three_rows).dense_BT, first)
    assert not torch.equal(first, second) and not torch.equal(other(three_rows).dense_BT, first)
    resumed = RandomSource(3)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed(three_rows).dense_BT, second)
    with pytest.raises(CheckpointError, match="wanted the number of 'rollouts'"):
        resumed.load_state_dict({})


def test_random_rewards_are_uniform_and_leave_others_generators_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = rollout_of([Row("I", [50] * 4000, False)], tiny_tokenizer, right=1)
    state = torch.get_rng_state()
    values = RandomSource(0)(rollout).dense_BT[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert values[-1] == 0
    assert values.abs().max() <= 1 and values.mean().abs() < 0.05 and (values.std() - 3**-0.5).abs() < 0.02


def build(kind: str, **changes: Any) -> Any:
    options = {"policy_tokenizer": None, "data": DataConfig(max_prompt_tokens=5), "seed": 3, "micro_batch_size": 2}
    return build_reward_source(RewardConfig(kind=kind, **changes.pop("cfg", {})), **{**options, **changes})


@pytest.mark.parametrize("kind", ["continuous", "discrete", "sign", "positive_only", "negative_only", "sum_at_end"])
def test_kinds_that_read_a_discriminator(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = Rigged({})
    models = {"discriminator": LoadedModel(model, tiny_tokenizer), "policy_tokenizer": tiny_tokenizer}
    source = build(kind, **models)
    assert isinstance(source, DiscriminatorSource)
    assert source.frozen == FrozenModel(model, tiny_tokenizer, tiny_tokenizer, 5, 2)
    assert source.state_dict() == {}
    with pytest.raises(CheckpointError, match="DiscriminatorSource has no state"):
        source.load_state_dict({"rollouts": 3})
    with pytest.raises(ConfigError, match=f"reward.kind '{kind}' needs the discriminator"):
        build(kind)


def test_the_sequence_score_beside_another_source(
    tiny_tokenizer: PreTrainedTokenizerFast, reward_model: PreTrainedModel
) -> None:
    models = {"reward_model": LoadedModel(reward_model, tiny_tokenizer), "policy_tokenizer": tiny_tokenizer}
    source = build("random", cfg={"sequence_coef": 0.5}, **models)
    assert isinstance(source, CombinedSource)
    rollout = rollout_of(random_rows(tiny_tokenizer), tiny_tokenizer)
    signal = source(rollout)
    assert torch.equal(signal.dense_BT, RandomSource(3)(rollout).dense_BT) and signal.terminal_B is None
    alone = build("sequence", **models)
    assert torch.equal(signal.sequence_B, alone(rollout).terminal_B)
    assert source.state_dict() == {"rollouts": 1}
    source.load_state_dict({"rollouts": 0})
    assert torch.equal(source(rollout).dense_BT, signal.dense_BT)
    with pytest.raises(ConfigError, match=r"reward.sequence_coef 0.5 needs the reward_model"):
        build("random", cfg={"sequence_coef": 0.5})
    with pytest.raises(ConfigError, match=r"reward.kind 'sequence' needs the reward_model"):
        build("sequence")


def test_a_callable_is_imported_when_the_source_is_built() -> None:
    assert isinstance(build("callable", cfg={"callable": "tests.rewards.test_sources:returned"}), CallableSource)
    with pytest.raises(ConfigError, match="no module"):
        build("callable", cfg={"callable": "no_such_module:f"})


def test_a_function_may_write_into_what_it_is_given(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    before = three_rows.mask_BT.clone()

    def careless(*, response_ids: list[list[int]], mask: torch.Tensor, **_: object) -> list[float]:
        mask[:] = False
        for ids in response_ids:
            ids.clear()
        return [1.0] * len(response_ids)

    monkeypatch.setattr("tests.rewards.test_sources.returned", careless)
    signal = CallableSource("tests.rewards.test_sources:returned")(three_rows)
    assert torch.equal(three_rows.mask_BT, before) and signal.terminal_B.tolist() == [1.0] * len(before)


def test_a_function_that_ends_the_program_is_an_error(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.rewards.test_sources.returned", lambda **_: sys.exit(0))
    with pytest.raises(DataError, match="raised SystemExit: 0"):
        CallableSource("tests.rewards.test_sources:returned")(three_rows)


def test_a_function_does_not_speak_for_the_reward_model(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    scores_B = torch.ones(len(three_rows.prompts))
    with pytest.raises(ConfigError, match=r"set sequence_B, .* give a score of whole answers as terminal_B"):
        call(RewardSignal(terminal_B=scores_B, sequence_B=scores_B), three_rows, monkeypatch)


def test_complex_rewards_are_refused(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShapeError, match="returned a complex64 Tensor"):
        call(torch.ones(len(three_rows.prompts), dtype=torch.complex64), three_rows, monkeypatch)


def test_a_nan_from_a_function_is_named_when_composed(three_rows: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = call([[1.0, 2.0, 3.0], [float("nan")], [5.0, 6.0]], three_rows, monkeypatch)
    cfg = RewardConfig(kind="callable", callable="tests.rewards.test_sources:returned")
    with pytest.raises(
        DataError, match=r"\(tests.rewards.test_sources:returned\) gave 1 of 6 dense .* answer 1, token 0"
    ):
        compose_rewards(
            replace(signal),
            three_rows.mask_BT,
            ended_B=three_rows.ended_B,
            kl_BT=None,
            kl_coef=0.0,
            cfg=cfg,
            temperature=1.0,
            centre=None,
        )


def test_texts_longer_than_the_model_reads_are_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, reward_model: PreTrainedModel
) -> None:
    short = copy.deepcopy(reward_model)
    short.config.max_position_embeddings = 3
    models = {"reward_model": LoadedModel(short, tiny_tokenizer), "policy_tokenizer": tiny_tokenizer}
    with pytest.raises(DataError, match=r"reads at most 3 .*; lower data.max_prompt_tokens or rollout"):
        build("sequence", **models)(rollout_of(random_rows(tiny_tokenizer), tiny_tokenizer))


# ---- a reward model that is an encoder


@pytest.fixture
def encoder(tmp_path, tiny_tokenizer):
    """A random BERT with one output, loaded as a reward model."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tiny_tokenizer), num_labels=1, **small))
    torch.nn.init.normal_(model.classifier.weight)
    save_model(model, tiny_tokenizer, tmp_path / "encoder")
    return load_sequence_classifier(tmp_path / "encoder", ModelConfig())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sequence", "uniform"])
def test_an_encoder_gives_each_answer_the_score_of_its_own_forward_pass(encoder, tiny_tokenizer, kind):
    rollout = rollout_of(random_rows(tiny_tokenizer), tiny_tokenizer, left=2, right=3)
    truth = [
        encoder(input_ids=ids[mask][None]).logits.item()
        for ids, mask in zip(rollout.ids_BL, rollout.attention_mask_BL, strict=True)
    ]
    source = build_reward_source(
        RewardConfig(kind=kind),
        policy_tokenizer=tiny_tokenizer,
        reward_model=LoadedModel(encoder, tiny_tokenizer),
        data=DataConfig(),
        seed=0,
        micro_batch_size=2,
    )
    signal = source(rollout)
    scores = signal.terminal_B if kind == "sequence" else signal.dense_BT.sum(dim=1)
    torch.testing.assert_close(scores, torch.tensor(truth), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "prefix_difference"])
def test_credit_for_tokens_needs_a_decoder(encoder, tiny_tokenizer, kind):
    with pytest.raises(ConfigError, match=rf"reward.kind '{kind}' needs a reward model that is a decoder"):
        build_reward_source(
            RewardConfig(kind=kind),
            policy_tokenizer=tiny_tokenizer,
            reward_model=LoadedModel(encoder, tiny_tokenizer),
            data=DataConfig(),
            seed=0,
        )

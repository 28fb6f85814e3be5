"""Reward sources: from a rollout to what one judge says of it, whatever the judge's tokenizer.

A source that shares the policy's tokenizer reads the policy's very ids. Another one reads text, and its verdict is
brought back to the policy's tokens by the characters that they share. Nothing is weighed here: `tlcr.reward` does that.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import numbers
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config import DataConfig, RewardConfig
from tlcr.discriminator import token_logits
from tlcr.distributed import process_index
from tlcr.errors import CheckpointError, ConfigError, DataError, ShapeError
from tlcr.reward_model import sequence_scores
from tlcr.tokenization import character_spans, cut_answer, decode_text, encode_answers, render_prompt
from tlcr.types import EncodedAnswer, RewardSignal, Rollout

__all__ = [
    "CallableSource",
    "CombinedSource",
    "DiscriminatorSource",
    "RandomSource",
    "RewardSource",
    "SequenceRewardSource",
    "build_reward_source",
    "import_function",
    "same_tokenizer",
]

logger = logging.getLogger(__name__)


class RewardSource(Protocol):
    """Judges a rollout. Its state, JSON-able, is part of a checkpoint; most sources have none."""

    def __call__(self, rollout: Rollout) -> RewardSignal: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise CheckpointError(
                f"the saved reward source holds {sorted(state)}, but {type(self).__name__} has no state; "
                "resume with the reward config that the checkpoint was saved with"
            )


# ---- models as judges


@dataclass(frozen=True)
class Judge:
    """A frozen model with its tokenizer, and how much text it is given.

    The prompt keeps its last `max_prompt_tokens`, as in the judge's training; `micro_batch_size` answers are scored at
    a time, all of them by default.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    micro_batch_size: int | None = None

    @property
    def position_limit(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def shares_tokens(self) -> bool:
        return same_tokenizer(self.policy_tokenizer, self.tokenizer)


class DiscriminatorSource(_Stateless):
    """A token discriminator's logits at every response token, (B, T, C).

    With the policy's tokenizer: the logits at the token's own position, where the discriminator has seen it.

    With another tokenizer, policy token t, which writes the characters [s, e) of the answer, gets the mean of the
    logits of the discriminator's tokens, weighted by how many of those characters each of them writes:

        logits_t = sum_j w_tj logits_j / sum_j w_tj,      w_tj = |[s_t, e_t) and [s_j, e_j)|

    A policy token without characters of its own (a special token, a word-boundary mark) gets logits 0: neutral. The
    policy's end of sequence gets the logits of the discriminator's, where the policy ended its answer. A discriminator
    token may reach beyond the policy token that it judges; a reward may therefore know up to one discriminator token of
    the future. Source: ours.

    What the other tokenizer reads: the rollout's prompt without the policy's special tokens, except those that are
    special to the discriminator too (two models with one chat template), and with the discriminator's own
    beginning-of-sequence token. The roles that a foreign template writes as words stay, as words.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._same = judge.shares_tokens

    def __call__(self, rollout: Rollout) -> RewardSignal:
        judge, mask_BT = self.judge, rollout.mask_BT
        device = judge.model.device
        if self._same:
            P, L = rollout.prompt_ids_BP.shape[1], rollout.ids_BL.shape[1]
            logits_BTC = token_logits(
                judge.model,
                rollout.ids_BL.to(device),
                rollout.attention_mask_BL.to(device),
                slice(P, L),
                micro_batch_size=judge.micro_batch_size,
            )
            return RewardSignal(logits_BTC=logits_BTC.to(mask_BT.device))

        answers = _read_as_text(judge, rollout)
        ids_BL, mask_BL = _padded([answer.encoded.ids for answer in answers], judge.tokenizer)
        logits_BLC = token_logits(
            judge.model,
            ids_BL.to(device),
            mask_BL.to(device),
            slice(0, ids_BL.shape[1]),
            micro_batch_size=judge.micro_batch_size,
        ).to(mask_BT.device)
        logits_BTC = logits_BLC.new_zeros((*mask_BT.shape, logits_BLC.shape[-1]))
        for row, answer in enumerate(answers):
            weights = _shared_characters(judge, answer).to(logits_BLC)
            logits_BTC[row, mask_BT[row]] = (
                weights @ logits_BLC[row, answer.encoded.answer_start : len(answer.encoded.ids)]
            )
        return RewardSignal(logits_BTC=logits_BTC)


class SequenceRewardSource(_Stateless):
    """A sequence reward model's score of each answer, (B,), read at the answer's last token.

    With the policy's tokenizer it reads the policy's ids; with another, the text that `DiscriminatorSource` describes.
    The last token is the end of sequence where the policy ended its answer, else the last token of the cut answer.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._same = judge.shares_tokens

    def __call__(self, rollout: Rollout) -> RewardSignal:
        judge = self.judge
        if self._same:
            sequences: Sequence[Sequence[int]] = _counted(rollout.ids_BL, rollout.attention_mask_BL)
        else:
            sequences = [answer.encoded.ids for answer in _read_as_text(judge, rollout)]
        ids_BL, mask_BL = _padded(sequences, judge.tokenizer)
        device = judge.model.device
        terminal_B = sequence_scores(
            judge.model, ids_BL.to(device), mask_BL.to(device), micro_batch_size=judge.micro_batch_size
        )
        return RewardSignal(terminal_B=terminal_B.float().to(rollout.mask_BT.device))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same to both: equal vocabularies, and the same ends and beginnings of sequence.

    Names and folders say nothing: a fine-tuned model often carries a copy of its base's tokenizer, and sometimes a
    changed one. The padding token may differ, because no mask is read off ids.
    """
    return a is b or (
        a.eos_token_id == b.eos_token_id and a.bos_token_id == b.bos_token_id and a.get_vocab() == b.get_vocab()
    )


@dataclass(frozen=True)
class _TextAnswer:
    """One row of a rollout as text: the policy's tokens, the characters that they write, and the judge's tokens.

    `policy_ids` are the counted ones; the last of them is the end of sequence where `ended`.
    """

    policy_prompt_ids: list[int]
    policy_ids: list[int]
    ended: bool
    prompt: str
    text: str
    encoded: EncodedAnswer


def _read_as_text(judge: Judge, rollout: Rollout) -> list[_TextAnswer]:
    """The rollout as the judge's own tokens. See `DiscriminatorSource` for what becomes of special tokens."""
    policy = judge.policy_tokenizer
    unknown = sorted(_special_tokens(policy) - _special_tokens(judge.tokenizer), key=len, reverse=True)
    foreign = re.compile("|".join(map(re.escape, unknown)))
    prompts = [render_prompt(judge.tokenizer, foreign.sub("", prompt)) for prompt in rollout.prompts]
    prompt_ids = _counted(rollout.prompt_ids_BP, rollout.prompt_mask_BP)
    answer_ids = _counted(rollout.response_ids_BT, rollout.mask_BT)
    ended = [flag and len(ids) > 0 for flag, ids in zip(rollout.ended_B.tolist(), answer_ids, strict=True)]
    texts = [decode_text(policy, ids, context=context) for ids, context in zip(answer_ids, prompt_ids, strict=True)]
    encoded = encode_answers(
        judge.tokenizer, prompts, texts, max_prompt_tokens=judge.max_prompt_tokens, max_answer_tokens=None
    )
    fitted = [_fit(judge, row if end else _without_end(row)) for row, end in zip(encoded, ended, strict=True)]
    return list(map(_TextAnswer, prompt_ids, answer_ids, ended, prompts, texts, fitted))


def _counted(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row where the mask counts."""
    return [row[counts].tolist() for row, counts in zip(ids.cpu(), mask.cpu(), strict=True)]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _without_end(encoded: EncodedAnswer) -> EncodedAnswer:
    return EncodedAnswer(ids=encoded.ids[:-1], answer_start=encoded.answer_start, complete=False)


def _fit(judge: Judge, encoded: EncodedAnswer) -> EncodedAnswer:
    """Cut to the positions that the judge has: the prompt's beginning goes first, then the answer's end."""
    limit = judge.position_limit
    if limit is None or len(encoded.ids) <= limit:
        return encoded
    dropped = min(encoded.answer_start, len(encoded.ids) - limit)
    shorter = replace(encoded, ids=encoded.ids[dropped:], answer_start=encoded.answer_start - dropped)
    if len(shorter.ids) > limit:
        logger.warning(
            "an answer has %d tokens for %s, which has %d positions: what lies beyond earns nothing; "
            "lower rollout.max_new_tokens",
            len(shorter.ids),
            judge.model.name_or_path or type(judge.model).__name__,
            limit,
        )
    return cut_answer(shorter, limit - shorter.answer_start)


def _shared_characters(judge: Judge, answer: _TextAnswer) -> Tensor:
    """The weights (policy tokens, judge tokens) that carry the judge's logits over; a row sums to 1, or is all 0."""
    policy = character_spans(judge.policy_tokenizer, answer.policy_ids, context=answer.policy_prompt_ids)
    own = _judge_spans(judge, answer)
    policy_start, policy_end = torch.tensor(policy, dtype=torch.float64).reshape(-1, 2).unbind(1)
    start, end = torch.tensor(own, dtype=torch.float64).reshape(-1, 2).unbind(1)
    overlap = torch.minimum(policy_end[:, None], end) - torch.maximum(policy_start[:, None], start)
    weights = torch.zeros(len(answer.policy_ids), len(answer.encoded.answer_ids), dtype=torch.float64)
    weights[:, : len(own)] = overlap.clamp(min=0)
    if answer.ended and answer.encoded.complete:
        weights[-1, -1] = 1
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def _judge_spans(judge: Judge, answer: _TextAnswer) -> list[tuple[int, int]]:
    """For each of the judge's answer tokens, without its end of sequence, the characters of `answer.text` it writes.

    Decoding says it best, white space included. A tokenizer that changes text (lower case, Unicode forms) does not
    decode to what it read; then the offsets that it gave while reading are used.
    """
    encoded = answer.encoded
    content = encoded.answer_ids[:-1] if encoded.complete else encoded.answer_ids
    context = encoded.ids[: encoded.answer_start]
    written = decode_text(judge.tokenizer, content, context=context)
    if answer.text == written or (not encoded.complete and answer.text.startswith(written)):
        return character_spans(judge.tokenizer, content, context=context)
    read = judge.tokenizer(
        answer.prompt + answer.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    before = len(answer.prompt)
    spans = [(max(0, start - before), end - before) for start, end in read["offset_mapping"] if end > before]
    return spans[: len(content)]


def _padded(sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L), padded on the right; the mask comes from the lengths."""
    longest = max((len(ids) for ids in sequences), default=0)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids_BL = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in sequences], dtype=torch.long)
    mask_BL = torch.arange(longest) < torch.tensor([len(ids) for ids in sequences], dtype=torch.long)[:, None]
    return ids_BL.reshape(len(sequences), longest), mask_BL


# ---- sources without a model


class RandomSource(_Stateless):
    """Uniform in [-1, 1] for every token: the control that a real reward has to beat.

    Reproducible: the numbers follow from the seed, the process and how many rollouts were judged before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rollouts = 0

    def __call__(self, rollout: Rollout) -> RewardSignal:
        generator = np.random.default_rng((self.seed, process_index(), self.rollouts))
        self.rollouts += 1
        mask_BT = rollout.mask_BT
        dense = generator.uniform(-1.0, 1.0, size=tuple(mask_BT.shape))
        dense_BT = torch.as_tensor(dense, dtype=torch.float32, device=mask_BT.device)
        return RewardSignal(dense_BT=torch.where(mask_BT, dense_BT, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state.get("rollouts"), int):
            raise CheckpointError(
                f"the saved random rewards hold {dict(state)!r}, wanted the number of 'rollouts'; "
                "resume with the reward config that the checkpoint was saved with"
            )
        self.rollouts = state["rollouts"]


class CallableSource(_Stateless):
    """A function of the user's own, named 'package.module:function'.

    It is called with keywords, once for each rollout of a process:

        prompts         list of B strings, complete (template and special tokens in them)
        responses       list of B strings
        response_ids    list of B lists: the ids of the counted tokens, the end of sequence among them
        mask            (B, T) bool tensor on the CPU, True where a response token counts
        ended           list of B bools: False where the length limit cut the answer off

    and returns one of: B numbers (list, array or tensor), a score for each answer; B lists of numbers, as long as that
    row's `response_ids`, a reward for each token; a (B, T) array or tensor, the same padded; or a `RewardSignal`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = import_function(path, "reward.callable")

    def __call__(self, rollout: Rollout) -> RewardSignal:
        mask_BT = rollout.mask_BT.cpu()
        try:
            result = self.function(
                prompts=list(rollout.prompts),
                responses=list(rollout.responses),
                response_ids=_counted(rollout.response_ids_BT, mask_BT),
                mask=mask_BT,
                ended=rollout.ended_B.tolist(),
            )
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"reward.callable {self.path!r} raised {type(error).__name__}: {error} "
                f"({last.filename}:{last.lineno}); it is called with the keywords prompts, responses, response_ids, "
                "mask and ended"
            ) from error
        signal = self._signal(result, mask_BT)
        device = rollout.mask_BT.device
        given = {name: value.to(device) for name, value in vars(signal).items() if value is not None}
        return RewardSignal(**given)

    def _signal(self, result: object, mask_BT: Tensor) -> RewardSignal:
        if isinstance(result, RewardSignal):
            return result
        B, T = mask_BT.shape
        if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
            result = torch.as_tensor(result)
        if isinstance(result, Tensor):
            if result.shape == (B,):
                return RewardSignal(terminal_B=result.detach().float())
            if result.shape == (B, T):
                return RewardSignal(dense_BT=result.detach().float())
            raise self._wrong(f"a {type(result).__name__} of shape {tuple(result.shape)}", mask_BT)
        if not isinstance(result, (list, tuple)):
            raise self._wrong(f"a {type(result).__name__}", mask_BT)
        rows = [row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row for row in result]
        if len(rows) != B:
            raise self._wrong(f"a {type(result).__name__} of {len(rows)}", mask_BT)
        if all(isinstance(row, numbers.Real) for row in rows):
            return RewardSignal(terminal_B=torch.tensor(rows, dtype=torch.float32))
        dense_BT = torch.zeros(B, T)
        for b, row in enumerate(rows):
            if not isinstance(row, (list, tuple)):
                raise self._wrong(f"a {type(row).__name__} for answer {b}", mask_BT)
            values = [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in row]
            wrong = [value for value in values if not isinstance(value, numbers.Real)]
            if wrong:
                raise self._wrong(f"a {type(wrong[0]).__name__} among the rewards of answer {b}", mask_BT)
            if len(values) != int(mask_BT[b].sum()):
                raise self._wrong(
                    f"{len(values)} rewards for answer {b}, which has {int(mask_BT[b].sum())} tokens", mask_BT
                )
            dense_BT[b, mask_BT[b]] = torch.tensor(values, dtype=torch.float32)
        return RewardSignal(dense_BT=dense_BT)

    def _wrong(self, got: str, mask_BT: Tensor) -> ShapeError:
        B, T = mask_BT.shape
        return ShapeError(
            f"reward.callable {self.path!r} returned {got}; wanted {B} numbers (a score for each answer), {B} lists of "
            f"numbers as long as the lists in response_ids (a reward for each token), or an array or tensor of shape "
            f"({B},) or ({B}, {T}) as the mask has it"
        )


def import_function(path: str, knob: str) -> Callable[..., Any]:
    """The function that 'package.module:function' or 'folder/file.py:function' names; importing it runs that code.

    Raises ConfigError, naming the knob, where the path is malformed, or the module or the function is not there.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{knob} is {path!r}; write it as 'package.module:function' or 'folder/file.py:function'")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError as error:
        raise ConfigError(f"{knob} is {path!r}, but there is no file {place!r} here ({Path.cwd()})") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{knob} is {path!r}, but there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{knob} is {path!r}, but {module.__file__ or place} has no function {name!r}")
    return function


def _load_file(path: Path) -> ModuleType:
    """The module in a file, under a name that no package has."""
    spec = importlib.util.spec_from_file_location(f"tlcr_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # so for every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- sources together


class CombinedSource:
    """A source, and beside it the sequence reward model's score, for `reward.sequence_coef` to weigh."""

    def __init__(self, source: RewardSource, sequence: SequenceRewardSource) -> None:
        self.source = source
        self.sequence = sequence

    def __call__(self, rollout: Rollout) -> RewardSignal:
        return replace(self.source(rollout), sequence_B=self.sequence(rollout).terminal_B)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)


def build_reward_source(
    cfg: RewardConfig,
    *,
    policy_tokenizer: PreTrainedTokenizerBase,
    discriminator: PreTrainedModel | None,
    discriminator_tokenizer: PreTrainedTokenizerBase | None,
    reward_model: PreTrainedModel | None,
    reward_model_tokenizer: PreTrainedTokenizerBase | None,
    data: DataConfig,
    seed: int,
    micro_batch_size: int | None = None,
) -> RewardSource:
    """The source that `cfg.kind` asks for, with the sequence reward model beside it where `cfg.sequence_coef` is not 0.

    Models that the kind does not need may be None. `micro_batch_size` answers are scored at a time, all by default.
    Raises ConfigError where a model that the kind needs is missing, or its callable cannot be imported.
    """

    def judge(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, name: str, why: str) -> Judge:
        if model is None or tokenizer is None:
            raise ConfigError(
                f"{why} needs the {name}, but there is none; train it (set {name}.enabled: true) or name a trained one "
                f"in {name}.path"
            )
        return Judge(model, tokenizer, policy_tokenizer, data.max_prompt_tokens, micro_batch_size)

    def sequence(why: str) -> SequenceRewardSource:
        return SequenceRewardSource(judge(reward_model, reward_model_tokenizer, "reward_model", why))

    kind = f"reward.kind {cfg.kind!r}"
    source: RewardSource
    if cfg.kind == "random":
        source = RandomSource(seed)
    elif cfg.kind == "callable":
        if cfg.callable is None:
            raise ConfigError(f"{kind} needs reward.callable; write it as 'package.module:function'")
        source = CallableSource(cfg.callable)
    elif cfg.kind == "sequence":
        source = sequence(kind)
    else:
        source = DiscriminatorSource(judge(discriminator, discriminator_tokenizer, "discriminator", kind))
    if cfg.sequence_coef == 0:
        return source
    return CombinedSource(source, sequence(f"reward.sequence_coef {cfg.sequence_coef}"))

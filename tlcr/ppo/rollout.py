"""Rollouts: prompts to sampled answers, or to conversations of which the answers are sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.functions import import_environment
from tlcr.config.schema import RolloutConfig
from tlcr.engines import Answer, Engine, Sampling, build_engine
from tlcr.errors import BackendUnavailable, DataError
from tlcr.models.ends import end_of_sequence_ids
from tlcr.models.positions import CONVERSATION_LIMITS, ROLLOUT_LIMITS, check_fits
from tlcr.ppo.conversation import Conversation, Environment, Turn, converse
from tlcr.text.padding import pad_left, pad_right
from tlcr.text.tokenization import decode_text, start_of_text
from tlcr.training.sharding import device_of
from tlcr.types import Rollout

ROUNDING = 1e-3
"""How far above 0 rounding may put the log-probability of a certain token."""


class PromptStream:
    """An endless stream of the prompts, each pass in a new order that depends only on the seed and the pass.

    Its only state is `cursor`, the number of prompts returned so far.
    """

    def __init__(self, prompts: Sequence[str], seed: int, cursor: int = 0) -> None:
        if not prompts:
            raise DataError("there are no prompts to roll out; name a source with data.prompts or data.preferences")
        self.texts = prompts
        self._seed = seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)
        self.cursor = cursor

    def take(self, count: int) -> list[str]:
        """The next `count` prompts."""
        taken = [self._at(position) for position in range(self.cursor, self.cursor + count)]
        self.cursor += count
        return taken

    def _at(self, position: int) -> str:
        number, place = divmod(position, len(self.texts))
        if number != self._pass:
            generator = seeded_generator("prompts", self._seed, number)
            self._pass, self._order = number, torch.randperm(len(self.texts), generator=generator)
        return self.texts[int(self._order[place])]


@torch.no_grad()
def generate(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    cfg: RolloutConfig,
    *,
    max_prompt_tokens: int,
    generator: torch.Generator | None = None,
    logprobs: bool = False,
    engine: Engine | None = None,
    environment: Environment | None = None,
) -> Rollout:
    """Sample one answer for each prompt, at ``cfg.temperature``, until the end of sequence or ``cfg.max_new_tokens``.

    ``cfg.engine`` samples. Only the settings of ``cfg`` shape the distribution: sampling defaults that came with the
    model (top-p, penalties) do not apply. The end of sequence is the tokenizer's (``end_of_sequence_ids``); it is
    the last counted action of an answer that ended.

    With an environment each row is a conversation, of up to ``cfg.max_turns`` answers (``converse``).

    Args:
        policy: the model itself, not a data-parallel wrapper.
        tokenizer: the policy's tokenizer.
        prompts: complete texts.
        cfg: temperature, truncation of the distribution and the limit of new tokens.
        max_prompt_tokens: a longer prompt keeps its end.
        generator: the source of randomness; None: torch's global state.
        logprobs: also keep the log-probabilities that the tokens were drawn with, as the engine reports them.
        engine: samples, with the policy's weights; None: one that is made for this call by ``cfg.engine``.
        environment: turns answers into messages; None: the one that ``cfg.environment`` names, if any.

    Returns:
        The answers; prompts are padded on the left and responses on the right.

    Raises:
        DataError: there are no prompts, or one has no token that is not padding; or the environment failed.
        ConfigError: ``cfg.engine`` cannot run this policy.
        BackendUnavailable: the engine gave no answer to some prompts, or no usable log-probabilities.
    """
    if not prompts:
        raise DataError("there are no prompts to answer; check data.prompts, data.held_out and evaluation.prompts")
    end_ids = end_of_sequence_ids(policy, tokenizer)
    prompt_ids = _encode_prompts(tokenizer, prompts, max_prompt_tokens)
    if environment is None and cfg.environment is not None:
        environment = import_environment(cfg.environment)
    check_answers_fit(policy, max((len(ids) for ids in prompt_ids), default=0), cfg, environment)
    sampling = Sampling(
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        end_ids=tuple(end_ids),
        pad_id=tokenizer.pad_token_id,
        batch_size=cfg.batch_size,
        logprobs=logprobs,
    )
    if engine is None:
        engine = build_engine(cfg, policy)
        engine.refresh()
    sampler = engine

    def sample(contexts: Sequence[Sequence[int]]) -> list[Turn]:
        return [_turn(answer, sampling, cfg.engine) for answer in sampler.sample(contexts, sampling, generator)]

    conversations = converse(prompts, prompt_ids, tokenizer, cfg, sample=sample, environment=environment)
    prompt_ids_BP, prompt_mask_BP = pad_left(prompt_ids, tokenizer.pad_token_id)
    response_ids_BT, read_BT = pad_right([conversation.ids for conversation in conversations], tokenizer.pad_token_id)
    mask_BT = torch.zeros_like(read_BT)
    mask_BT[read_BT] = torch.tensor([acted for conversation in conversations for acted in conversation.acted])
    device = device_of(policy)  # a batch ahead is finished when the weights may be shards again
    return Rollout(
        prompts=tuple(prompts),
        responses=tuple(
            decode_text(tokenizer, conversation.ids, context=context)
            for context, conversation in zip(prompt_ids, conversations, strict=True)
        ),
        prompt_ids_BP=prompt_ids_BP.to(device),
        prompt_mask_BP=prompt_mask_BP.to(device),
        response_ids_BT=response_ids_BT.to(device),
        mask_BT=mask_BT.to(device),
        ended_B=torch.tensor([conversation.ended for conversation in conversations], device=device),
        engine_logprobs_BT=_logprobs_of(conversations, mask_BT, cfg.engine).to(device) if logprobs else None,
        messages_BT=None if environment is None else (read_BT & ~mask_BT).to(device),
    )


def check_answers_fit(
    policy: PreTrainedModel, prompt_tokens: int, cfg: RolloutConfig, environment: Environment | None
) -> None:
    """Raises DataError where a prompt of so many tokens, with an answer or a conversation of full length, is longer
    than the policy can read.

    Args:
        policy: the policy.
        prompt_tokens: tokens of the longest prompt.
        cfg: how long an answer and a conversation may be.
        environment: what answers the policy; None: the one that ``cfg.environment`` names, and without one an answer is
            all that follows a prompt.
    """
    if environment is None and cfg.environment is None:
        longest = prompt_tokens + cfg.max_new_tokens
        check_fits(policy, longest, "a prompt with an answer of full length", ROLLOUT_LIMITS)
    else:
        longest = prompt_tokens + cfg.max_conversation_tokens
        check_fits(policy, longest, "a prompt with a conversation of full length", CONVERSATION_LIMITS)


def seeded_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on its arguments only, so that a resumed run need not save its state."""
    state = 0
    for part in (*purpose.encode(), *numbers):
        # SplitMix64's finaliser: neighbouring seeds give unrelated streams (Steele, Lea and Flood 2014).
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_prompt_tokens: int
) -> list[list[int]]:
    start = start_of_text(tokenizer)
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    # The first action is judged at the column before it: a prompt without a token needs one.
    encoded = [ids or [tokenizer.convert_tokens_to_ids(start)] for ids in encoded]
    meaningful = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    for index, ids in enumerate(encoded):
        if all(token == tokenizer.pad_token_id and token not in meaningful for token in ids):
            raise DataError(
                f"prompt {index} is {prompts[index]!r}, which has no token but padding; there is nothing to answer: "
                "drop it, or begin every prompt with the beginning-of-sequence token"
            )
    return [ids[-max_prompt_tokens:] for ids in encoded]


def _turn(answer: Answer, sampling: Sampling, engine: str) -> Turn:
    """An answer cut after its first end of sequence. Only that one is found by its id: what follows it is dropped, also
    where padding and end of sequence share an id."""
    ids = answer.ids_T.tolist()
    end = next((place for place, token in enumerate(ids) if token in sampling.end_ids), None)
    length = len(ids) if end is None else end + 1
    if sampling.logprobs and (answer.logprobs_T is None or len(answer.logprobs_T) != len(ids)):
        found = "no" if answer.logprobs_T is None else f"{len(answer.logprobs_T)}"
        raise BackendUnavailable(
            f"rollout.engine {engine!r} gave {found} log-probabilities for an answer of {len(ids)} tokens; set "
            "rollout.engine: generate"
        )
    logprobs = [] if answer.logprobs_T is None else answer.logprobs_T[:length].tolist()
    return Turn(ids[:length], end is not None, logprobs)


def _logprobs_of(conversations: Sequence[Conversation], mask_BT: Tensor, engine: str) -> Tensor:
    """The engine's log-probabilities of the actions, 0 elsewhere. The one place that they are checked."""
    given_N = torch.tensor([x for conversation in conversations for x in conversation.logprobs], dtype=torch.float32)
    impossible_N = given_N[~(given_N.isfinite() & (given_N <= ROUNDING))]
    if len(impossible_N):
        raise BackendUnavailable(
            f"rollout.engine {engine!r} gave log-probabilities that no drawn token can have for {len(impossible_N)} of "
            f"{len(given_N)} tokens, such as {float(impossible_N[0])}; set rollout.engine: generate, or see to "
            "the engine's weights and dtype"
        )
    logprobs_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)
    logprobs_BT[mask_BT] = given_N
    return logprobs_BT

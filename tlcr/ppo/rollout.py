"""Rollouts: prompts to sampled answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RolloutConfig
from tlcr.errors import BackendUnavailable, DataError
from tlcr.models.loading import check_fits, end_of_sequence_ids
from tlcr.ppo.engines import Answer, Engine, Sampling, build_engine
from tlcr.text.padding import pad_left
from tlcr.text.tokenization import decode_text, start_of_text
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
) -> Rollout:
    """Sample one answer for each prompt, at ``cfg.temperature``, until the end of sequence or ``cfg.max_new_tokens``.

    ``cfg.engine`` samples. Only the settings of ``cfg`` shape the distribution: sampling defaults that came with the
    model (top-p, penalties) do not apply. The end of sequence is the tokenizer's, or any that the model's generation
    config names; it is the last counted action of an answer that ended.

    Args:
        policy: the model itself, not a data-parallel wrapper.
        tokenizer: the policy's tokenizer.
        prompts: complete texts.
        cfg: temperature, truncation of the distribution and the limit of new tokens.
        max_prompt_tokens: a longer prompt keeps its end.
        generator: the source of randomness; None: torch's global state.
        logprobs: also keep the log-probabilities that the tokens were drawn with, as the engine reports them.
        engine: samples, with the policy's weights; None: one that is made for this call by ``cfg.engine``.

    Returns:
        The answers; prompts are padded on the left and responses on the right.

    Raises:
        DataError: there are no prompts, or one has no token that is not padding.
        ConfigError: ``cfg.engine`` cannot run this policy.
        BackendUnavailable: the engine gave no answer to some prompts, or no usable log-probabilities.
    """
    if not prompts:
        raise DataError("there are no prompts to answer; check data.prompts, data.held_out and evaluation.prompts")
    end_ids = end_of_sequence_ids(policy, tokenizer)
    prompt_ids = _encode_prompts(tokenizer, prompts, max_prompt_tokens)
    longest = max((len(ids) for ids in prompt_ids), default=0) + cfg.max_new_tokens
    check_fits(policy, longest, "a prompt with an answer of full length")
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
    with _seeded_by(generator, policy.device):
        answers = engine.sample(prompt_ids, sampling)
    response_ids_BT, mask_BT, ended_B = _cut_at_end(
        [answer.ids_T for answer in answers], end_ids, tokenizer.pad_token_id
    )
    prompt_ids_BP, prompt_mask_BP = pad_left(prompt_ids, tokenizer.pad_token_id)
    return Rollout(
        prompts=tuple(prompts),
        responses=tuple(
            decode_text(tokenizer, ids[:length], context=prompt)
            for prompt, ids, length in zip(
                prompt_ids, response_ids_BT.tolist(), mask_BT.sum(dim=1).tolist(), strict=True
            )
        ),
        prompt_ids_BP=prompt_ids_BP.to(policy.device),
        prompt_mask_BP=prompt_mask_BP.to(policy.device),
        response_ids_BT=response_ids_BT,
        mask_BT=mask_BT,
        ended_B=ended_B,
        engine_logprobs_BT=_logprobs_of(answers, mask_BT, cfg.engine) if logprobs else None,
    )


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


def _cut_at_end(answers: Sequence[Tensor], end_ids: Sequence[int], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and `ended` of answers cut after their first end of sequence. Only that one is found by its
    id: everything after it is padding, also where padding and end of sequence share an id."""
    sampled_BT = torch.nn.utils.rnn.pad_sequence(list(answers), batch_first=True, padding_value=pad_id)
    is_end_BT = torch.isin(sampled_BT, torch.tensor(end_ids, device=sampled_BT.device))
    width_B = torch.tensor([len(answer) for answer in answers], device=sampled_BT.device)
    columns_T = torch.arange(sampled_BT.shape[1], device=sampled_BT.device)
    is_end_BT &= columns_T < width_B.unsqueeze(1)
    ended_B = is_end_BT.any(dim=1)
    length_B = torch.where(ended_B, is_end_BT.int().argmax(dim=1) + 1, width_B)
    longest = int(length_B.max())
    mask_BT = columns_T[:longest] < length_B.unsqueeze(1)
    return torch.where(mask_BT, sampled_BT[:, :longest], pad_id), mask_BT, ended_B


def _logprobs_of(answers: Sequence[Answer], mask_BT: Tensor, engine: str) -> Tensor:
    """The engine's log-probabilities of the counted tokens, 0 elsewhere. The one place that they are checked."""
    logprobs_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    for row_T, answer in zip(logprobs_BT, answers, strict=True):
        given_T = answer.logprobs_T
        if given_T is None or given_T.shape != answer.ids_T.shape:
            found = "no" if given_T is None else f"{len(given_T)}"
            raise BackendUnavailable(
                f"rollout.engine {engine!r} gave {found} log-probabilities for an answer of {len(answer.ids_T)} "
                "tokens; set rollout.engine: generate"
            )
        width = min(len(given_T), len(row_T))
        row_T[:width] = given_T[:width]
    possible_BT = logprobs_BT.isfinite() & (logprobs_BT <= ROUNDING)
    impossible_N = logprobs_BT[mask_BT & ~possible_BT]
    if len(impossible_N):
        raise BackendUnavailable(
            f"rollout.engine {engine!r} gave log-probabilities that no drawn token can have for {len(impossible_N)} of "
            f"{int(mask_BT.sum())} tokens, such as {float(impossible_N[0])}; set rollout.engine: generate, or see to "
            "the engine's weights and dtype"
        )
    return torch.where(mask_BT, logprobs_BT, 0.0)


@contextmanager
def _seeded_by(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

"""Engines: the same greedy answers from each, log-probabilities of the trainer, and nothing kept from call to call."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.ppo.helpers import StopAt, Stopped, run_ppo, small_config
from tlcr.config.schema import EngineName, RolloutConfig
from tlcr.engines import Engine, Sampling, build_engine
from tlcr.engines.paged import Paged, fault_of
from tlcr.errors import BackendUnavailable, CheckpointError, ConfigError
from tlcr.models import attention
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.rollout import generate
from tlcr.ppo.scores import score_rollout
from tlcr.text.padding import pad_left, pad_right
from tlcr.training.metrics import read_metrics
from tlcr.types import Rollout

LM = Callable[..., PreTrainedModel]
ENGINES = [name for name in get_args(EngineName) if name not in ("vllm", "server", "auto")]
PROMPTS = [[5, 9, 30], [7, 44, 12, 90, 33], [8], [61, 62], list(range(100, 119)), [5, 9, 31, 7], [99, 3, 14]]
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "end_ids": (2,),
        "pad_id": 0,
        "batch_size": 3,
    }
    return Sampling(**(settings | changes))


def lively(
    kind: type[PreTrainedModel] = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any
) -> PreTrainedModel:
    """A small model whose weights are large enough for answers to differ from token to token."""
    torch.manual_seed(4)
    return kind(config(**(SIZES | changes))).eval()


def answers(engine: Engine, how: Sampling) -> list[list[int]]:
    """Up to the first end of sequence, as the protocol says."""
    found = []
    for answer in engine.sample(PROMPTS, how):
        ids = answer.ids_T.tolist()
        ends = [place for place, token in enumerate(ids) if token in how.end_ids]
        found.append(ids[: ends[0] + 1] if ends else ids)
    return found


def one_at_a_time(policy: PreTrainedModel, how: Sampling) -> list[list[int]]:
    """The most probable answers, by forward passes over whole prefixes, without padding or a cache."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + how.max_new_tokens and (ids == prompt or ids[-1] not in how.end_ids):
            with torch.no_grad():
                ids.append(int(policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


# ---- answers


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lively, id="llama"),
        pytest.param(lambda: lively(MistralForCausalLM, MistralConfig, sliding_window=8), id="sliding window"),
        pytest.param(lambda: lively(Gemma2ForCausalLM, Gemma2Config, sliding_window=8, head_dim=8), id="two kinds"),
    ],
)
def test_every_prompt_gets_the_most_probable_answer(name: EngineName, make: LM) -> None:
    policy = make()
    if name == "paged" and policy.config._attn_implementation == "sdpa":
        policy.set_attn_implementation(attention.NAME)  # as models are loaded
    ends = sorted({answer[4] for answer in one_at_a_time(policy, sampling())})[:2]  # so that some end early
    how = sampling(end_ids=tuple(ends))
    wanted = one_at_a_time(policy, how)
    lengths = {len(answer) for answer in wanted}
    assert len(lengths) > 1 and max(lengths) == 12
    assert answers(build_engine(RolloutConfig(engine=name), policy), how) == wanted


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_that_the_trainer_reads(name: EngineName, temperature: float) -> None:
    policy = lively()
    engine = build_engine(RolloutConfig(engine=name), policy)
    torch.manual_seed(1)
    sampled = engine.sample(PROMPTS, sampling(temperature=temperature, end_ids=(2, 7, 9, 40), logprobs=True))
    ids = [answer.ids_T.tolist() for answer in sampled]
    torch.manual_seed(1)
    silent = engine.sample(PROMPTS, sampling(temperature=temperature, end_ids=(2, 7, 9, 40)))
    assert [answer.ids_T.tolist() for answer in silent] == ids and all(a.logprobs_T is None for a in silent)
    prompt_ids_BP, prompt_mask_BP = pad_left(PROMPTS, 0)
    response_ids_BT, mask_BT = pad_right(ids, 0)
    texts = tuple(map(str, range(len(ids))))
    rollout = Rollout(
        texts, texts, prompt_ids_BP, prompt_mask_BP, response_ids_BT, mask_BT, torch.zeros(len(ids), dtype=torch.bool)
    )
    scores = score_rollout(
        ActorCritic(policy, None), lively(), rollout, temperature=temperature, micro_batch_size=None, exact_kl=False
    )
    for answer, logprobs_T, end in zip(sampled, scores.logprobs_BT, lengths(ids, (2, 7, 9, 40)), strict=True):
        assert answer.logprobs_T is not None and answer.logprobs_T.shape == answer.ids_T.shape
        torch.testing.assert_close(answer.logprobs_T[:end], logprobs_T[:end], rtol=0, atol=1e-5)


def lengths(ids: list[list[int]], ends: tuple[int, ...]) -> list[int]:
    return [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in ids]


@pytest.mark.parametrize("name", ENGINES)
def test_log_probs_are_of_the_truncated_distribution_where_it_is_truncated(name: EngineName) -> None:
    policy = lively()
    how = sampling(temperature=1.0, top_k=1, max_new_tokens=4, logprobs=True)
    for answer in build_engine(RolloutConfig(engine=name), policy).sample(PROMPTS[:3], how):
        assert answer.logprobs_T is not None and torch.equal(answer.logprobs_T, torch.zeros(len(answer.ids_T)))


@pytest.mark.parametrize("name", ENGINES)
def test_torchs_seed_decides_the_answers(name: EngineName) -> None:
    engine, how = build_engine(RolloutConfig(engine=name), lively()), sampling(temperature=1.0, max_new_tokens=6)

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return answers(engine, how)

    first = drawn(1)
    assert drawn(1) == first and drawn(2) != first


# ---- from one call to the next


@pytest.mark.parametrize("name", ENGINES)
def test_weights_that_were_updated_are_those_that_answer(name: EngineName) -> None:
    """An engine built before the update, and called before it, with the same prompts."""
    policy, how = lively(), sampling()
    engine = build_engine(RolloutConfig(engine=name), policy)
    before = answers(engine, how)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    after = answers(engine, how)
    assert after == one_at_a_time(policy, how)
    assert sum(a != b for a, b in zip(before, after, strict=True)) > len(PROMPTS) / 2


def test_a_call_of_paged_leaves_no_pages_no_thread_and_the_models_own_attention(tiny_causal_lm: LM) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    policy = lively()
    policy.set_attn_implementation(attention.NAME)
    own, threads, attributes = policy.generation_config, threading.active_count(), set(vars(policy))
    large: list[int] = []

    def look(*_: Any) -> None:
        large.extend(cache.cache_tensor.numel() for cache in pages())

    def pages() -> list[Any]:
        return [found for found in gc.get_objects() if type(found) is PagedAttentionCache]

    hook = policy.register_forward_hook(look)
    build_engine(RolloutConfig(engine="paged"), policy).sample(PROMPTS, sampling(max_new_tokens=2))
    hook.remove()
    gc.collect()
    assert large and min(large) > 0 and pages() == []
    assert threading.active_count() == threads
    assert policy.config._attn_implementation == attention.NAME and policy.generation_config is own
    assert set(vars(policy)) == attributes


def test_memory_of_paged_is_that_of_the_answers_under_way() -> None:
    """Not a share of the machine's, as transformers takes by itself."""
    policy = lively()
    pages: set[int] = set()

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        pages.add(kwargs["cache"].num_blocks if "cache" in kwargs else kwargs["past_key_values"].num_blocks)

    policy.register_forward_hook(look, with_kwargs=True)
    build_engine(RolloutConfig(engine="paged"), policy).sample(PROMPTS, sampling(max_new_tokens=2, batch_size=3))
    assert pages == {3}


# ---- what cannot run


@pytest.mark.parametrize(
    ("config", "kind", "attention_implementation", "says"),
    [
        (FalconConfig(hidden_size=32, num_attention_heads=4), FalconForCausalLM, "sdpa", "cannot run Falcon"),
        (MambaConfig(hidden_size=32), MambaForCausalLM, "eager", "linear_attention"),
        (LlamaConfig(**SIZES), LlamaForCausalLM, "flex_attention", "'flex_attention' has no paged form"),
    ],
    ids=["its cache", "its layers", "its attention"],
)
def test_what_continuous_batching_cannot_run_is_refused_in_one_line(
    config: Any, kind: type[PreTrainedModel], attention_implementation: str, says: str
) -> None:
    config._attn_implementation = attention_implementation
    fault = fault_of(config, kind)
    assert fault is not None and says in fault and "\n" not in fault


def test_a_model_that_would_be_computed_otherwise_is_refused() -> None:
    class Backwards(LlamaForCausalLM):
        """Reads positions from the end of a row, which are others in a row that several prompts share."""

        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **more: Any) -> Any:
            length = input_ids.shape[1]
            return super().forward(input_ids, position_ids=torch.arange(length - 1, -1, -1)[None], **more)

    with pytest.raises(
        ConfigError,
        match=r"'paged', and transformers' continuous batching computes something else than Backwards does; set "
        r"engine: generate",
    ):
        Paged(Backwards(LlamaConfig(**SIZES)).eval())


def test_prompts_without_an_answer_are_an_error_with_its_reason() -> None:
    policy = lively()
    engine = build_engine(RolloutConfig(engine="paged"), policy)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nin a kernel")

    policy.register_forward_pre_hook(fail)
    said = r"no answer to 7 of 7 prompts \(out of memory.*; set engine"
    with pytest.raises(BackendUnavailable, match=said) as caught:
        engine.sample(PROMPTS, sampling())
    assert "\n" not in str(caught.value)


# ---- in training


def test_ppo_trains_and_resumes_with_another_engine_and_does_not_change_it_halfway(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cfg = small_config(updates=2, save_every=1)
    paged = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, engine="paged"))

    _, whole = run_ppo(paged, tiny_causal_lm, tiny_tokenizer, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_ppo(paged, tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", callbacks=[StopAt(1)])
    with pytest.raises(CheckpointError, match=r"rollout.engine was paged and is None"):
        run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", resume=True)
    _, resumed = run_ppo(paged, tiny_causal_lm, tiny_tokenizer, tmp_path / "cut", resume=True)

    def figures(name: str) -> list[Any]:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: row[key] for key in row if not key.startswith("time")} for row in rows]

    assert figures("cut") == figures("whole") and len(figures("whole")) == 2
    assert resumed.updates == whole.updates == 2


def test_a_rollout_is_made_by_the_engine_that_the_config_names(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = tiny_causal_lm(), []
    kept = type(policy).generate_batch
    monkeypatch.setattr(
        type(policy), "generate_batch", lambda self, **k: calls.append(len(k["inputs"])) or kept(self, **k)
    )
    build_engine(RolloutConfig(engine="paged"), policy)
    calls.clear()
    cfg = RolloutConfig(max_new_tokens=4, batch_size=2, engine="paged")
    rollout = generate(policy, tiny_tokenizer, ["The food", "was", "good"], cfg, max_prompt_tokens=8)
    assert calls == [3] and rollout.mask_BT.shape[0] == 3

"""vLLM in this process: token ids in, token ids and log-probabilities out, weights handed over one after the other.

Nothing outside this module imports vllm. One engine of it is started for a process and an architecture, with random
weights, and stays: `refresh` replaces its weights in place, and whoever refreshed last has it. Of a policy with an
adapter it gets the weights that the adapter stands on once, and then the adapter alone. It needs vLLM in the trainer's
environment, and so the versions of torch and transformers that vLLM asks for.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tlcr.config.schema import EngineConfig
from tlcr.engines.probe import NotThePolicys, Probe, check_probe, probe_prompt, probe_sampling
from tlcr.engines.protocol import Answer, Sampling
from tlcr.errors import BackendUnavailable
from tlcr.models.faults import one_line
from tlcr.models.lora.adapters import adapter_of
from tlcr.models.lora.files import adapter_weights, whole_weights, write_adapter
from tlcr.models.positions import position_limit
from tlcr.training.distributed import process_count
from tlcr.training.profiling import part

logger = logging.getLogger(__name__)

REMEDY = "set engine: generate, or server with vLLM in an environment of its own"


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM can be started for."""


class _Running:
    """A vLLM of this process, the engine whose policy's weights it has, and the adapter among them."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.owner, self.adapter = llm, None, None  # type: Any, Any, Any


_running: dict[str, _Running] = {}
_refused: set[str] = set()
"""What vLLM could not be started for with adapters."""
_adapter_numbers = itertools.count(1)


class VLLM:
    """``vllm.LLM`` beside the trainer.

    Args:
        cfg: the answers under way at a time, and the sampling that probes use too.
        policy: the model itself, not a data-parallel wrapper.

    Raises:
        BackendUnavailable: vllm is not installed, does not run the architecture, or several processes train.
    """

    def __init__(self, cfg: EngineConfig, policy: PreTrainedModel) -> None:
        if process_count() > 1:
            raise BackendUnavailable(f"engine 'vllm' runs in one process, and {process_count()} train here; {REMEDY}")
        self._cfg, self._policy = cfg, policy
        self._probe: Probe | None = None
        self._rank = _rank_of(policy)
        try:
            self._there = _start(cfg, policy, self._rank)
        except BackendUnavailable as error:
            if self._rank is None:
                raise
            self._merge_from_now_on(error)
            self._there = _start(cfg, policy, None)

    def refresh(self) -> None:
        """See ``Engine``."""
        there = self._there
        has_base = there.owner is self and there.adapter is not None
        there.owner = self
        with part("rollout: weights to vLLM"):
            if there.adapter is not None:
                there.llm.llm_engine.remove_lora(there.adapter.lora_int_id)
                there.adapter = None
            if self._rank is not None:
                if not has_base:
                    self._give(whole_weights(self._policy, merged=False))
                self._give_adapter()
            if self._rank is None:
                self._give(whole_weights(self._policy))
            there.llm.reset_prefix_cache()
        how = probe_sampling(self._cfg)
        (answer,) = self._answers([probe_prompt(self._policy)], how, [0])
        assert answer.logprobs_T is not None
        try:
            self._probe = check_probe(self._policy, how, answer.ids_T.tolist(), answer.logprobs_T.tolist(), self._probe)
        except NotThePolicys as error:
            raise BackendUnavailable(f"the vLLM in this process {error}; {REMEDY}") from error

    def _give(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._there.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _give_adapter(self) -> None:
        from vllm.lora.request import LoRARequest

        number = next(_adapter_numbers)
        with tempfile.TemporaryDirectory(prefix="tlcr-adapter-") as folder:
            write_adapter(self._policy, adapter_weights(self._policy), Path(folder))
            adapter = LoRARequest(f"tlcr-{number}", number, folder)
            try:
                self._there.llm.llm_engine.add_lora(adapter)  # reads the folder now, and never again
            except Exception as error:  # noqa: BLE001 vLLM raises what it likes, and the merged weights are as good
                self._merge_from_now_on(error)
                return
        self._there.adapter = adapter

    def _merge_from_now_on(self, error: Exception) -> None:
        self._rank = None
        logger.warning(
            "the vLLM in this process takes no adapter alone, and gets whole weights each time, with the adapter "
            "merged into them: %s",
            one_line(error)[:200],
        )

    def close(self) -> None:
        """See ``Engine``. The vLLM stays for the next one."""
        if self._there.owner is self:
            self._there.owner = None

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """See ``Engine``. Each prompt has a seed of its own."""
        if self._there.owner is not self:
            raise BackendUnavailable("the vLLM in this process was given the weights of another policy; refresh first")
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
        with part("rollout: vLLM"):
            return self._answers(prompts, sampling, seeds)

    def _answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        from vllm import SamplingParams, TokensPrompt

        settings = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.end_ids),
            "ignore_eos": True,  # only end_ids end an answer
            "logprobs": 0 if sampling.logprobs else None,  # of the drawn token alone
            "detokenize": False,
        }
        outputs = self._there.llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(seed=seed, **settings) for seed in seeds],
            use_tqdm=False,
            lora_request=self._there.adapter,
        )
        if len(outputs) != len(prompts):
            raise BackendUnavailable(f"the vLLM in this process answered {len(outputs)} of {len(prompts)} prompts")
        return [self._answer(output.outputs[0], sampling) for output in outputs]

    def _answer(self, output: Any, sampling: Sampling) -> Answer:
        ids, device, logprobs_T = list(output.token_ids), self._policy.device, None
        if sampling.logprobs:
            said = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
            logprobs_T = torch.tensor(said, dtype=torch.float32, device=device)
        return Answer(torch.tensor(ids, dtype=torch.long, device=device), logprobs_T)


def _rank_of(policy: PreTrainedModel) -> int | None:
    """The smallest of ``RANKS`` that the policy's adapter fits in; None where it has none, or a larger one."""
    if adapter_of(policy) is None:
        return None
    found = max(weight.shape[0] for name, weight in adapter_weights(policy).items() if ".lora_A." in name)
    return next((rank for rank in RANKS if rank >= found), None)


def _start(cfg: EngineConfig, policy: PreTrainedModel, rank: int | None) -> _Running:
    """The vLLM of this process for the policy's architecture. rank: of adapters; None: it takes none."""
    key = f"{type(policy).__name__} {policy.dtype} {cfg.batch_size} {rank} {policy.config.to_json_string()}"
    if key in _running:
        return _running[key]
    if key in _refused:
        raise BackendUnavailable("it could not be started for adapters before")
    # In a process of its own it could not be given tensors. vLLM reads this when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM
    except ImportError as error:
        raise BackendUnavailable(f"engine 'vllm' needs vllm ({one_line(error)}); {REMEDY}") from error
    with tempfile.TemporaryDirectory(prefix="tlcr-vllm-") as folder:
        policy.config.save_pretrained(Path(folder))
        adapters = {} if rank is None else {"enable_lora": True, "max_lora_rank": rank}
        try:
            llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=str(policy.dtype).removeprefix("torch."),
                max_model_len=position_limit(policy),
                max_num_seqs=cfg.batch_size,
                enforce_eager=policy.device.type == "cpu",
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                disable_log_stats=True,
                **adapters,
            )
        except Exception as error:
            if rank is not None:
                _refused.add(key)
            raise BackendUnavailable(
                f"the vLLM in this process cannot run {type(policy).__name__} ({one_line(error)[:200]}); {REMEDY}"
            ) from error
    _running[key] = _Running(llm)
    return _running[key]

"""vLLM in this process, with a stand-in for its package: .ci/engines.py has the real one."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.engines.helpers import ENDS, PROMPTS, sampling, worst
from tests.engines.test_server import ids_of, model
from tests.engines.vllm_server import VLLM as Served
from tlcr.config.schema import LoRAConfig, RolloutConfig, RunConfig
from tlcr.engines import build_engine
from tlcr.engines import vllm as module
from tlcr.errors import BackendUnavailable
from tlcr.experiment.preflight import settings as preflight_settings
from tlcr.models.lora.roles import Roles

CFG = RolloutConfig(engine="vllm", batch_size=4)


class LLM:
    """Takes weights and answers as ``vllm.LLM`` does where it was called by hand (0.32.0)."""

    started: ClassVar[list[dict[str, Any]]] = []
    deaf = False
    lost = 0
    refuses = ""
    """What it says of adapters."""

    def __init__(self, *, model: str, **settings: Any) -> None:
        if settings.get("enable_lora") and self.refuses == "start":
            raise ValueError("no adapters\nfor this architecture")
        self.started.append(settings)
        self.given: list[str] = []
        self.llm_engine = self
        torch.manual_seed(5)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.served, self.cached = Served(self.model), True

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        weights = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}
        self.cached = True
        self.given.append("weights")
        if not self.deaf:
            self.model.load_state_dict(weights)
            self.served.adapters.clear()

    def add_lora(self, adapter: Any) -> None:
        if self.refuses == "adapter":
            raise ValueError("no such adapter")
        assert not self.served.adapters, "a second one has no place"
        self.given.append("adapter")
        self.cached = True
        if not self.deaf:
            request = {"lora_name": adapter.lora_name, "lora_path": adapter.lora_path}
            self.served.adapter("/v1/load_lora_adapter", request)

    def remove_lora(self, number: int) -> None:
        del self.served.adapters[f"tlcr-{number}"]

    def reset_prefix_cache(self) -> None:
        self.cached = False

    def generate(self, prompts: list[Any], how: list[Any], *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert not self.cached and not use_tqdm and all(one.ignore_eos and not one.detokenize for one in how)
        found = []
        for prompt, one in zip(prompts, how, strict=True):
            name = "served" if lora_request is None else lora_request.lora_name
            request = {"model": name, "n": 1, "return_token_ids": True, "prompt": prompt.prompt_token_ids}
            request |= {name: getattr(one, name) for name in ("seed", "max_tokens", "temperature", "top_p", "top_k")}
            request |= {"stop_token_ids": one.stop_token_ids, "logprobs": 0}
            (choice,) = self.served.complete(request)["choices"]
            ids, said = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            logprobs = [{token: SimpleNamespace(logprob=x)} for token, x in zip(ids, said, strict=True)]
            found.append(
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=ids, logprobs=None if one.logprobs is None else logprobs)]
                )
            )
        return found[self.lost :]


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in = ModuleType("vllm")
    vars(stand_in).update(LLM=LLM, SamplingParams=SimpleNamespace, TokensPrompt=SimpleNamespace)
    requests = ModuleType("vllm.lora.request")
    vars(requests)["LoRARequest"] = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    for name, module_ in (("vllm", stand_in), ("vllm.lora", ModuleType("vllm.lora")), (requests.__name__, requests)):
        monkeypatch.setitem(sys.modules, name, module_)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(LLM, "started", [])
    module._running.clear()
    module._refused.clear()
    yield
    module._running.clear()
    module._refused.clear()


def moved(policy: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape))
    return policy


@pytest.mark.parametrize("way", [{"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}])
def test_answers_are_the_policys_of_now_in_order(way: dict[str, Any]) -> None:
    policy, how = model(), sampling(**way)
    engine = build_engine(replace(CFG, **way), policy)
    before: list[list[int]] = []
    for _ in range(2):
        engine.refresh()
        answers = engine.sample(PROMPTS, how, torch.Generator().manual_seed(1))
        assert worst(policy, answers, how) < 1e-5 and ids_of(answers) != before
        assert ids_of(engine.sample(PROMPTS, how, torch.Generator().manual_seed(1))) == ids_of(answers)
        assert any(ids[-1] in ENDS for ids in ids_of(answers))
        silent = engine.sample(PROMPTS, sampling(**way, logprobs=False), torch.Generator().manual_seed(1))
        assert ids_of(silent) == ids_of(answers) and all(answer.logprobs_T is None for answer in silent)
        before = ids_of(answers)
        moved(policy)


def test_one_vllm_serves_a_process_and_answers_only_for_whom_it_has_the_weights_of() -> None:
    one, other = build_engine(CFG, model()), build_engine(CFG, model(7))
    assert len(LLM.started) == 1 and LLM.started[0]["logprobs_mode"] == "processed_logprobs"
    one.refresh()
    other.refresh()
    assert worst(model(7), other.sample(PROMPTS, sampling())) < 1e-5
    with pytest.raises(BackendUnavailable, match="was given the weights of another policy; refresh first"):
        one.sample(PROMPTS, sampling())
    other.close()
    one.refresh()
    assert worst(model(), one.sample(PROMPTS, sampling())) < 1e-5


def adapted() -> PreTrainedModel:
    return moved(Roles(model(), LoRAConfig(rank=3), seed=0).policy)


def vllm_of(engine: Any) -> LLM:
    found = engine._there.llm
    assert isinstance(found, LLM)
    return found


def test_an_adapter_goes_alone_after_what_it_stands_on() -> None:
    policy = adapted()
    engine = build_engine(CFG, policy)
    assert LLM.started[0]["enable_lora"] and LLM.started[0]["max_lora_rank"] == 8
    for _ in range(3):
        engine.refresh()
        answers = engine.sample(PROMPTS, sampling())
        assert worst(policy, answers) < 1e-5 < worst(model(), answers)
        moved(policy)
    assert vllm_of(engine).given == ["weights", "adapter", "adapter", "adapter"]


def test_what_an_adapter_stands_on_comes_again_where_another_gave_its_weights() -> None:
    policy, other = adapted(), Roles(model(7), LoRAConfig(rank=3), seed=0).policy
    one, two = build_engine(CFG, policy), build_engine(CFG, other)
    one.refresh()
    two.refresh()
    assert worst(other, two.sample(PROMPTS, sampling())) < 1e-5
    one.refresh()
    assert worst(policy, one.sample(PROMPTS, sampling())) < 1e-5
    assert len(LLM.started) == 1 and vllm_of(one).given == ["weights", "adapter"] * 3


@pytest.mark.parametrize("refused", ["start", "adapter", "rank"])
def test_an_adapter_that_vllm_does_not_take_is_merged_on_its_way(
    refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LLM, "refuses", refused)
    if refused == "rank":
        monkeypatch.setattr(module, "RANKS", (2,))
    policy = adapted()
    engine = build_engine(CFG, policy)
    for _ in range(2):
        engine.refresh()
        answers = engine.sample(PROMPTS, sampling())
        assert worst(policy, answers) < 1e-5 < worst(model(), answers)
        moved(policy)
    assert len([one for one in caplog.messages if "takes no adapter alone" in one]) == (refused != "rank")
    assert "adapter" not in vllm_of(engine).given
    started = len(LLM.started)
    build_engine(CFG, policy).refresh()  # such as that of an evaluation: what was refused is not tried again
    assert len(LLM.started) == started


def test_an_adapter_that_was_not_taken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted()
    engine = build_engine(CFG, policy)
    engine.refresh()
    (old,) = vllm_of(engine).served.adapters.values()
    monkeypatch.setattr(LLM, "remove_lora", lambda *_: None)
    monkeypatch.setattr(LLM, "add_lora", lambda *_: None)
    vllm_of(engine).served.adapters = defaultdict(lambda: old)
    moved(policy)
    with pytest.raises(BackendUnavailable, match=r"took no new weights: .* its own not at all; set engine"):
        engine.refresh()


def test_weights_that_were_not_taken_and_answers_that_are_missing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(CFG, model())
    monkeypatch.setattr(LLM, "deaf", True)
    with pytest.raises(BackendUnavailable, match=r"does not have the policy's weights: .*; set engine"):
        engine.refresh()
    monkeypatch.setattr(LLM, "deaf", False)
    engine.refresh()
    monkeypatch.setattr(LLM, "lost", 1)
    with pytest.raises(BackendUnavailable, match="answered 6 of 7 prompts"):
        engine.sample(PROMPTS, sampling())


def test_where_vllm_is_not_or_cannot_run_the_model_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ValueError("no such architecture\nin the registry")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", fail)
    with pytest.raises(BackendUnavailable, match=r"cannot run LlamaForCausalLM \(no such architecture") as caught:
        build_engine(CFG, model())
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendUnavailable, match=r"'vllm' needs vllm .*; set engine: generate"):
        build_engine(CFG, model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "vllm" else object())
    found = [one for one in preflight_settings(RunConfig(rollout=CFG)) if one.subject == "rollout.engine"]
    assert [(one.level, one.fact) for one in found] == [
        ("blocked", "rollout.engine vllm needs the package vllm, and it is not installed")
    ]

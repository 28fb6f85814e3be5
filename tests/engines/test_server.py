"""Servers: answers and weights over HTTP, and what is done about servers that fail, lie, or serve somebody else."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import wait_none
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.chat.chat_server import closed_port
from tests.engines.helpers import ENDS, PROMPTS, sampling, worst
from tests.engines.vllm_server import COMPLETION, VLLM, Fault, serving
from tests.http_server import Reply
from tests.ppo.helpers import run_ppo, small_config, without_times
from tlcr.config.schema import LoRAConfig, RolloutConfig, RunConfig
from tlcr.engines import Answer, Sampling, build_engine, vllm_client
from tlcr.engines import server as module
from tlcr.engines.probe import PROBE_TOKENS
from tlcr.engines.server import Server
from tlcr.errors import BackendUnavailable, ConfigError
from tlcr.models.lora.files import merged_weights
from tlcr.models.lora.roles import Roles
from tlcr.training.metrics import read_metrics

LM = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "BACKOFF", wait_none())


def model(seed: int = 4) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def engine(
    policy: PreTrainedModel, *servers: VLLM, folder: Path | None = None, more: tuple[str, ...] = (), **settings: Any
) -> Iterator[Server]:
    with serving(*servers) as addresses:
        cfg = RolloutConfig(engine="server", server=(*addresses, *more), **settings)
        with closing(build_engine(cfg, policy, folder)) as built:
            assert isinstance(built, Server)
            yield built


def sample(built: Server, how: Sampling | None = None, seed: int = 1) -> list[Answer]:
    torch.manual_seed(seed)
    return built.sample(PROMPTS, how or sampling())


def ids_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids_T.tolist() for answer in answers]


def hurry(built: Server) -> None:
    """Gives its last server half a second from now on; the others, on a busy machine, keep what they need."""
    client = built._clients[-1]
    client._timeout, client._http = 0.5, client._http.with_options(timeout=0.5)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- answers and weights


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_answers_come_in_order_with_the_trainers_log_probs_whichever_server_gives_them(temperature: float) -> None:
    policy, how = model(), sampling(temperature=temperature)
    with engine(policy, VLLM(model(5)), temperature=temperature) as one:
        one.refresh()
        alone = sample(one, how)
    assert worst(policy, alone, how) < 1e-5
    ends = [ids[-1] in ENDS for ids in ids_of(alone)]
    assert any(ends) and not all(ends) and all(set(ids[:-1]).isdisjoint(ENDS) for ids in ids_of(alone))
    servers = [VLLM(model(5)) for _ in range(3)]
    with engine(policy, *servers, temperature=temperature) as three:
        three.refresh()
        assert ids_of(sample(three, how)) == ids_of(alone)
        assert ids_of(sample(three, how, seed=2)) != ids_of(alone)
        silent = sample(three, dataclasses.replace(how, logprobs=False))
    assert ids_of(silent) == ids_of(alone) and all(answer.logprobs_T is None for answer in silent)
    # each was asked for a probe, and all together for the prompts of three rollouts
    numbers = [len(server.asked("/v1/completions")) - 1 for server in servers]
    assert sum(numbers) == 3 * len(PROMPTS) and min(numbers) > 0


def test_only_the_settings_of_the_run_shape_the_answers() -> None:
    server = VLLM(model())
    with engine(model(), server, top_k=5, top_p=0.9) as built:
        built.refresh()
        sample(built, sampling(top_k=5, top_p=0.9))
    request = next(r for r in server.asked("/v1/completions") if r["prompt"] == PROMPTS[0])
    assert {key: request[key] for key in ("temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos")} == {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 5,
        "stop_token_ids": list(ENDS),
        "ignore_eos": True,
    }
    assert (request["min_p"], request["repetition_penalty"], request["presence_penalty"]) == (0.0, 1.0, 0.0)


def test_servers_answer_by_the_weights_of_now_and_none_are_left_on_the_disk(tmp_path: Path) -> None:
    policy, servers = model(), [VLLM(model(5)), VLLM(model(6))]
    folder = tmp_path / "weights"
    (folder / "of-a-run-that-was-killed").mkdir(parents=True)
    with engine(policy, *servers, folder=folder) as built:
        versions = []
        for _ in range(3):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.05)
            built.refresh()
            versions.append(servers[0].version)
            assert worst(policy, sample(built)) < 1e-5 and not folder.exists()
    assert [version.rpartition("-")[2] for version in versions] == ["1", "2", "3"]
    for server in servers:
        assert len(set(server.loaded)) == 3 and all(Path(path).parent == folder for path in server.loaded)
        order = [path for path, _ in server.requests if path in ("/collective_rpc", "/reset_prefix_cache")]
        assert order == ["/collective_rpc", "/reset_prefix_cache"] * 3


def test_servers_get_the_policy_with_its_adapter_merged_and_the_policy_keeps_them_apart() -> None:
    """In several files, and in place of the weights that the adapter stands on."""
    policy = Roles(model(), LoRAConfig(rank=3, targets=("all-linear", "lm_head")), seed=0).policy
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    server = VLLM(model(5))
    with engine(policy, server) as built:
        built.refresh()
        answers = sample(built)
    assert worst(policy, answers) < 1e-5 < worst(model(), answers)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    merged = merged_weights(policy)
    served = server.model.state_dict()
    assert merged.keys() == served.keys()
    assert all(torch.equal(served[name], weight) for name, weight in merged.items())


def adapted() -> PreTrainedModel:
    return Roles(model(), LoRAConfig(rank=3), seed=0).policy


@torch.no_grad()
def move(policy: PreTrainedModel) -> None:
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape))


def test_a_server_that_takes_adapters_gets_what_they_stand_on_once(tmp_path: Path) -> None:
    """Until another gave it weights of its own. The adapter's name is that of the version, which answers are asked
    of; the one before is let go."""
    policy, server = adapted(), VLLM(model(5), lora=True)
    with engine(policy, server, folder=tmp_path / "weights") as built:
        for number in (1, 2, 3):
            move(policy)
            if number == 3:
                server.version, server.model = "of-another", model(6)
            built.refresh()
            assert worst(policy, sample(built)) < 1e-4 < worst(model(), sample(built))
            assert list(server.adapters) == [server.version] and server.version.endswith(f"-{number}")
            assert len(server.loaded) == (2 if number == 3 else 1)
        assert not (tmp_path / "weights").exists()
    base = model().state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in server.model.state_dict().items())
    assert {r["model"] for r in server.asked("/v1/completions") if r["prompt"] == PROMPTS[0]} == {
        f"{server.version.rpartition('-')[0]}-{number}" for number in (1, 2, 3)
    }


@pytest.mark.parametrize("reason", ["no LoRA", "a rank that is too large", "no versions"])
def test_a_server_that_takes_no_adapters_gets_them_merged(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        if path == "/v1/load_lora_adapter" and reason == "a rank that is too large":
            return Reply({"error": {"message": "LoRA rank 3 is greater than max_lora_rank 2."}}, 500)
        return without_versions(server, path, request) if reason == "no versions" else None

    policy = adapted()
    no_lora, other = VLLM(model(5), refuses, lora=reason != "no LoRA"), VLLM(model(5), lora=True)
    with engine(policy, no_lora, other) as built:
        for number in (1, 2):
            move(policy)
            built.refresh()
            assert worst(policy, sample(built)) < 1e-4
            assert len(other.loaded) == 1 and len(no_lora.loaded) == number + (reason == "no versions")
    (said,) = warnings_of(caplog)
    assert ("names no version" if reason == "no versions" else "takes no adapters alone and gets whole") in said
    assert len(no_lora.asked("/v1/load_lora_adapter")) == 1  # and not five times


def without_versions(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
    return Reply({"detail": "Not Found"}, 404) if path in ("/update_weight_version", "/weight_info") else None


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_in_files_of_bounded_size(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model()
    if tied:
        policy.config.tie_word_embeddings = True
        policy.lm_head.weight = policy.model.embed_tokens.weight
    monkeypatch.setattr(module, "FILE_BYTES", 20_000)
    module._write_weights(policy, tmp_path / "weights")
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert len(files) > 2
    read = LlamaForCausalLM.from_pretrained(tmp_path / "weights")
    assert all(torch.equal(weight, policy.state_dict()[name]) for name, weight in read.state_dict().items())


def test_a_policy_that_did_not_change_is_sent_again_without_complaint() -> None:
    with engine(model(), VLLM(model(5))) as built:
        built.refresh()
        built.refresh()
        assert len(sample(built)) == len(PROMPTS)


# ---- servers that fail


def in_answers(reply: Callable[[VLLM, dict[str, Any]], Reply | None], *, after: int = 0) -> Fault:
    """What a server does with requests for answers, the probe aside, from its n-th on."""
    number = [0]

    def fault(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        if path != "/v1/completions" or request["max_tokens"] == PROBE_TOKENS:
            return None
        number[0] += 1
        return reply(server, request) if number[0] > after else None

    return fault


def changed(**fields: Any) -> Fault:
    """Right answers, but for these fields."""

    def reply(server: VLLM, request: dict[str, Any]) -> Reply:
        found = server.complete(request)
        found["choices"][0] |= fields
        return Reply(found)

    return in_answers(reply)


def without_answers(server: VLLM, request: dict[str, Any]) -> Reply:
    return Reply(server.complete(request) | {"choices": []})


def shortened(server: VLLM, request: dict[str, Any]) -> Reply:
    found = server.complete(request)
    found["choices"][0]["logprobs"]["token_logprobs"].pop()
    return Reply(found)


def taken_by_another(server: VLLM, request: dict[str, Any]) -> None:
    """Another trainer gives it other weights, and the answers go on."""
    server.model, server.version = model(9), "of-another-1"


def killed(server: VLLM, request: dict[str, Any]) -> Reply:
    """In the midst of a batch: this answer breaks off, and no other comes."""
    server.kill()
    return Reply(server.complete(request), cut=20)


FAULTS: dict[str, tuple[Fault, str]] = {
    "500": (in_answers(lambda *_: Reply({"error": {"message": "CUDA error"}}, 500)), "status 500: .*CUDA error"),
    "429": (in_answers(lambda *_: Reply({"error": {"message": "queue is full"}}, 429), after=1), "status 429"),
    "refuses": (in_answers(lambda *_: Reply({"error": {"message": "too long"}}, 400)), "status 400: .*too long"),
    "cut off": (in_answers(lambda *_: Reply({"choices": []}, cut=5)), "cannot be reached"),
    "killed": (in_answers(killed, after=1), "cannot be reached"),
    "hangs": (in_answers(lambda *_: Reply(hang_s=1.5)), "no answer within server_timeout = 0.5 s"),
    "no JSON": (in_answers(lambda *_: Reply(b"<html>")), "what is no JSON"),
    "no answer": (in_answers(without_answers), "gave 0 answers to one prompt"),
    "other prompt": (changed(prompt_token_ids=[5, 9]), "answered another prompt"),
    "no ids": (changed(token_ids=None), "gave no token ids"),
    "foreign id": (changed(token_ids=[131]), "gave the token id 131, and the policy has 131"),
    "empty": (changed(token_ids=[]), "gave 0 of at most 8 tokens"),
    "aborted": (changed(finish_reason="abort"), "finish_reason 'abort'"),
    "other end": (changed(token_ids=[51], finish_reason="stop"), "ended an answer at the token 51"),
    "cut short": (changed(token_ids=[51], finish_reason="length"), "cut an answer off after 1 tokens"),
    "one log-prob too few": (in_answers(shortened), "no log-probability for each of"),
    "another trainer": (in_answers(taken_by_another, after=1), "has the weights 'of-another-1' and was given"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_left_out_and_its_prompts_are_answered_by_another(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy, (behave, says) = model(), FAULTS[fault]
    with engine(policy, VLLM(model(5))) as good:
        good.refresh()
        wanted = ids_of(sample(good))
    with engine(policy, VLLM(model(5)), VLLM(model(5), behave)) as built:
        built.refresh()
        if fault == "hangs":
            hurry(built)
        answers = sample(built)
        assert ids_of(answers) == wanted and worst(policy, answers) < 1e-5
        assert ids_of(sample(built)) == wanted
    (said,) = warnings_of(caplog)
    assert "is left out from now on" in said and said.endswith("; 1 are left") and "\n" not in said
    assert re.search(says, said), said


@pytest.mark.parametrize("fault", ["500", "another trainer", "hangs", "killed"])
def test_without_another_server_the_run_ends_in_one_sentence(fault: str) -> None:
    behave, says = FAULTS[fault]
    with engine(model(), VLLM(model(5), behave)) as built:
        built.refresh()
        if fault == "hangs":
            hurry(built)
        with pytest.raises(BackendUnavailable, match=f"no server left of 1, the last because: .*{says}") as caught:
            sample(built)
    assert "\n" not in str(caught.value)


def test_two_trainers_on_one_server_train_on_no_answer_of_each_others_weights() -> None:
    """The second one's weights are there; the first one's answers are thrown away, whenever it was taken from it."""
    server = VLLM(model(5))
    with engine(model(), server) as first:
        first.refresh()
        cfg = RolloutConfig(engine="server", server=(server.address,))
        with closing(build_engine(cfg, model(7))) as second:
            second.refresh()
            with pytest.raises(BackendUnavailable, match=r"has the weights '.*' and was given '.*': another tr"):
                sample(first)
            assert isinstance(second, Server) and worst(model(7), sample(second)) < 1e-5


def test_a_server_that_is_busy_for_a_while_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    busy = iter([429, 503, 500, 429])

    def reply(*_: Any) -> Reply | None:
        status = next(busy, None)
        return None if status is None else Reply({"error": {"message": "later"}}, status)

    with engine(model(), VLLM(model(5), in_answers(reply))) as built:
        built.refresh()
        assert len(sample(built)) == len(PROMPTS)
    assert not warnings_of(caplog) and next(busy, None) is None


def test_a_server_that_is_not_there_is_left_out_before_the_first_round(caplog: pytest.LogCaptureFixture) -> None:
    with engine(model(), VLLM(model(5)), more=(f"http://127.0.0.1:{closed_port()}",)) as built:
        built.refresh()
        assert len(sample(built)) == len(PROMPTS)
    (said,) = warnings_of(caplog)
    assert "cannot be reached" in said


# ---- weights that were not taken


def deaf(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
    """Says that it took the weights, and did not."""
    return Reply({"results": [None]}) if path == "/collective_rpc" else None


def test_a_server_with_other_weights_is_noticed_before_it_answers() -> None:
    with (
        engine(model(), VLLM(model(5), deaf)) as built,
        pytest.raises(BackendUnavailable, match=r"does not have the policy's weights: .* differ by"),
    ):
        built.refresh()


def test_a_server_that_stops_taking_weights_is_noticed_by_what_does_not_move() -> None:
    """The weights move so little that they could pass for a difference of arithmetic."""
    policy, server = model(), VLLM(model())
    with engine(policy, server) as built:
        built.refresh()
        server.fault = deaf
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
        with pytest.raises(BackendUnavailable, match=r"took no new weights: .* have moved by"):
            built.refresh()


def test_log_probs_from_before_the_temperature_are_noticed() -> None:
    with (
        engine(model(), VLLM(model(5), processed=False), temperature=0.5) as built,
        pytest.raises(BackendUnavailable, match="start it with --logprobs-mode processed_logprobs"),
    ):
        built.refresh()


def test_what_the_old_weights_left_in_a_cache_is_not_answered_from() -> None:
    def keeps(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        return Reply({"success": False}) if path == "/reset_prefix_cache" else None

    with (
        engine(model(), VLLM(model(5), keeps)) as built,
        pytest.raises(BackendUnavailable, match="did not drop what the old weights left"),
    ):
        built.refresh()


def test_an_answer_of_vllm_itself_is_read() -> None:
    how = sampling(max_new_tokens=3, end_ids=(2,))
    ids, logprobs = vllm_client._read(json.loads(COMPLETION), [5, 6, 7], how, 512)
    assert ids == [493, 490, 511] and logprobs == [-6.389947891235352, -5.876428604125977, -3.1262786388397217]


def test_a_server_out_of_development_mode_is_named_with_the_remedy() -> None:
    def closed(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        return None if path.startswith("/v1/") else Reply({"detail": "Not Found"}, 404)

    with (
        engine(model(), VLLM(model(5), closed)) as built,
        pytest.raises(BackendUnavailable, match="no route /collective_rpc; start it with VLLM_SERVER_DEV_MODE=1"),
    ):
        built.refresh()


def test_an_earlier_server_without_versions_is_used_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def earlier(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        return Reply({"detail": "Not Found"}, 404) if "weight_" in path else None

    with engine(model(), VLLM(model(5), earlier)) as built:
        built.refresh()
        built.refresh()
        assert len(sample(built)) == len(PROMPTS)
    (said,) = warnings_of(caplog)
    assert "names no version of its weights" in said


# ---- several processes


def test_another_process_asks_the_servers_that_the_main_one_gave_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, servers, told = model(), [VLLM(model(5)), VLLM(model(5), deaf)], []
    with serving(*servers) as addresses:
        cfg = RolloutConfig(engine="server", server=tuple(addresses))
        with closing(Server(cfg, policy, None)) as main, closing(Server(cfg, policy, None)) as other:
            monkeypatch.setattr(module, "process_count", lambda: 2)
            monkeypatch.setattr(module, "broadcast_object_list", lambda known: told.extend(known))
            main.refresh()
            monkeypatch.setattr(module, "on_main_process", lambda action: None)
            monkeypatch.setattr(module, "broadcast_object_list", lambda known: known.__setitem__(0, told[0]))
            other.refresh()
            before = [len(server.asked("/v1/completions")) for server in servers]
            assert ids_of(sample(other)) == ids_of(sample(main))
            after = [len(server.asked("/v1/completions")) for server in servers]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2 * len(PROMPTS), 0]


# ---- in a run


def test_ppo_trains_by_servers_with_the_weights_of_each_round(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    server = VLLM(tiny_causal_lm(seed=3))
    with serving(server) as addresses:
        cfg = small_config(updates=3)
        rollout = dataclasses.replace(cfg.rollout, engine="server", server=tuple(addresses))
        cfg = dataclasses.replace(cfg, rollout=rollout)
        run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path)
    rows = [without_times(row) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(rows) == len(server.loaded) == 3
    for row in rows:
        assert abs(row["mismatch/log_weight"]) < 1e-5 and row["mismatch/effective_share"] == pytest.approx(1.0)
    assert not (tmp_path / "server_weights").exists()


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine is 'server' and server names none; name addresses"):
        RolloutConfig(engine="server")
    with pytest.raises(ConfigError, match=r"with an address twice"):
        RolloutConfig(engine="server", server=("http://a", "http://a"))
    with pytest.raises(ConfigError, match=r"parallel is 2 and rollout.server names 1: .* set parallel: 1, or"):
        RunConfig(rollout=RolloutConfig(engine="server", server=("http://a",)), parallel=2)

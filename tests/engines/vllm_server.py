"""A real HTTP server that speaks vLLM's routes as version 0.32 does, with a small model behind them; and its faults.

Its responses are those recorded of `vllm serve` 0.32.0 on a CPU with VLLM_SERVER_DEV_MODE=1, with other figures.
What it says of adapters is taken from its sources.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.http_server import HttpServer, Reply

COMPLETION = (
    '{"id":"cmpl-bf3db9b2765727f0","object":"text_completion","created":1795881889,"model":"served","choices":[{"index":'
    '0,"text":" w493 w490 w511","logprobs":{"text_offset":[0,4,8],"token_logprobs":[-6.389947891235352,'
    '-5.876428604125977,-3.1262786388397217],"tokens":["w493","w490","w511"],"top_logprobs":[{"w493":-6.389947891235352'
    '},{"w490":-5.876428604125977},{"w511":-3.1262786388397217}]},"finish_reason":"length","stop_reason":null,'
    '"token_ids":[493,490,511],"prompt_logprobs":null,"prompt_token_ids":[5,6,7],"routed_experts":null}],"service_tier":'
    'null,"system_fingerprint":"vllm-0.32.0-23e362a7","usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,'
    '"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,'
    '"metrics":null}'
)
"""What it answered to [5, 6, 7] with max_tokens 3, byte for byte but for the name of the model."""


TRANSFER = {
    "/get_world_size": "",
    "/init_weight_transfer_engine": "Weight transfer initialized",
    "/start_weight_update": "Weight update started",
    "/update_weights": "Weights updated",
    "/finish_weight_update": "Weight update finished",
}
"""The routes of weight transfer, and what it answers."""


LOADING = threading.Lock()
"""transformers patches itself while it loads a model: two threads that do so at a time leave it patched."""

Fault = Callable[["VLLM", str, dict[str, Any]], "Reply | None"]
"""(server, path, request) to what it does in place of the right thing; None: the right thing."""


class VLLM:
    """fault: asked before each request. processed: --logprobs-mode processed_logprobs. lora: --enable-lora, and
    adapters may be loaded while it runs."""

    def __init__(
        self, model: PreTrainedModel, fault: Fault | None = None, *, processed: bool = True, lora: bool = False
    ) -> None:
        self.model, self.fault, self.processed, self.lora = model, fault, processed, lora
        self.adapters: dict[str, Any] = {}
        self.version = "default"
        self.receiver: Any = None
        """What takes weights over the network, where it was started with a backend of that."""
        self.updating = False
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.loaded: list[str] = []
        self.address = ""
        self.lock = threading.Lock()
        self.kill: Callable[[], None] = lambda: None
        """Closes its port, as if its process had been killed; set while it serves."""

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [request for where, request in self.requests if where == path]

    def handle(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        with self.lock:
            self.requests.append((path, request))
        if self.fault is not None and (reply := self.fault(self, path, request)) is not None:
            return reply
        with self.lock:
            return self.right(path, request)

    def right(self, path: str, request: dict[str, Any]) -> Reply:
        if path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": "served", "object": "model", "max_model_len": 256}]})
        if path == "/v1/completions":
            return Reply(self.complete(request))
        if path == "/collective_rpc":
            assert request["method"] == "reload_weights" and set(request["kwargs"]) == {"weights_path"}
            self.loaded.append(request["kwargs"]["weights_path"])
            self.adapters.clear()
            with LOADING:
                self.model = AutoModelForCausalLM.from_pretrained(self.loaded[-1], local_files_only=True).eval()
            return Reply({"results": [None]})
        if path.endswith("_lora_adapter") and self.lora:
            return self.adapter(path, request)
        if self.receiver is not None and path in TRANSFER:
            return self.transfer(path, request)
        if path == "/reset_prefix_cache":
            return Reply({"success": True})
        if path == "/update_weight_version":
            self.version = request["new_version"]
            return Reply({"success": True, "new_version": self.version})
        if path == "/weight_info":
            return Reply({"weight_version": self.version})
        return Reply({"detail": "Not Found"}, 404)

    def transfer(self, path: str, request: dict[str, Any]) -> Reply:
        if path == "/get_world_size":
            return Reply({"world_size": 1})
        if path == "/init_weight_transfer_engine":
            self.receiver.init_transfer_engine(self.receiver.parse_init_info(request["init_info"]))
        elif self.updating == (path == "/start_weight_update"):
            return Reply({"error": {"message": f"Weight update {'already' if self.updating else 'not'} active"}}, 500)
        elif path == "/start_weight_update":
            self.updating = True
            self.adapters.clear()
            self.receiver.start_weight_update()
        elif path == "/update_weights":
            self.receiver.update_weights(request["update_info"])
        else:
            self.receiver.finish_weight_update()
            self.updating = False
        return Reply({"message": TRANSFER[path]})

    def adapter(self, path: str, request: dict[str, Any]) -> Reply:
        """Answers in words, of the type JSON all the same."""
        name = request["lora_name"]
        if path == "/v1/unload_lora_adapter":
            del self.adapters[name]
            return Reply(f"Success: LoRA adapter '{name}' removed successfully.".encode())
        assert name not in self.adapters
        self.adapters[name] = _with_adapter(self.model, Path(request["lora_path"]))
        return Reply(f"Success: LoRA adapter '{name}' added successfully.".encode())

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["n"] == 1 and request["return_token_ids"]
        model = self.model if request["model"] == "served" else self.adapters[request["model"]]
        generator = torch.Generator().manual_seed(request["seed"])
        prompt, ids, logprobs, finish = request["prompt"], [], [], "length"
        while len(ids) < request["max_tokens"]:
            with torch.no_grad():
                logits_V = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].float()
            kept_V = _shaped(logits_V, request)
            ids.append(int(torch.multinomial(kept_V.softmax(-1), 1, generator=generator)))
            said_V = kept_V if self.processed else logits_V
            logprobs.append(float(said_V.log_softmax(-1)[ids[-1]]))
            if ids[-1] in request["stop_token_ids"]:
                finish = "stop"
                break
        found: dict[str, Any] = json.loads(COMPLETION)
        (choice,) = found["choices"]
        words = [f"w{token}" for token in ids]
        choice["logprobs"] |= {
            "text_offset": [0] * len(ids),
            "token_logprobs": logprobs,
            "tokens": words,
            "top_logprobs": [{word: x} for word, x in zip(words, logprobs, strict=True)],
        }
        if "logprobs" not in request:
            choice["logprobs"] = None
        choice |= {"text": " ".join(words), "finish_reason": finish, "token_ids": ids, "prompt_token_ids": prompt}
        choice["stop_reason"] = ids[-1] if finish == "stop" else None
        tokens = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        found["usage"] |= tokens
        return found


@torch.no_grad()
def _with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy, with a folder of peft merged into it: W + B A alpha / r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights, adapted = load_file(folder / "adapter_model.safetensors"), deepcopy(model)
    for name, down in weights.items():
        path, found, _ = name.partition(".lora_A.")
        if found:
            delta = weights[f"{path}.lora_B.weight"] @ down * config["lora_alpha"] / config["r"]
            adapted.get_submodule(path.removeprefix("base_model.model.")).weight.add_(delta)
    return adapted


def _shaped(logits_V: Tensor, request: dict[str, Any]) -> Tensor:
    """Temperature, top-k, top-p, in vLLM's order; at temperature 0 the most probable token alone."""
    if request["temperature"] == 0:
        return torch.full_like(logits_V, -torch.inf).index_fill(0, logits_V.argmax()[None], 0.0)
    logits_V = logits_V / request["temperature"]
    if request["top_k"] > 0:
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(request["top_k"]).values[-1], -torch.inf)
    if request["top_p"] < 1:
        ascending_V, places_V = logits_V.sort()
        below_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - request["top_p"]
        below_V[-1] = False
        logits_V = logits_V.masked_fill(below_V.scatter(0, places_V, below_V), -torch.inf)
    return logits_V


@contextmanager
def serving(*servers: VLLM) -> Iterator[list[str]]:
    """Their addresses."""
    listeners = [HttpServer(server.handle) for server in servers]
    for server, listener in zip(servers, listeners, strict=True):
        server.address, server.kill = listener.address, listener.kill
    try:
        yield [listener.address for listener in listeners]
    finally:
        for listener in listeners:
            listener.kill()
            listener.join()

"""vLLM behind HTTP, one server or many: token ids in, token ids and log-probabilities out, weights by files.

Nothing outside this module speaks vLLM's routes. Answers come from ``/v1/completions``, whose prompts may be token ids.
Weights are written to a folder, and ``/collective_rpc`` has the server read it: a route of its development mode, which
servers have that were started with ``VLLM_SERVER_DEV_MODE=1``, on a network that is trusted. Then
``/reset_prefix_cache`` drops what the old weights made, and ``/update_weight_version`` names the new ones.

What a server says is checked: a short answer to a fixed prompt is scored by the policy itself after each change of the
weights, each answer must be one to its prompt, and the version of the weights must be the same after a rollout as
before. A server that fails, in time or by what it says, is left out, and what it answered is asked of the others.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tlcr.config.schema import EngineConfig
from tlcr.credentials import VLLM_KEY_VARIABLE, without_secrets
from tlcr.distribution import install_command
from tlcr.engines.probe import NotThePolicys, Probe, check_probe, probe_prompt, probe_sampling
from tlcr.engines.protocol import Answer, Sampling
from tlcr.errors import BackendUnavailable
from tlcr.models.adapters import whole_weights
from tlcr.models.faults import one_line
from tlcr.training.checkpoint import atomic_write, write_json
from tlcr.training.distributed import on_main_process, process_count
from tlcr.training.profiling import part

try:
    import openai
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
except ImportError as error:
    raise BackendUnavailable(f"engine 'server' needs {error.name} ({error}): {install_command('openai')}") from error

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Times that a request is sent where the server refuses it for now (429, 5xx) or the connection breaks."""
BACKOFF = wait_random_exponential(multiplier=0.5, max=8)
"""Seconds between them: random, below 0.5, 1, 2, 4."""
FILE_BYTES = 2**30
"""Weights in one file; as many are in memory at a time (ours)."""


class _Fault(Exception):
    """Why a server is left out: a clause."""


class _Busy(Exception):
    """The server cannot do it now."""


class _Missing(_Fault):
    """The server has no such route."""


class _State(NamedTuple):
    """What the main process found out about a server: the name of its model, and whether it names its weights."""

    model: str | None = None
    has_versions: bool = True


class Server:
    """``vllm serve`` at each address of ``server``.

    Args:
        cfg: addresses, time limit, and the sampling that probes use too.
        policy: the model itself, not a data-parallel wrapper.
        folder: where weights are written for the servers to read, so on a disk that they share; what else is in it is
            deleted. None: a temporary folder, for servers on this machine.

    Raises:
        BackendUnavailable: the packages of the extra ``openai`` are not installed.
    """

    def __init__(self, cfg: EngineConfig, policy: PreTrainedModel, folder: Path | None) -> None:
        self._cfg, self._policy, self._folder = cfg, policy, folder
        self._clients = [_Client(address, cfg.server_timeout) for address in cfg.server]
        self._alive = list(self._clients)
        self._lock = threading.Lock()
        self._run, self._version = secrets.token_hex(4), 0
        self._reason = ""

    # ---- weights

    def refresh(self) -> None:
        """See ``Engine``. The main process writes the weights and tells the servers; the others wait. A sharded policy
        is inside ``gathered``."""
        self._version += 1
        with part("rollout: weights to servers"):
            on_main_process(self._send_weights)
        if process_count() > 1:
            known: list[Any] = [(self._run, {client.address: client.state for client in self._alive})]
            broadcast_object_list(known)
            self._run, states = known[0]
            self._alive = [client for client in self._alive if client.address in states]
            for client in self._alive:
                client.state = states[client.address]
            self._require_one()

    def _send_weights(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tlcr-weights-")) if self._folder is None else self._folder.resolve()
        try:
            shutil.rmtree(folder, ignore_errors=True)  # what a run left that was killed
            with atomic_write(folder / self._label) as aside:
                _write_weights(self._policy, aside)
            self._each(lambda client: client.take_weights(folder / self._label, self._label))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._each(self._check_weights, at_a_time=1)

    @property
    def _label(self) -> str:
        """The name of the weights of now, which no other run has."""
        return f"{self._run}-{self._version}"

    def _check_weights(self, client: _Client) -> None:
        """Raises _Fault unless a short answer has the policy's own log-probabilities."""
        how, vocabulary = probe_sampling(self._cfg), self._policy.config.get_text_config().vocab_size
        ids, logprobs = client.answer(probe_prompt(self._policy), how, seed=0, vocabulary=vocabulary)
        try:
            client.probe = check_probe(self._policy, how, ids, logprobs, client.probe)
        except NotThePolicys as error:
            raise _Fault(str(error)) from error

    # ---- answers

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """See ``Engine``. Each prompt has a seed of its own, so that it does not matter which server answers it."""
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
        found: dict[int, tuple[_Client, Answer]] = {}
        with part("rollout: servers"):
            while lacking := [row for row in range(len(prompts)) if row not in found]:
                found |= self._ask(lacking, prompts, seeds, sampling)
                self._each(lambda client: client.check_version(self._label))
                found = {row: answer for row, answer in found.items() if answer[0] in self._alive}
        return [found[row][1] for row in range(len(prompts))]

    def _ask(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> dict[int, tuple[_Client, Answer]]:
        """Answers of the rows, each from the server with the fewest requests under way."""
        waiting, found = deque(rows), {}
        device, vocabulary = self._policy.device, self._policy.config.get_text_config().vocab_size

        def work() -> None:
            while True:
                with self._lock:
                    if not (waiting and self._alive):
                        return
                    row = waiting.popleft()
                    client = min(self._alive, key=lambda client: (client.under_way, client.asked))
                    client.under_way += 1
                    client.asked += 1
                try:
                    ids, logprobs = client.answer(prompts[row], sampling, seeds[row], vocabulary)
                except _Fault as fault:
                    self._leave_out(client, fault)
                    waiting.appendleft(row)
                    continue
                finally:
                    with self._lock:
                        client.under_way -= 1
                logprobs_T = torch.tensor(logprobs, device=device) if sampling.logprobs else None
                found[row] = client, Answer(torch.tensor(ids, dtype=torch.long, device=device), logprobs_T)

        workers = min(sampling.batch_size, len(rows))
        with ThreadPoolExecutor(workers, "server") as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()
        self._require_one()
        return found

    # ---- servers

    def _each(self, action: Callable[[_Client], None], at_a_time: int | None = None) -> None:
        """Does it with every server that is left, and leaves out those with which it cannot be done."""
        clients = list(self._alive)

        def attempt(client: _Client) -> None:
            try:
                action(client)
            except _Fault as fault:
                self._leave_out(client, fault)

        with ThreadPoolExecutor(at_a_time or max(1, len(clients)), "server") as pool:
            list(pool.map(attempt, clients))
        self._require_one()

    def _leave_out(self, client: _Client, fault: _Fault) -> None:
        with self._lock:
            if client not in self._alive:
                return
            self._alive.remove(client)
            self._reason = f"{client.address} {fault}"
            logger.warning(
                "the server at %s is left out from now on: it %s; %d are left", client.address, fault, len(self._alive)
            )

    def _require_one(self) -> None:
        if not self._alive:
            raise BackendUnavailable(
                f"engine 'server' has no server left of {len(self._cfg.server)}, the last because: "
                f"{self._reason}; see to it and continue with --resume, or set engine: generate"
            )

    def close(self) -> None:
        """See ``Engine``."""
        for client in self._clients:
            client.close()


def _write_weights(policy: PreTrainedModel, folder: Path) -> None:
    """The whole policy as files of safetensors, gathered and merged one weight after the other."""
    folder.mkdir()
    policy.config.save_pretrained(folder)
    files: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(held, name))
        held.clear()

    for name, weight in whole_weights(policy):
        held[name] = weight.detach().cpu().contiguous()
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            write()
    if held:
        write()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


class _Client:
    """One server. Every method raises _Fault where the server does not do what it should."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        self._timeout, self._key = timeout, os.environ.get(VLLM_KEY_VARIABLE) or "none"
        self._http = openai.OpenAI(base_url=self.address, api_key=self._key, timeout=timeout, max_retries=0)
        self.state = _State()
        self.under_way = self.asked = 0
        self.probe: Probe | None = None

    def close(self) -> None:
        self._http.close()

    def take_weights(self, folder: Path, version: str) -> None:
        if self.state.model is None:
            self.state = self.state._replace(model=self._name_of_model())
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._request("POST", "/collective_rpc", body)
        dropped = self._request("POST", "/reset_prefix_cache")  # earlier versions answer nothing
        if isinstance(dropped, Mapping) and dropped.get("success") is False:
            raise _Fault("did not drop what the old weights left in its prefix cache: it has other requests under way")
        if self.state.has_versions:
            try:
                self._request("POST", "/update_weight_version", {"new_version": version})
            except _Missing:
                self.state = self.state._replace(has_versions=False)
                logger.warning(
                    "the server at %s names no version of its weights (vLLM before 0.30): another trainer that gives "
                    "it other weights in the midst of a rollout is noticed by their log-probabilities alone",
                    self.address,
                )

    def check_version(self, version: str) -> None:
        """Raises _Fault where the weights are no longer those that this run gave."""
        if not self.state.has_versions:
            return
        found = self._request("GET", "/weight_info")
        now = found.get("weight_version") if isinstance(found, Mapping) else None
        if now != version:
            raise _Fault(
                f"has the weights {now!r} and was given {version!r}: another trainer uses it, or it was started anew"
            )

    def answer(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, vocabulary: int
    ) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of an answer; none of the latter where they are not asked for."""
        body = {
            "model": self.state.model,
            "prompt": list(prompt),
            "n": 1,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            # Only these ids end an answer, and only these settings shape the distribution, whatever the server's are.
            "stop_token_ids": list(sampling.end_ids),
            "ignore_eos": True,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if sampling.logprobs:
            body["logprobs"] = 0  # of the drawn token alone
        return _read(self._request("POST", "/v1/completions", body), prompt, sampling, vocabulary)

    def _name_of_model(self) -> str:
        found = self._request("GET", "/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise _Fault("names no model") from error

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of the response; None where there is none."""
        again = Retrying(
            retry=retry_if_exception_type(_Busy), stop=stop_after_attempt(ATTEMPTS), wait=BACKOFF, reraise=True
        )
        try:
            return again(self._attempt, method, path, body)
        except _Busy as error:
            raise _Fault(f"{error} ({ATTEMPTS} times)") from error

    def _attempt(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            if method == "GET":
                text = self._http.get(path, cast_to=str)
            else:
                text = self._http.post(path, cast_to=str, body=body)
            return json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise _Fault(f"answers {path} with what is no JSON: {one_line(error)}") from error
        except openai.APITimeoutError as error:
            raise _Fault(f"gave no answer within server_timeout = {self._timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise _Busy(f"cannot be reached: {one_line(error.__cause__ or error)}") from error
        except openai.APIStatusError as error:
            message = without_secrets(one_line(error), self._key)
            said = f"answers {path} with status {error.status_code}: {message[:200]}"
            if error.status_code == 429 or error.status_code >= 500:
                raise _Busy(said) from error
            if error.status_code == 404 and not path.startswith("/v1/"):
                raise _Missing(f"has no route {path}; start it with VLLM_SERVER_DEV_MODE=1") from error
            raise _Fault(said) from error


def _read(found: Any, prompt: Sequence[int], sampling: Sampling, vocabulary: int) -> tuple[list[int], list[float]]:
    """The one answer of a completion. Raises _Fault where it is none to this prompt with these settings."""
    choices = found.get("choices") if isinstance(found, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise _Fault(f"gave {len(choices) if isinstance(choices, list) else 'no'} answers to one prompt")
    (choice,) = choices
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list):
        raise _Fault("gave no token ids; vLLM gives them since 0.10.2 (return_token_ids)")
    if choice.get("prompt_token_ids") != list(prompt):
        raise _Fault("answered another prompt than it was asked")
    foreign = [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]
    if foreign:
        raise _Fault(
            f"gave the token id {foreign[0]!r}, and the policy has {vocabulary}; see that it serves this model"
        )
    if finish not in ("stop", "length") or not 0 < len(ids) <= sampling.max_new_tokens:
        raise _Fault(f"gave {len(ids)} of at most {sampling.max_new_tokens} tokens, with finish_reason {finish!r}")
    if finish == "stop" and ids[-1] not in sampling.end_ids:
        raise _Fault(f"ended an answer at the token {ids[-1]}, which ends none; start it with --generation-config vllm")
    if finish == "length" and len(ids) < sampling.max_new_tokens:
        raise _Fault(f"cut an answer off after {len(ids)} tokens; start it with a larger --max-model-len")
    if not sampling.logprobs:
        return ids, []
    logprobs = choice.get("logprobs")
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
    if (
        not isinstance(logprobs, list)
        or len(logprobs) != len(ids)
        or not all(type(x) in (float, int) for x in logprobs)
    ):
        raise _Fault(f"gave no log-probability for each of {len(ids)} tokens")
    return ids, [float(x) for x in logprobs]

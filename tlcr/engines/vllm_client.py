"""One vLLM behind HTTP: its routes, and what it must answer.

Nothing outside this module speaks them. Answers come from ``/v1/completions``, whose prompts may be token ids. Weights
are read from a folder: ``/collective_rpc`` has the server do it, a route of its development mode, which servers have
that were started with ``VLLM_SERVER_DEV_MODE=1``, on a network that is trusted. Then ``/reset_prefix_cache`` drops what
the old weights made, and ``/update_weight_version`` names the new ones. ``/v1/load_lora_adapter`` takes an adapter,
of servers that were started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``. Servers that were
started with the backend of ``tlcr.hosts.vllm_weights`` take weights over the network, by the routes of weight transfer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tlcr.credentials import VLLM_KEY_VARIABLE, without_secrets
from tlcr.distribution import install_command
from tlcr.engines.line import Line, chunk
from tlcr.engines.probe import Probe
from tlcr.engines.protocol import Sampling
from tlcr.errors import BackendUnavailable
from tlcr.models.faults import one_line

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


WITHOUT_LINE = (
    'takes no weights over the network; start it with --weight-transfer-config \'{"backend": "tlcr"}\' and '
    "--worker-extension-cls tlcr.hosts.vllm_weights.Worker, or set server_weights: files"
)


class Fault(Exception):
    """Why a server is left out: a clause."""


class Busy(Exception):
    """The server cannot do it now."""


class Missing(Fault):
    """The server has no such route."""


class State(NamedTuple):
    """What the main process found out about a server."""

    base: str | None = None
    """The name of the model that it was started with."""
    model: str | None = None
    """What it is asked for: that model, or an adapter on it."""
    has_versions: bool = True
    """Whether it names its weights."""
    takes_adapters: bool = True
    """Whether it takes adapters alone, as far as is known."""
    given: str | None = None
    """The version of the weights that it was given last, where they are an adapter on what was given before."""

    @property
    def may_take_adapters(self) -> bool:
        """Where weights have no version, it could not be told whose weights an adapter stands on."""
        return self.takes_adapters and self.has_versions


class Client:
    """One server. Every method raises Fault where the server does not do what it should.

    Args:
        address: of the server, with /v1 or without.
        timeout: seconds that a request may take.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        self._timeout, self._key = timeout, os.environ.get(VLLM_KEY_VARIABLE) or "none"
        self._http = openai.OpenAI(base_url=self.address, api_key=self._key, timeout=timeout, max_retries=0)
        self.state = State()
        self.under_way = self.asked = 0
        self.probe: Probe | None = None
        self.line: Line | None = None

    def close(self) -> None:
        self._http.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Closes the line, if there is one."""
        if self.line is not None:
            self.line.close()
            self.line = None

    def begin_weights(self) -> None:
        """Joins a line, and is told that whole weights come over it, in place of all that it had."""
        self._forget()
        try:
            found = self._request("GET", "/get_world_size")
            self.line = Line(self.address, int(found["world_size"]), self._timeout)
            self._meanwhile("/init_weight_transfer_engine", {"init_info": self.line.info}, self.line.join)
        except (Fault, Busy, OSError, RuntimeError, TypeError, KeyError, ValueError) as error:
            raise Fault(f"{WITHOUT_LINE}: {one_line(error)[:300]}") from error
        # A trainer that ended in the midst of an update left it open, and vLLM begins no second one.
        with suppress(Busy, Fault):
            self._attempt("POST", "/finish_weight_update", None)
        self._request("POST", "/start_weight_update")

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Takes some of them: on the CPU, contiguous."""
        assert self.line is not None
        line = self.line
        try:
            self._meanwhile("/update_weights", {"update_info": chunk(weights)}, lambda told: line.send(weights, told))
        except (Busy, RuntimeError) as error:
            raise Fault(f"did not take weights over the network: {one_line(error)}") from error

    def end_weights(self, version: str) -> None:
        """Is told that it has them all."""
        self._request("POST", "/finish_weight_update")
        self.hang_up()
        self._has_other(version)

    def take_weights(self, folder: Path, version: str) -> None:
        """Takes whole weights from files, in place of all that it had."""
        self._forget()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._request("POST", "/collective_rpc", body)
        self._has_other(version)

    def _meanwhile(self, path: str, body: Mapping[str, Any], action: Callable[[Future[Any]], None]) -> None:
        """Sends a request, once, that the server answers when the action is done."""
        pool = ThreadPoolExecutor(1, "server")
        try:
            action(pool.submit(self._attempt, "POST", path, body))
        finally:
            pool.shutdown(wait=False)  # where the action failed, the server may take its time to notice

    def _forget(self) -> None:
        """All that it was given is about to go."""
        base = self.state.base or self._name_of_model()
        self.state = self.state._replace(base=base, model=base, given=None)

    def _has_other(self, version: str) -> None:
        """What the old weights left goes too, and the new ones get their name."""
        dropped = self._request("POST", "/reset_prefix_cache")  # earlier versions answer nothing
        if isinstance(dropped, Mapping) and dropped.get("success") is False:
            raise Fault("did not drop what the old weights left in its prefix cache: it has other requests under way")
        self._name_weights(version)

    def has_base_of(self, version: str) -> bool:
        """Whether it still has what the adapter of a version stands on."""
        return self.state.may_take_adapters and self.state.given == version and self._version() == version

    def tries_adapters(self, folder: Path, version: str) -> None:
        """Finds out whether it takes adapters, by one that it lets go of again."""
        try:
            # sent once: vLLM answers 500 where it has no LoRA, or ranks that are too small
            self._attempt("POST", "/v1/load_lora_adapter", {"lora_name": version, "lora_path": str(folder)})
            self._attempt("POST", "/v1/unload_lora_adapter", {"lora_name": version})
        except (Fault, Busy) as fault:
            self.state = self.state._replace(takes_adapters=False)
            logger.warning(
                "the server at %s takes no adapters alone and gets whole weights each time: it %s. With --enable-lora, "
                "--max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 it takes them",
                self.address,
                fault,
            )

    def take_adapter(self, folder: Path, version: str) -> None:
        """Takes an adapter on the whole weights that it has, in place of the one before."""
        old = self.state.given
        self._request("POST", "/v1/load_lora_adapter", {"lora_name": version, "lora_path": str(folder)})
        if old is not None:
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": old})
        self.state = self.state._replace(model=version, given=version)
        self._name_weights(version)

    def _name_weights(self, version: str) -> None:
        if self.state.has_versions:
            try:
                self._request("POST", "/update_weight_version", {"new_version": version})
            except Missing:
                self.state = self.state._replace(has_versions=False)
                logger.warning(
                    "the server at %s names no version of its weights (vLLM before 0.30): another trainer that gives "
                    "it other weights in the midst of a rollout is noticed by their log-probabilities alone",
                    self.address,
                )

    def check_version(self, version: str) -> None:
        """Raises Fault where the weights are no longer those that this run gave."""
        if not self.state.has_versions:
            return
        now = self._version()
        if now != version:
            raise Fault(
                f"has the weights {now!r} and was given {version!r}: another trainer uses it, or it was started anew"
            )

    def _version(self) -> str | None:
        found = self._request("GET", "/weight_info")
        return found.get("weight_version") if isinstance(found, Mapping) else None

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
            raise Fault("names no model") from error

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of the response; None where there is none."""
        again = Retrying(
            retry=retry_if_exception_type(Busy), stop=stop_after_attempt(ATTEMPTS), wait=BACKOFF, reraise=True
        )
        try:
            return again(self._attempt, method, path, body)
        except Busy as error:
            raise Fault(f"{error} ({ATTEMPTS} times)") from error

    def _attempt(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            if method == "GET":
                text = self._http.get(path, cast_to=str)
            else:
                text = self._http.post(path, cast_to=str, body=body)
            return json.loads(text) if text and not path.endswith("_lora_adapter") else None  # which answer in words
        except (ValueError, RecursionError) as error:
            raise Fault(f"answers {path} with what is no JSON: {one_line(error)}") from error
        except openai.APITimeoutError as error:
            raise Fault(f"gave no answer within server_timeout = {self._timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise Busy(f"cannot be reached: {one_line(error.__cause__ or error)}") from error
        except openai.APIStatusError as error:
            message = without_secrets(one_line(error), self._key)
            said = f"answers {path} with status {error.status_code}: {message[:200]}"
            if error.status_code == 429 or error.status_code >= 500:
                raise Busy(said) from error
            if error.status_code == 404 and not path.startswith("/v1/"):
                raise Missing(f"has no route {path}; start it with VLLM_SERVER_DEV_MODE=1") from error
            raise Fault(said) from error


def _read(found: Any, prompt: Sequence[int], sampling: Sampling, vocabulary: int) -> tuple[list[int], list[float]]:
    """The one answer of a completion. Raises Fault where it is none to this prompt with these settings."""
    choices = found.get("choices") if isinstance(found, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise Fault(f"gave {len(choices) if isinstance(choices, list) else 'no'} answers to one prompt")
    (choice,) = choices
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list):
        raise Fault("gave no token ids; vLLM gives them since 0.10.2 (return_token_ids)")
    if choice.get("prompt_token_ids") != list(prompt):
        raise Fault("answered another prompt than it was asked")
    foreign = [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]
    if foreign:
        raise Fault(f"gave the token id {foreign[0]!r}, and the policy has {vocabulary}; see that it serves this model")
    if finish not in ("stop", "length") or not 0 < len(ids) <= sampling.max_new_tokens:
        raise Fault(f"gave {len(ids)} of at most {sampling.max_new_tokens} tokens, with finish_reason {finish!r}")
    if finish == "stop" and ids[-1] not in sampling.end_ids:
        raise Fault(f"ended an answer at the token {ids[-1]}, which ends none; start it with --generation-config vllm")
    if finish == "length" and len(ids) < sampling.max_new_tokens:
        raise Fault(f"cut an answer off after {len(ids)} tokens; start it with a larger --max-model-len")
    if not sampling.logprobs:
        return ids, []
    logprobs = choice.get("logprobs")
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
    if (
        not isinstance(logprobs, list)
        or len(logprobs) != len(ids)
        or not all(type(x) in (float, int) for x in logprobs)
    ):
        raise Fault(f"gave no log-probability for each of {len(ids)} tokens")
    return ids, [float(x) for x in logprobs]

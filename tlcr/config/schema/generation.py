"""What answers: models on servers and here, for the reviser and for the rollout of PPO."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.config.schema.models import GeneratorConfig
from tlcr.credentials import VLLM_KEY_VARIABLE, refuse_credentials
from tlcr.errors import ConfigError

EngineName = Literal["generate", "static", "paged", "vllm", "server", "auto"]


@dataclass(frozen=True)
class EndpointConfig(Checked):
    """A server that speaks the OpenAI chat protocol: OpenAI, a proxy, vLLM, llama.cpp, Ollama. The extra ``openai``."""

    model: str | None = knob(None, "the model's name on the server")
    base_url: str | None = knob(
        None, "the server's address, such as http://localhost:8000/v1; default: OPENAI_BASE_URL, else OpenAI"
    )
    key_variable: str = knob(
        "OPENAI_API_KEY",
        "environment variable that holds the API key; never write the key into a config",
        advanced=True,
    )
    length_field: Literal["max_tokens", "max_completion_tokens"] = knob(
        "max_tokens",
        "name of the field that limits an answer's length; OpenAI's newer models need the second",
        advanced=True,
    )
    extra_body: str | None = knob(
        None, """further fields of a request as a JSON object, such as '{"reasoning_effort": "low"}'""", advanced=True
    )
    concurrency: int = knob(8, "requests under way at a time", ge=1)
    requests_per_minute: float | None = knob(None, "requests are spaced to this rate", gt=0, advanced=True)
    tokens_per_minute: float | None = knob(
        None, "limit on the rate of tokens; prompts and full-length answers count", gt=0, advanced=True
    )
    timeout: float = knob(120.0, "a request that takes longer is aborted", unit="seconds", gt=0, advanced=True)
    retries: int = knob(
        6,
        "times that a request is sent again after a time-out, a broken connection, a 429 or a 5xx",
        ge=0,
        advanced=True,
    )
    prompt_price: float | None = knob(None, "price of a million prompt tokens, in any one currency", ge=0)
    answer_price: float | None = knob(None, "price of a million answer tokens, in the same currency", ge=0)
    max_cost: float | None = knob(
        None, "no request is sent that could raise the cost above this; earlier runs on the same cache count", gt=0
    )
    max_requests: int | None = knob(
        None, "at most this many requests are sent; retries and earlier runs count", ge=1, advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_credentials("EndpointConfig.base_url", self.base_url, self.key_variable)
        if (self.prompt_price is None) != (self.answer_price is None):
            raise ConfigError(
                f"EndpointConfig.prompt_price is {self.prompt_price} and answer_price is {self.answer_price}; name "
                "both, or neither"
            )
        if self.max_cost is not None and self.prompt_price is None:
            raise ConfigError(
                f"EndpointConfig.max_cost is {self.max_cost:g}, and no cost can be known without prices; set "
                "prompt_price and answer_price"
            )
        if self.extra_body is not None:
            try:
                fields = json.loads(self.extra_body)
            except ValueError as error:
                raise ConfigError(f"EndpointConfig.extra_body is not JSON ({error}): {self.extra_body}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"EndpointConfig.extra_body is {self.extra_body}; it must be a JSON object")

    def lacks_key(self) -> bool:
        """Whether the API key is missing and the server is OpenAI's, which needs one."""
        return not os.environ.get(self.key_variable) and self.base_url is None and "OPENAI_BASE_URL" not in os.environ


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Checked):
    """What samples answers from a model that was loaded here (docs/engines.md). By keyword alone: so the knobs of a
    section that has these too come first."""

    batch_size: int = knob(8, "answers that a local model generates at a time", ge=1)
    engine: EngineName = knob(
        "generate",
        "what samples: transformers' generate; the same with a static cache and CUDA graphs, for a GPU; or its "
        "continuous batching, in which the next prompt takes the place of an answer that ended; or vLLM, in this "
        "process or on servers; auto: the fastest of them that is there, as tlcr doctor says",
    )
    server: tuple[str, ...] = knob((), "addresses of the vLLM servers, such as [http://localhost:8000]", decides=False)
    server_timeout: float = knob(
        600.0,
        "a server that takes longer for a request is left out",
        unit="seconds",
        gt=0,
        advanced=True,
        decides=False,
    )
    server_weights: Literal["files", "network"] = knob(
        "files",
        "how servers get the weights: in files on a disk that they share with the trainer, or over the network, if "
        "they were started with tlcr.hosts.vllm_weights",
        advanced=True,
        decides=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for address in self.server:
            refuse_credentials(f"{name}.server", address, VLLM_KEY_VARIABLE)
        if self.engine == "server" and not self.server:
            raise ConfigError(
                f"{name}.engine is 'server' and server names none; name addresses, such as [http://localhost:8000]"
            )
        if len(set(self.server)) < len(self.server):
            raise ConfigError(f"{name}.server is {list(self.server)}, with an address twice; name each once")

    @property
    def may_use_servers(self) -> bool:
        """Whether the engine is, or may turn out to be, vLLM servers."""
        return self.engine == "server" or (self.engine == "auto" and bool(self.server))


@dataclass(frozen=True)
class ReviserConfig(EngineConfig):
    """The reviser: makes minimal edits to rejected answers where data.edits is not set (docs/reviser.md)."""

    backend: Literal["none", "endpoint", "local", "files"] = knob(
        "none", "a model on a server, a model on this machine, or finished revisions in files"
    )
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    files: str | None = knob(
        None, "for 'files': a source in a format of data.edits, matched by prompt and rejected", path=True
    )
    answer_format: Literal["auto", "json", "marker"] = knob(
        "auto",
        "format of the model's answer; 'auto': JSON from an endpoint, a marker line from a local model",
        advanced=True,
    )
    temperature: float | None = knob(0.0, "sampling temperature; null: the server's default", ge=0)
    max_new_tokens: int = knob(1024, "length limit of reasoning and revision together", unit="tokens", ge=1)
    attempts: int = knob(
        1,
        "requests, each paid, until a revision passes the checks; above 1 needs a temperature above 0",
        ge=1,
        advanced=True,
    )
    max_changed: float = knob(
        0.75,
        "a revision that changes a larger share of the words is set aside as another answer",
        gt=0,
        le=1,
        advanced=True,
    )
    keep_unchanged: bool = knob(
        False, "keep answers in which the reviser found nothing to correct; all their labels are neutral", advanced=True
    )
    on_unanswered: Literal["skip", "raise"] = knob(
        "raise",
        "when a request failed in all retries: go on without its pair, or stop, so that a later run asks again",
        advanced=True,
    )
    cache: str | None = knob(
        None, "file that stores every answer; default: revisions/answers.sqlite in output_dir", advanced=True, path=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "endpoint" and self.endpoint.model is None:
            raise ConfigError("ReviserConfig.backend is 'endpoint'; name the model there: endpoint.model")
        if self.backend == "local" and self.model.path == GeneratorConfig().path:
            raise ConfigError("ReviserConfig.backend is 'local'; name a model that follows instructions: model.path")
        if (self.backend == "files") != (self.files is not None):
            raise ConfigError(
                f"ReviserConfig.backend is {self.backend!r} and files is {self.files!r}; backend 'files', and only "
                "that one, reads files"
            )
        if self.backend == "local" and self.temperature is None:
            raise ConfigError("ReviserConfig.temperature is null, but a local model has no server default; set it")
        if self.attempts > 1 and self.temperature == 0:
            raise ConfigError(
                f"ReviserConfig.attempts is {self.attempts} at temperature 0, where the same question gets the same "
                "answer; set temperature above 0, or attempts to 1"
            )

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the revisions; rates, limits and prices are not among them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("cache", "endpoint", *(f.name for f in dataclasses.fields(EngineConfig))):
            del values[name]
        return {**values, "endpoint": {"model": self.endpoint.model, "extra_body": self.endpoint.extra_body}}


@dataclass(frozen=True)
class RolloutConfig(EngineConfig):
    """How answers are sampled."""

    max_new_tokens: int = knob(256, "length limit of an answer", source="released code", unit="tokens", ge=1)
    temperature: float = knob(1.0, "sampling temperature; log-probabilities are taken at it too", gt=0)
    top_p: float = knob(1.0, "nucleus sampling; below 1 the other tokens are never tried", gt=0, le=1)
    top_k: int = knob(0, "sample among this many tokens; 0: all", ge=0)
    batch_size: int = knob(64, "answers generated and scored at a time on a process", ge=1)
    ahead: int = knob(
        0,
        "rounds that answers are sampled ahead of training: with 1 the servers answer the prompts of the next round "
        "while this one trains, by weights that are one update old",
        ge=0,
        le=1,
    )
    environment: str | None = knob(
        None,
        "'package.module:function' that answers the policy: it turns each answer into the next message, or ends the "
        "conversation",
        path=True,
    )
    max_turns: int = knob(4, "answers of a conversation at most, with an environment", ge=1)
    max_message_tokens: int = knob(
        256, "a message of the environment that is longer ends the conversation", unit="tokens", ge=1, advanced=True
    )
    correction: Literal["none", "truncate", "mask"] = knob(
        "truncate",
        "where another implementation or a truncated distribution samples: each token's policy loss is weighted by its "
        "probability under the policy over that of sampling, at most correction_max (truncate), or 0 outside "
        "correction_min to correction_max (mask)",
        source="Yao et al. 2025",
    )
    correction_max: float = knob(2.0, "largest weight of the correction", source="verl", ge=1, advanced=True)
    correction_min: float = knob(
        0.5, "smallest weight that correction: mask keeps", source="IcePop", ge=0, le=1, advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead and not self.may_use_servers:
            raise ConfigError(
                f"RolloutConfig.ahead is {self.ahead} with engine {self.engine!r}: an engine in this process computes "
                "where the policy is trained, so that nothing is gained; set ahead: 0, or engine: server"
            )
        if self.ahead and self.correction == "none":
            raise ConfigError(
                f"RolloutConfig.ahead is {self.ahead} with correction 'none': answers come from weights that are one "
                "update old, and PPO's ratios would be those of the new ones; set correction: truncate, or ahead: 0"
            )
        if self.correction == "none" and self._truncates:
            raise ConfigError(
                f"RolloutConfig.correction is 'none' with top_p {self.top_p} and top_k {self.top_k}: answers come from "
                "a truncated distribution, and PPO's ratios would be those of the full one; set correction: truncate, "
                "or top_p: 1 and top_k: 0"
            )

    @property
    def _truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0

    @property
    def off_policy(self) -> bool:
        """Whether tokens are drawn from another distribution than the one that the trainer computes."""
        return self._truncates or self.engine not in ("generate", "static")

    @property
    def max_response_tokens(self) -> int:
        """What stands behind a prompt at most: an answer, or with an environment a conversation."""
        return self.max_new_tokens if self.environment is None else self.max_conversation_tokens

    @property
    def max_conversation_tokens(self) -> int:
        """The answers and messages of a conversation at most."""
        return self.max_turns * self.max_new_tokens + (self.max_turns - 1) * self.max_message_tokens

"""Every knob of tlcr, as frozen dataclasses: one typed config, read from YAML and from flags alike.

The defaults are the vetted setting. Where each comes from is the ``source`` of its knob: "paper" is arXiv 2407.16574,
"released code" its authors' training scripts, "PPO" Schulman et al. 2017 (arXiv 1707.06347) as practised by Stiennon
et al. 2020, "DPO" Rafailov et al. 2023 (arXiv 2305.18290), "Q-RM" the released code of Chen et al. 2025 (arXiv
2505.23363), "DAPO" Yu et al. 2025 (arXiv 2503.14476), "LoRA" Hu et al. 2021 (arXiv 2106.09685), "Schulman et al. 2025"
their "LoRA Without Regret", "ours" a choice of this project. Nothing here imports torch, so that ``tlcr --help``
answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from tlcr.credentials import VLLM_KEY_VARIABLE, refuse_credentials
from tlcr.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
EngineName = Literal["generate", "static", "paged", "vllm", "server", "auto"]
Adapted = Literal["sft", "reward_model", "q_model", "dpo", "discriminator", "policy", "value"]
"""What can be trained by adapters: the models before PPO, and the two that PPO trains."""
RewardKind = Literal[
    "continuous",
    "discrete",
    "sign",
    "positive_only",
    "negative_only",
    "random",
    "sequence",
    "sum_at_end",
    "spans",
    "uniform",
    "attention",
    "prefix_difference",
    "q",
    "dpo",
    "callable",
]

LOGIT_KINDS = ("continuous", "discrete", "sign", "positive_only", "negative_only", "sum_at_end", "spans")
"""Kinds that are read off the discriminator's logits."""
SHARED_SCORE_KINDS = ("uniform", "attention", "prefix_difference")
"""Kinds that share the sequence reward model's score out among the tokens."""
WHOLE_ANSWER_KINDS = ("sequence", "sum_at_end")
"""Kinds that pay at the last token alone."""
OFFICIAL_KINDS = ("continuous", "discrete", "sign", "positive_only", "negative_only")
"""Kinds that the released code has too."""


def knob(
    default: Any,
    help: str,
    *,
    source: str = "ours",
    unit: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    advanced: bool = False,
    decides: bool = True,
) -> Any:
    """A dataclass field that carries its meaning, its unit, its bounds and the source of its default.

    tests/config/knobs.txt lists every knob, and says how to add one.

    Args:
        default: the default; a list or tuple is copied for each config.
        help: what the knob means, in one line.
        source: where the default comes from.
        unit: of the value.
        ge: the value is at least this.
        gt: the value is greater than this.
        le: the value is at most this.
        advanced: few runs set it; only ``--help-all`` lists it. Its path and flag work like those of any other knob.
        decides: whether the result depends on it, but for rounding; else what has ended counts with any value of it.

    Returns:
        The field.
    """
    metadata = {"help": help, "source": source, "unit": unit, "ge": ge, "gt": gt, "le": le}
    metadata |= {"advanced": advanced, "decides": decides}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def undecisive(section: object) -> tuple[str, ...]:
    """The knobs of a section on which no result depends."""
    return tuple(f.name for f in dataclasses.fields(section) if not f.metadata.get("decides", True))  # type: ignore[arg-type]


LARGEST = 2**63 - 1
"""Of whole numbers: no knob counts further, and floats and tensors do not hold them."""


def in_short(number: int) -> str:
    """A whole number for a message: its digits, or how many it has."""
    # Not str(): python refuses to write thousands of digits.
    return str(number) if abs(number) < 10**40 else f"a number of some {int(number.bit_length() * 0.30103) + 1} digits"


class Checked:
    """Checks the bounds of every knob when a config is made, so that a bad value raises before any model loads."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, str) and "\0" in value:
                raise ConfigError(f"{type(self).__name__}.{f.name} holds the character NUL; take it out")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > LARGEST:
                    raise ConfigError(
                        f"{type(self).__name__}.{f.name} is {in_short(number)}; it must be a number that fits 64 bits"
                    )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                raise ConfigError(f"{type(self).__name__}.{f.name} is {value!r}; it must be a finite number")
            for name, holds, word in (
                ("ge", lambda v, b: v >= b, "at least"),
                ("gt", lambda v, b: v > b, "greater than"),
                ("le", lambda v, b: v <= b, "at most"),
            ):
                bound = f.metadata.get(name)
                if bound is not None and not holds(value, bound):
                    raise ConfigError(f"{type(self).__name__}.{f.name} is {value!r}; it must be {word} {bound}")


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """A language model that runs on this machine and only generates text."""

    path: str = knob("embedded", "a model folder or hub name; 'embedded' makes the small model of the embedded task")
    tokenizer: str | None = knob(None, "a tokenizer's folder or hub name; default: the model's own", advanced=True)
    gguf_file: str | None = knob(None, "the GGUF file in the model's folder, for models in that format", advanced=True)
    dtype: Dtype = knob("float32", "dtype of weights and activations; the optimiser keeps float32 masters of bfloat16")
    pad_token: str | None = knob(None, "a token to pad with, for a tokenizer that names none", advanced=True)
    chat_template: str | None = knob(None, "a Jinja template (text, or a file's path) for a tokenizer without one")
    attn_implementation: str = knob(
        "auto",
        "attention implementation of transformers; auto: sdpa, or eager where the architecture has no other",
        advanced=True,
    )
    trust_remote_code: bool = knob(
        False, "run code that comes with the model: only for sources you trust", advanced=True
    )


@dataclass(frozen=True)
class ModelConfig(GeneratorConfig):
    """The language model that all training starts from."""

    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, more time", decides=False
    )

    def saved_in(self, folder: object) -> ModelConfig:
        """These settings for a folder that a stage wrote: the tokenizer in it is complete."""
        return dataclasses.replace(
            self, path=str(folder), tokenizer=None, gguf_file=None, pad_token=None, chat_template=None
        )


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank adapters on frozen weights instead of training all weights; needs peft."""

    rank: int | None = knob(
        None, "rank of the adapters; default: no adapters, all weights are trained", source="LoRA", ge=1
    )
    alpha: float = knob(
        32.0, "an adapter's output is scaled by alpha / rank", source="Schulman et al. 2025", gt=0, advanced=True
    )
    targets: tuple[str, ...] = knob(
        ("all-linear",),
        "names of the linear layers that get adapters, as the last part of their names has it (q_proj); all-linear: "
        "all of the decoder's, but not the output head, which may be named beside it (lm_head)",
        source="Schulman et al. 2025",
        advanced=True,
    )
    roles: tuple[Adapted, ...] = knob(
        ("policy", "value", "discriminator"),
        "what is trained by adapters; all else is trained whole. In PPO, policy, value model and discriminator share "
        "one copy of the frozen weights with the reference",
    )
    base_bits: Literal[4] | None = knob(
        None,
        "bits of the frozen weights that adapters stand on, in the decoder's linear layers: 4 (NF4, by the package "
        "bitsandbytes); default: the weights are as they were read, in model.dtype",
        source="QLoRA",
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_bits is not None and self.rank is None:
            raise ConfigError(
                f"LoRAConfig.base_bits is {self.base_bits} and rank null: weights that are trained cannot be in so few "
                "bits; set a rank, such as 16, or base_bits: null"
            )
        for name, given in (("targets", self.targets), ("roles", self.roles)):
            if not given:
                raise ConfigError(f"LoRAConfig.{name} is empty; name at least one, or set rank: null for no adapters")
        if "all-linear" in self.targets and len(self.targets) > 2:
            raise ConfigError(
                f"LoRAConfig.targets is {list(self.targets)!r}: all-linear stands for every layer; name it alone, "
                "beside the output head, or name layers"
            )
        if "value" in self.roles and "policy" not in self.roles:
            raise ConfigError(
                "LoRAConfig.roles has 'value' without 'policy': the value model's adapter stands on the weights that "
                "the policy's leaves frozen; add 'policy', or drop 'value'"
            )

    def trains(self, name: Adapted) -> bool:
        """Whether this model is trained by an adapter."""
        return self.rank is not None and name in self.roles


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where preferences, edits and prompts come from. A source is a local file, a folder or a hub dataset's name."""

    preferences: str | None = knob(None, "preference pairs, for SFT, the reward models and DPO")
    preferences_format: Literal["auto", "preference", "hh", "tlcr"] = knob(
        "auto", "format of the preferences", advanced=True
    )
    edits: str | None = knob(None, "edit pairs, for the discriminator")
    edits_format: Literal["auto", "edits", "tlcr"] = knob("auto", "format of the edits", advanced=True)
    prompts: str | None = knob(None, "prompts for PPO (a 'prompt' column); default: the prompts of the preferences")
    embedded_pairs: int = knob(
        2000, "pairs that the embedded task generates, when no source is named", ge=1, advanced=True
    )
    embedded_words: int = knob(
        20, "words of an answer after which the embedded task takes off for each more", ge=10, le=400, advanced=True
    )
    split: str = knob("train", "the split to read, for hub datasets")
    limit: int | None = knob(None, "read at most this many records of each source", ge=1)
    held_out: float = knob(0.1, "share of records kept for evaluation, chosen by a hash of their prompts", ge=0, le=0.9)
    shares: tuple[float, ...] = knob(
        (),
        "proportions in which the prompts of the preferences are divided among SFT, reward learning (reviser, labels, "
        "discriminator, reward models, DPO) and PPO; [2, 4, 4] in the paper; default: every stage sees all",
    )
    max_prompt_tokens: int = knob(
        256, "longer prompts are cut at the beginning", source="released code", unit="tokens", ge=1
    )
    max_answer_tokens: int = knob(256, "longer answers are cut at the end", source="released code", unit="tokens", ge=1)
    on_malformed: Literal["skip", "raise"] = knob(
        "raise", "report and skip a record that cannot be used, or stop", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares:
            return
        if len(self.shares) != 3 or min(self.shares) < 0 or sum(self.shares) == 0:
            raise ConfigError(
                f"DataConfig.shares is {list(self.shares)}; it wants three numbers, none below 0 and not all 0: for "
                "SFT, for reward learning and for PPO, such as [2, 4, 4]"
            )
        if self.preferences is None:
            raise ConfigError(
                f"DataConfig.shares {list(self.shares)} part the prompts of data.preferences, which is not set; name "
                "the preferences, or drop shares"
            )


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
    files: str | None = knob(None, "for 'files': a source in a format of data.edits, matched by prompt and rejected")
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
        None, "file that stores every answer; default: revisions/answers.sqlite in output_dir", advanced=True
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
class LabelConfig(Checked):
    """How edits become token labels."""

    end_of_sequence: Literal["neutral", "ignore", "boundary"] = knob(
        "neutral",
        "label of the end-of-sequence token: always neutral; ignored in the loss (released code); or 'boundary', "
        "negative where the reviser moved the end away from here and positive where it moved it here",
    )


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """A supervised stage: SFT, the reward model, the discriminator."""

    epochs: int = knob(2, "passes over the data", source="released code", ge=1)
    batch_size: int = knob(32, "examples in one optimiser step, over all processes", source="released code", ge=1)
    micro_batch_size: int | None = knob(
        None, "examples in one forward pass of a process; default: all of its share", ge=1, decides=False
    )
    learning_rate: float = knob(1e-5, "peak learning rate", source="released code", gt=0)
    weight_decay: float = knob(0.1, "AdamW weight decay", source="released code", ge=0, advanced=True)
    warmup_share: float = knob(0.05, "share of the steps in which the rate rises linearly", ge=0, le=1, advanced=True)
    schedule: Literal["cosine", "linear", "constant"] = knob(
        "cosine", "decay after the warm-up", source="released code", advanced=True
    )
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm", gt=0, advanced=True)
    evaluate_every: int = knob(
        0, "optimiser steps between evaluations; 0: at the end of each epoch", ge=0, advanced=True
    )
    save_every: int = knob(
        100, "optimiser steps between checkpoints; 0: none, but when a run is stopped", ge=0, decides=False
    )
    save_in_background: bool = knob(
        False, "go on while a checkpoint is written, from copies in host memory", advanced=True, decides=False
    )


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning of the policy on the preferred answers."""

    enabled: bool = knob(True, "run this stage; off means that model.path is already fine-tuned")


@dataclass(frozen=True)
class DiscriminatorConfig(TrainingConfig):
    """The token discriminator."""

    targets: Literal["soft", "hard", "three_class"] = knob(
        "soft",
        "soft: neutral is 0.5; hard: neutral tokens do not count; three_class: neutral is a class",
        source="paper",
    )
    bidirectional_layers: int = knob(
        0, "top layers that see the whole answer", source="released code", ge=0, advanced=True
    )
    calibrate: bool = knob(True, "fit a temperature on held-out edits and store it with the model", advanced=True)
    path: str | None = knob(None, "use this trained discriminator and skip its training")


@dataclass(frozen=True)
class RewardModelConfig(TrainingConfig):
    """The sequence-level baseline: a Bradley-Terry reward model."""

    path: str | None = knob(None, "use this trained reward model and skip its training")


@dataclass(frozen=True)
class QModelConfig(TrainingConfig):
    """A token-level Q function learned from preferences (Q-RM); beta times it is the reward of kind 'q'."""

    beta: float = knob(
        0.2, "factor on the difference of the answers' means in the loss, and on a token's reward", source="Q-RM", gt=0
    )
    margin: float = knob(
        2.0, "a pair costs little only where beta times that difference is above this", source="Q-RM", ge=0
    )
    path: str | None = knob(None, "use this trained model and skip its training")


@dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """A policy trained on preferences as an implicit reward model; its log-ratio is the reward of kind 'dpo'."""

    loss: Literal["pairs", "outcomes"] = knob(
        "pairs",
        "pairs: the chosen answer's log-ratio above the rejected one's (DPO); outcomes: each answer by itself, good or "
        "bad (implicit process reward)",
        source="DPO",
    )
    beta: float = knob(
        0.1, "KL coefficient of the objective, and factor on the log-ratio", source="DPO", unit="reward per nat", gt=0
    )
    path: str | None = knob(None, "use this trained policy and skip its training")


@dataclass(frozen=True)
class RefreshConfig(Checked):
    """The discriminator learns on during PPO, from the policy's own answers, which are revised and labelled."""

    every: int = knob(
        0,
        "updates from one refresh to the next, after each of which a round's answers are revised; 0: the discriminator "
        "stays as it was trained",
        ge=0,
    )
    share: float = knob(
        0.5, "share of the first training's pairs among those of a refresh, against forgetting", ge=0, le=0.95
    )
    learning_rate: float | None = knob(
        None, "constant rate of a refresh; default: a tenth of discriminator.learning_rate", gt=0
    )


@dataclass(frozen=True)
class RewardConfig(Checked):
    """Which reward PPO maximises."""

    kind: RewardKind = knob("continuous", "what a token earns", source="paper")
    band: float = knob(
        0.2, "'discrete' pays nothing where |2p - 1| is at most this", source="released code", ge=0, le=1, advanced=True
    )
    scale: float = knob(1.0, "factor on the token or sequence reward", ge=0)
    clip: float | None = knob(5.0, "bound on |scaled token reward|", source="released code", gt=0)
    centre: bool | Literal["position"] = knob(
        False,
        "subtract the running mean of a token's reward, KL included, so that length earns nothing; position: the "
        "running mean at the token's place in its answer, a line in the logarithm of the place",
    )
    length_penalty: float = knob(0.0, "cost of every token", ge=0, advanced=True)
    missing_eos_penalty: float = knob(0.0, "cost, at the last token, of an answer cut off by the length limit", ge=0)
    overlong_buffer: int | None = knob(
        None,
        "an answer that comes within so many tokens of the length limit pays at its last token, from nothing where the "
        "buffer begins to overlong_penalty at the limit",
        source="DAPO",
        unit="tokens",
        ge=1,
        advanced=True,
    )
    overlong_penalty: float = knob(1.0, "cost of an answer of full length", source="DAPO", gt=0, advanced=True)
    sequence_coef: float = knob(0.0, "adds the sequence reward model's score, times this, at the last token", ge=0)
    terminal_clip: float | None = knob(
        None,
        "bound on |the reward of a whole answer, paid at its last token|; 5 in the released code",
        gt=0,
        advanced=True,
    )
    span_end: str = knob(
        r"[.,;:!?\n]+",
        "for kind 'spans': a regular expression; a span of the answer ends with each match",
        advanced=True,
    )
    compat: Literal["tlcr-official"] | None = knob(
        None,
        "'tlcr-official': rewards as in the released code: double softmax, paid one action late, the exact KL in the "
        "reward",
    )
    callable: str | None = knob(
        None, "'package.module:function' or 'file.py:function', for kind 'callable'; the run executes that code"
    )
    refresh: RefreshConfig = field(default_factory=RefreshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh.every and self.kind not in LOGIT_KINDS:
            raise ConfigError(
                f"RewardConfig.refresh.every is {self.refresh.every}, but kind {self.kind!r} reads no discriminator; "
                f"set refresh.every: 0, or kind to one of {', '.join(LOGIT_KINDS)}"
            )
        if self.kind == "callable" and self.callable is None:
            raise ConfigError("RewardConfig.kind is 'callable'; name the function: callable: package.module:function")
        if self.kind != "callable" and self.callable is not None:
            raise ConfigError(
                f"RewardConfig.callable is {self.callable!r}, but kind is {self.kind!r}; set kind: callable, or drop it"
            )
        if self.kind == "sequence" and self.centre:
            raise ConfigError("RewardConfig.centre is for token rewards, but kind 'sequence' has none; drop it")
        if self.kind == "sequence" and self.sequence_coef != 0:
            raise ConfigError(
                "RewardConfig.sequence_coef adds the sequence score to another reward, and kind 'sequence' is that "
                "score; weigh it with scale"
            )
        try:
            re.compile(self.span_end)
        except re.error as error:
            raise ConfigError(
                f"RewardConfig.span_end is {self.span_end!r}, which is no regular expression ({error}); write one such "
                r"as '[.!?]+' or '\s'"
            ) from error
        if self.compat is not None and self.kind not in OFFICIAL_KINDS:
            raise ConfigError(
                f"RewardConfig.compat is {self.compat!r}, but the released code has no kind {self.kind!r}; set kind to "
                f"one of {', '.join(OFFICIAL_KINDS)}, or drop compat"
            )


@dataclass(frozen=True)
class KLConfig(Checked):
    """The KL penalty, which keeps the policy close to the reference model."""

    coef: float = knob(0.1, "coefficient, in reward per nat", source="released code", ge=0)
    placement: Literal["reward", "loss"] = knob("reward", "subtracted from each action's reward, or added to the loss")
    estimator: Literal["k1", "k2", "k3", "full"] = knob(
        "k1",
        "k1 log-ratio, k2 half its square, k3 exp(-k1) - 1 + k1, or the exact sum over the vocabulary. 'full' belongs "
        "in the loss: in the reward it does not depend on the action",
    )
    target: float | None = knob(None, "adapt the coefficient to hold this KL", unit="nats per token", gt=0)
    horizon: int | None = knob(
        None,
        "answers over which the coefficient adapts; default: a twentieth of all that the run samples, one batch at "
        "least",
        ge=1,
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "full" and self.placement == "reward":
            raise ConfigError(
                "KLConfig.estimator is 'full' with placement 'reward': the exact KL of a state does not depend on the "
                "action, so as a reward it discourages no action; set placement: loss, or estimator: k1"
            )
        if self.estimator == "k1" and self.placement == "loss":
            raise ConfigError(
                "KLConfig.estimator is 'k1' with placement 'loss': the gradient of log p - log q is zero on average, "
                "so it does not limit the KL; set estimator to k2, k3 or full, or placement: reward"
            )
        if self.target is not None and self.coef == 0:
            raise ConfigError("KLConfig.target adapts coef by factors, which leave 0 at 0; set coef above 0")


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


@dataclass(frozen=True)
class PPOConfig(Checked):
    """Proximal policy optimisation with dense rewards."""

    updates: int = knob(200, "rollout-and-update rounds", ge=1)
    batch_size: int = knob(128, "answers per round, over all processes", ge=1)
    minibatch_size: int = knob(64, "answers per optimiser step, over all processes", ge=1)
    micro_batch_size: int | None = knob(
        None, "answers per forward pass of a process, at most; default: its whole share", ge=1, decides=False
    )
    micro_batch_tokens: int | None = knob(
        None,
        "tokens per forward pass of a process, at most, its padding among them; default: on a CPU 1024, else no limit",
        ge=1,
        decides=False,
    )
    packing: Literal["auto", "always", "never"] = knob(
        "auto",
        "prompts and answers end to end in one row, without padding; auto: with flash attention on a GPU alone, since "
        "other attention takes time and memory by the square of all tokens",
        advanced=True,
        decides=False,
    )
    epochs: int = knob(1, "passes over each round's answers", source="released code", ge=1)
    learning_rate: float = knob(1e-6, "policy learning rate", source="released code", gt=0)
    value_learning_rate: float = knob(1e-6, "value learning rate", source="released code", gt=0)
    weight_decay: float = knob(0.0, "AdamW weight decay", ge=0, advanced=True)
    schedule: Literal["cosine", "linear", "constant"] = knob(
        "constant", "learning-rate decay over the updates", advanced=True
    )
    warmup_updates: int = knob(
        0,
        "updates in which the policy's learning rate rises linearly, from the first that trains the policy",
        ge=0,
        advanced=True,
    )
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm", gt=0, advanced=True)
    gamma: float = knob(1.0, "discount", source="released code", ge=0, le=1)
    lam: float = knob(0.95, "lambda of the advantage estimate", source="released code", ge=0, le=1)
    whiten: bool = knob(True, "advantages get zero mean and unit variance over all counted tokens of all processes")
    clip: float = knob(0.2, "the ratio is clipped at 1 - clip", source="PPO, released code", gt=0, le=1)
    clip_high: float | None = knob(None, "the ratio is clipped at 1 + clip_high; default: clip", gt=0, advanced=True)
    dual_clip: float | None = knob(None, "bound on the loss of negative advantages; above 1", gt=1, advanced=True)
    value_clip: float | None = knob(
        0.2, "values move at most this far from the rollout's", source="released code", gt=0, advanced=True
    )
    value_coef: float = knob(0.5, "weight of the value loss", source="PPO", ge=0, advanced=True)
    entropy_coef: float = knob(0.0, "weight of the entropy bonus", source="released code", ge=0)
    aggregate: Literal["token", "sequence"] = knob(
        "token", "mean over tokens, or over answers of their token means", advanced=True
    )
    target_kl: float | None = knob(
        None, "end a round's passes once KL(old || new) exceeds this", unit="nats", gt=0, advanced=True
    )
    max_ratio: float = knob(
        1e4, "stop, with the state saved, when a probability ratio exceeds this", gt=1, advanced=True
    )
    value_model: Literal["separate", "shared"] = knob(
        "separate", "its own backbone, or a head on the policy's", source="released code"
    )
    value_init: Literal["reward_model", "discriminator", "policy"] = knob(
        "policy", "weights that a separate value model starts from (released code: reward_model)"
    )
    value_warmup_updates: int = knob(0, "first updates that train the value model only", ge=0, advanced=True)
    chunk_tokens: int | None = knob(
        None,
        "compute logits for this many tokens at a time: less memory, more time",
        ge=1,
        advanced=True,
        decides=False,
    )
    save_every: int = knob(50, "updates between checkpoints; 0: none, but when a run is stopped", ge=0, decides=False)
    save_in_background: bool = knob(
        False, "go on while a checkpoint is written, from copies in host memory", advanced=True, decides=False
    )
    keep_checkpoints: int = knob(2, "older checkpoints are deleted", ge=1, advanced=True, decides=False)
    evaluate_every: int = knob(0, "updates between evaluations; 0: at the start and end only", ge=0)
    keep_best: bool = knob(
        False,
        "keep, in best/, the policy whose own reward on held-out prompts was highest, of those with a KL of at most "
        "best_max_kl",
    )
    best_max_kl: float | None = knob(
        1.0, "no policy further from the reference is the best one; null: any", unit="nats per token", gt=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best and not self.evaluate_every:
            raise ConfigError(
                "PPOConfig.keep_best chooses among the evaluations of a run, and evaluate_every is 0, so that the only "
                "one is at the end; set evaluate_every, such as a tenth of updates, or keep_best: false"
            )

    def size_problem(self, processes: int) -> str | None:
        """Why the batches cannot be cut and shared evenly among so many processes; None where they can."""
        if self.batch_size % self.minibatch_size == 0 and self.minibatch_size % processes == 0:
            return None
        return (
            f"ppo.batch_size is {self.batch_size} and ppo.minibatch_size {self.minibatch_size}, on {processes} "
            "process(es); make the batch a multiple of the minibatch, and the minibatch a multiple of the processes"
        )


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """How a policy is evaluated."""

    prompts: int = knob(256, "held-out prompts", ge=1)
    scorer: str | None = knob(
        None,
        "'package.module:function' or 'file.py:function', from texts to scores that training never sees; the embedded "
        "task has its own",
    )
    samples: int = knob(12, "answers kept with per-token detail for the report", ge=0)
    per: Literal["token", "answer"] | None = knob(
        None,
        "whether arms are compared by gold and KL per token or per answer; default: answer with a scorer, which scores "
        "whole answers, and token on the embedded task, whose gold is a sum over words",
        advanced=True,
        decides=False,
    )


def _check_kl_coefs(coefs: tuple[float, ...], owner: str) -> None:
    for coef in coefs:
        if coef < 0:
            raise ConfigError(f"{owner}.kl_coefs has {coef!r}; each must be at least 0")
        if coefs.count(coef) > 1:
            raise ConfigError(f"{owner}.kl_coefs has {coef!r} twice; each names the folder of a run of its own")


@dataclass(frozen=True)
class ShardingConfig(Checked):
    """How the weights, gradients and optimiser states of all models are shared out among processes."""

    kind: Literal["none", "full", "hybrid"] = knob(
        "none",
        "none: every process holds whole models; full: one shard for each process; hybrid: shards within a group of "
        "processes, which is repeated",
    )
    replicas: int | None = knob(
        None, "groups of processes that hold a whole model each, for hybrid; default: the number of nodes", ge=2
    )
    reduce_dtype: Dtype = knob("float32", "dtype in which the gradients of the processes are summed", advanced=True)
    offload: bool = knob(False, "keep shards and optimiser states in host memory: slower, for GPUs that are too small")

    def problem(self, processes: int, of_a_node: int) -> str | None:
        """Why so many processes, of which so many run on one machine, cannot share models so; None where they can."""
        if self.kind == "none":
            return None
        if processes == 1:
            return (
                f"sharding.kind is {self.kind!r}, which cuts models into one shard for each process, and there is one "
                "process; start several ('torchrun --nproc_per_node N -m tlcr ...'), or set sharding.kind: none"
            )
        if self.kind == "hybrid":
            replicas = self.replicas or processes // of_a_node
            if replicas < 2 or processes % replicas or processes == replicas:
                return (
                    f"sharding.kind: hybrid wants {processes} processes in equal groups of two or more, and "
                    f"sharding.replicas is {self.replicas or f'the number of nodes, {replicas}'}; set "
                    "sharding.replicas to the number of groups, or sharding.kind: full"
                )
        return None


@dataclass(frozen=True)
class Arm(Checked):
    """One policy of a comparison: a name, and the settings that differ from those of the run."""

    name: str
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl_coefs: tuple[float, ...] = knob((), "KL coefficients of this arm; default: those of the run")
    gamma: float | None = knob(
        None, "discount of this arm: 0 pays an action its own reward alone; default: ppo.gamma", ge=0, le=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"Arm.name is {self.name!r}; it names a folder: use letters, digits, '.', '_' and '-'")
        _check_kl_coefs(self.kl_coefs, "Arm")


@dataclass(frozen=True)
class RunConfig(Checked):
    """What is trained, for which seeds, KL coefficients and rewards, and where it is written."""

    output_dir: str = knob("runs/default", "everything a run writes goes here")
    seed: int = knob(0, "seed of every stage before PPO", ge=0)
    seeds: tuple[int, ...] = knob((0,), "one PPO run for each seed, arm and KL coefficient")
    models_per_seed: bool = knob(
        False,
        "train SFT and reward models for each of seeds, shared by its arms; else all seeds use those of 'seed'",
        advanced=True,
    )
    kl_coefs: tuple[float, ...] = knob((), "KL coefficients to compare every arm at; default: kl.coef alone")
    tracker: Literal["tensorboard", "wandb", "none"] = knob("none", "also log to this tracker, through accelerate")
    parallel: int = knob(1, "PPO runs at a time, each in its own process", ge=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reviser: ReviserConfig = field(default_factory=ReviserConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(batch_size=16, weight_decay=0.0))
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    q_model: QModelConfig = field(default_factory=lambda: QModelConfig(epochs=1))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(epochs=1, learning_rate=1e-6, weight_decay=0.0))
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    arms: tuple[Arm, ...] = knob((), "policies to train and compare; none: one policy, trained on 'reward'")

    def __post_init__(self) -> None:
        super().__post_init__()
        named: dict[str, list[object]] = {"arms": [arm.name for arm in self.arms], "seeds": list(self.seeds)}
        for path, values in named.items():
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(
                        f"RunConfig.{path} has {value!r} twice; each names the folder of a run of its own"
                    )
        if not self.seeds:
            raise ConfigError("RunConfig.seeds is empty; name at least one seed, such as [0]")
        if self.reviser.backend != "none" and self.data.edits is not None:
            raise ConfigError(
                f"RunConfig.data.edits is {self.data.edits!r} and reviser.backend is {self.reviser.backend!r}: edits "
                "are read, or a reviser makes them; drop one of the two settings"
            )
        if self.lora.trains("sft") and self.model.path == "embedded" and self.sft.enabled:
            raise ConfigError(
                "RunConfig.lora.roles has 'sft', but model.path is 'embedded': SFT starts from random weights there, "
                "which adapters cannot make a language model of; drop 'sft' from lora.roles"
            )
        if self.lora.base_bits is not None and self.sharding.kind != "none":
            raise ConfigError(
                f"RunConfig.lora.base_bits is {self.lora.base_bits} and sharding.kind {self.sharding.kind!r}: weights "
                "in 4 bits are packed, and cannot be cut by rows; set sharding.kind: none, or lora.base_bits: null"
            )
        elsewhere = self.ppo.value_model == "separate" and self.ppo.value_init != "policy"
        if elsewhere and self.lora.trains("value"):
            raise ConfigError(
                f"RunConfig.ppo.value_init is {self.ppo.value_init!r}, but lora.roles has 'value': its adapter stands "
                "on the policy's weights; set ppo.value_init: policy, or drop 'value' from lora.roles"
            )
        _check_kl_coefs(self.kl_coefs, "RunConfig")
        several = self.kl_coefs or [coef for arm in self.arms for coef in arm.kl_coefs]
        if several and self.kl.target is not None:
            raise ConfigError(
                f"RunConfig.kl_coefs compares fixed coefficients, but kl.target {self.kl.target} adapts each of them "
                "to one KL; drop one of the two"
            )
        if self.rollout.may_use_servers and self.parallel > len(self.rollout.server):
            raise ConfigError(
                f"RunConfig.parallel is {self.parallel} and rollout.server names {len(self.rollout.server)}: PPO runs "
                "at a time give their servers different weights, so each needs one of its own; set parallel: "
                f"{len(self.rollout.server)}, or name more servers"
            )
        if any(reward.refresh.every for reward in (self.reward, *(arm.reward for arm in self.arms))):
            self._check_refresh()
        self._check_overlong()
        official = [reward for reward in (self.reward, *(arm.reward for arm in self.arms)) if reward.compat is not None]
        if official and self.kl.placement != "reward":
            raise ConfigError(
                f"RunConfig.kl.placement is {self.kl.placement!r}, but reward.compat {official[0].compat!r} pays the "
                "KL in the reward, as the released code does; set kl.placement: reward"
            )

    def _check_refresh(self) -> None:
        own_task = self.model.path == "embedded" and self.data.preferences is None and self.data.prompts is None
        if not own_task and self.reviser.backend not in ("endpoint", "local"):
            raise ConfigError(
                f"RunConfig.reward.refresh has the policy's answers revised during PPO, but reviser.backend is "
                f"{self.reviser.backend!r}; set it to endpoint or local, or reward.refresh.every: 0"
            )
        if not own_task and self.data.preferences is None:
            raise ConfigError(
                "RunConfig.reward.refresh compares the policy's answers with chosen ones, but data.preferences is not "
                "set; name preferences, or set reward.refresh.every: 0"
            )
        if not own_task and self.data.prompts is not None:
            raise ConfigError(
                f"RunConfig.reward.refresh compares the policy's answers with chosen ones, which the prompts in "
                f"data.prompts {self.data.prompts!r} have not; drop data.prompts, or set reward.refresh.every: 0"
            )
        for name, value, refused in (
            ("sharding.kind", self.sharding.kind, self.sharding.kind != "none"),
            ("lora.roles", self.lora.roles, self.lora.trains("discriminator")),
            ("rollout.environment", self.rollout.environment, self.rollout.environment is not None),
        ):
            if refused:
                raise ConfigError(
                    f"RunConfig.reward.refresh trains a whole discriminator, on single answers, which {name} "
                    f"{value!r} does not leave; change that setting, or set reward.refresh.every: 0"
                )

    def _check_overlong(self) -> None:
        for reward in (self.reward, *(arm.reward for arm in self.arms)):
            if reward.overlong_buffer is None:
                continue
            if reward.overlong_buffer > self.rollout.max_new_tokens:
                raise ConfigError(
                    f"RunConfig.reward.overlong_buffer is {reward.overlong_buffer}, more than rollout.max_new_tokens, "
                    f"{self.rollout.max_new_tokens}: every answer would pay; set it to a share of them, such as a fifth"
                )
            if self.rollout.environment is not None:
                raise ConfigError(
                    "RunConfig.reward.overlong_buffer is the end of one answer's length, but rollout.environment makes "
                    "conversations of several; drop one of the two"
                )

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3", "full"]:
        """The estimator of the KL penalty: kl.estimator, or the exact KL where reward.compat is set."""
        return "full" if self.reward.compat is not None else self.kl.estimator

    def uses_reward_model(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the sequence reward model."""
        scored = reward.kind == "sequence" or reward.kind in SHARED_SCORE_KINDS or reward.sequence_coef > 0
        return scored or self._value_starts_from("reward_model")

    def uses_discriminator(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the discriminator."""
        return reward.kind in LOGIT_KINDS or self._value_starts_from("discriminator")

    def uses_q_model(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the token-level Q function."""
        return reward.kind == "q"

    def uses_dpo(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the policy trained by DPO."""
        return reward.kind == "dpo"

    def _value_starts_from(self, model: str) -> bool:
        return self.ppo.value_model == "separate" and self.ppo.value_init == model

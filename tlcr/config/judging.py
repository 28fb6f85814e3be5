"""The knobs of ``tlcr answer`` and ``tlcr judge``; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tlcr.config.schema import EndpointConfig, EngineConfig, GeneratorConfig, knob
from tlcr.errors import ConfigError

__all__ = ["AnswerConfig", "JudgeConfig"]


@dataclass(frozen=True)
class AnswerConfig(EngineConfig):
    """How a model answers the prompts of a benchmark (docs/judging.md)."""

    prompts: str | None = knob(
        None, "the benchmark's prompts: AlpacaEval's JSON list or FastChat's question.jsonl", path=True
    )
    format: Literal["auto", "alpaca_eval", "mt_bench", "vicuna"] = knob(
        "auto", "which benchmark; 'auto': by how the file is written and how many turns its questions have"
    )
    model_id: str | None = knob(None, "the model's name in the files that are written; default: the end of its path")
    output_dir: str = knob("answers", "the files go here, in the folders where the tools look for them", path=True)
    backend: Literal["local", "endpoint"] = knob("local", "a model that is run here, or one behind an endpoint")
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    temperature: float | None = knob(
        None, "sampling temperature, 0 is greedy; null: the benchmark's own", source="FastChat, alpaca_eval", ge=0
    )
    top_p: float = knob(1.0, "nucleus sampling", source="FastChat, alpaca_eval", gt=0, le=1)
    max_new_tokens: int | None = knob(
        None, "length limit of an answer; null: 1024 (FastChat) or 2048 (alpaca_eval)", unit="tokens", ge=1
    )
    seed: int = knob(0, "another seed samples other answers", ge=0)
    limit: int | None = knob(None, "answer only the first so many prompts", ge=1)

    def of(self, model: str) -> AnswerConfig:
        """The same for a model: a folder or hub name, or its name at the endpoint."""
        named, default = (
            (self.endpoint.model, None) if self.backend == "endpoint" else (self.model.path, GeneratorConfig().path)
        )
        if named not in (default, model):
            raise ConfigError(f"two models are named, {model} and {named}; name the one that is to answer")
        if self.backend == "endpoint":
            return replace(self, endpoint=replace(self.endpoint, model=model))
        return replace(self, model=replace(self.model, path=model))


@dataclass(frozen=True)
class JudgeConfig(EngineConfig):
    """The judge of answers, and its settings (docs/judging.md)."""

    prompts: str | None = knob(
        None, "the benchmark's question.jsonl, which FastChat's answer files do not repeat", path=True
    )
    output_dir: str = knob("judged", "results go to a folder in here that is named after the models", path=True)
    backend: Literal["endpoint", "local"] = knob("endpoint", "a model behind an endpoint, or one that is run here")
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    batch_size: int = knob(8, "verdicts that a local model generates at a time", ge=1)
    answer_format: Literal["auto", "json", "line", "word"] = knob(
        "auto",
        "what the judge is asked for: reasons and verdict as JSON, reasons and a last line, or one word, to which a "
        "local model is held; "
        "'auto': JSON at an endpoint, a last line from a local model",
    )
    temperature: float | None = knob(0.0, "sampling temperature; null: the server's default", ge=0)
    max_new_tokens: int = knob(1024, "length limit of reasoning and verdict together", unit="tokens", ge=1)
    limit: int | None = knob(None, "judge only the first so many questions", ge=1)
    labels: tuple[str, ...] = knob(
        (),
        "verdicts of people or of other judges on the same answers (JSON lines), to measure agreement with",
        path=True,
    )
    resamples: int = knob(1000, "bootstrap resamples, of questions", ge=100, advanced=True)
    on_unanswered: Literal["skip", "raise"] = knob(
        "raise",
        "when a request failed in all retries: go on without its verdict, or stop, so that a later run asks again",
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "local" and self.temperature is None:
            raise ConfigError("JudgeConfig.temperature is null, but a local model has no server default; set it")

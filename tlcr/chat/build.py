"""Builds the model that a config names, at an endpoint or on this machine."""

from __future__ import annotations

from tlcr.chat.store import AnswerStore
from tlcr.chat.types import ChatModel
from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.schema import GeneratorConfig, ReviserConfig
from tlcr.errors import ConfigError

__all__ = ["ChatConfig", "chat_model", "model_name"]


ChatConfig = AnswerConfig | JudgeConfig | ReviserConfig
"""The configs that name a chat model."""


def chat_model(cfg: ChatConfig, store: AnswerStore) -> ChatModel:
    """The model of ``cfg.backend``. Nothing is loaded or called yet. Raises ConfigError where it is not named."""
    model_name(cfg)
    if cfg.backend == "endpoint":
        from tlcr.chat.endpoint import Endpoint  # an extra: the client is needed only here

        return Endpoint(cfg.endpoint, store)
    from tlcr.chat.local import LocalModel

    return LocalModel(cfg.model, store, cfg)


def model_name(cfg: ChatConfig) -> str:
    """The model's name at the endpoint, or its folder. Raises ConfigError where the config has none."""
    if cfg.backend == "endpoint":
        if cfg.endpoint.model is None:
            raise ConfigError("the backend is 'endpoint'; name the model there: endpoint.model")
        return cfg.endpoint.model
    if cfg.model.path == GeneratorConfig().path:
        raise ConfigError("the backend is 'local'; name a model that follows instructions: model.path")
    return cfg.model.path

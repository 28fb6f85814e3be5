"""The values that a chat template reads beside the messages."""

from __future__ import annotations

import re
from functools import lru_cache

import jinja2
from jinja2 import meta
from transformers import PreTrainedTokenizerBase

from tlcr.errors import ConfigError

__all__ = ["template_variables"]

GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
"""Names that every template gets."""
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers' own, around what a model is trained on; jinja does not know it."""


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The names that a chat template looks up beside the messages, tools and documents: its switches, a date.

    Args:
        tokenizer: the tokenizer; without a chat template there is none.

    Returns:
        The names.

    Raises:
        ConfigError: the chat template is not valid.
    """
    template = tokenizer.chat_template
    if template is None:
        return frozenset()
    templates = tuple(template.values()) if isinstance(template, dict) else (template,)
    return frozenset().union(*map(_names, templates)) - set(tokenizer.special_tokens_map)


@lru_cache
def _names(template: str) -> frozenset[str]:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(GENERATION.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is not valid (line {error.lineno}: {error.message}); mend it, or set "
            "model.chat_template"
        ) from error
    return frozenset(meta.find_undeclared_variables(parsed) - {*environment.globals, *GIVEN})

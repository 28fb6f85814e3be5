"""The names that a chat template looks up are its own ones: not those that every template is given, nor its locals."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.errors import ConfigError
from tlcr.text.template_variables import template_variables

TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(first=true) %}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{%- endgeneration -%}{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}{% if add_generation_prompt %}>{% endif %}"
)


def test_names(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    assert template_variables(tiny_tokenizer) == set(), "there is no chat template"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    assert template_variables(tiny_tokenizer) == {"date_string", "enable_thinking"}
    monkeypatch.setattr(tiny_tokenizer, "chat_template", {"default": TEMPLATE, "tool_use": "{{ xml_tools }}"})
    assert template_variables(tiny_tokenizer) == {"date_string", "enable_thinking", "xml_tools"}


def test_a_template_that_is_no_template(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% if %}")
    with pytest.raises(ConfigError, match=r"chat template is not valid \(line 1: .*model.chat_template"):
        template_variables(tiny_tokenizer)

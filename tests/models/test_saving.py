"""A model's folder after it was written once, and once more."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.errors import CheckpointError
from tlcr.models.saving import save_model

ONE, SEVERAL = "{{ messages }}", {"default": "a {{ messages }}", "tools": "b {{ messages }}"}


def test_what_is_not_of_a_model_stays_and_what_was_of_the_last_one_goes(
    tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in ("notes.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    save_model(tiny_causal_lm(), tiny_tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if ".safetensors" in name} == {"model.safetensors", "notes.safetensors"}


@pytest.mark.parametrize("first", [ONE, SEVERAL])
@pytest.mark.parametrize("then", [ONE, SEVERAL, None])
def test_a_folder_has_the_chat_templates_that_it_was_last_written_with(
    tmp_path: Path,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    first: str | dict[str, str],
    then: str | dict[str, str] | None,
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    for template in (first, then, then):
        tokenizer.chat_template = template
        save_model(tiny_causal_lm(), tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == then
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_is_not_saved_over_an_adapter(
    tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="holds an adapter, which would be loaded with the model"):
        save_model(tiny_causal_lm(), tiny_tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]

"""Every command reads the text of people's files alike: the same encodings, the same refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.text.test_files import ENCODINGS, REFUSED
from tlcr.cli.score import read_answers as read_answers_to_score
from tlcr.config.schema import DataConfig, ModelConfig
from tlcr.data.readers import read_edits, read_marked_answers, read_preferences, read_prompts
from tlcr.data.records import TextPreference
from tlcr.errors import DataError
from tlcr.judging.formats import read_answers, read_benchmark, read_lines
from tlcr.models.tokenizers import load_tokenizer
from tlcr.reviser.files import match_files

PROMPT, BAD, GOOD = "Wie heißt du? ", "Müller 🙃", "Jürgen 🙃"
Reader = Callable[[str, PreTrainedTokenizerFast], Any]


def marked_answers(path: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    return read_marked_answers(path, DataConfig(), tokenizer).records


def revisions(path: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    return match_files([TextPreference("1", PROMPT, GOOD, BAD)], path, DataConfig(), max_changed=1.0)


READERS: dict[str, tuple[Any, Reader]] = {
    "score FILE": ({"prompt": PROMPT, "response": BAD}, lambda path, _: list(read_answers_to_score(path))),
    "evaluate-tokens --spans": (
        {"id": "1", "prompt": PROMPT, "response": BAD, "spans": [{"start": 0, "end": 6, "label": "name"}]},
        marked_answers,
    ),
    "answer --prompts, FastChat": (
        {"question_id": 1, "category": "a", "turns": [PROMPT]},
        lambda path, _: read_benchmark(path),
    ),
    "answer --prompts, AlpacaEval": ([{"instruction": PROMPT, "dataset": "a"}], lambda path, _: read_benchmark(path)),
    "judge FILE, FastChat": (
        {"question_id": 1, "model_id": "a", "choices": [{"index": 0, "turns": [BAD]}]},
        lambda path, _: read_answers(path),
    ),
    "judge FILE, AlpacaEval": (
        [{"instruction": PROMPT, "output": BAD, "generator": "a"}],
        lambda path, _: read_answers(path),
    ),
    "judge --labels": (
        {"question_id": PROMPT, "model_a": "a", "model_b": "b", "winner": "tie"},
        lambda path, _: [record for record, _ in read_lines(path)],
    ),
    "reviser.files": ({"prompt": PROMPT, "rejected": BAD, "revised": GOOD}, revisions),
    "data.preferences": (
        {"id": "1", "prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        lambda path, tokenizer: read_preferences(DataConfig(preferences=path), tokenizer).records,
    ),
    "data.edits": (
        {"id": "1", "prompt": PROMPT, "rejected": BAD, "revised": GOOD},
        lambda path, tokenizer: read_edits(DataConfig(edits=path), tokenizer).records,
    ),
    "data.prompts": (
        {"prompt": PROMPT + BAD},
        lambda path, tokenizer: read_prompts(DataConfig(prompts=path), tokenizer).records,
    ),
}


def written(folder: Path, content: bytes, *, packed: bool) -> str:
    path = folder / ("file.json.gz" if packed else "file.json")
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", READERS)
def test_each_command_reads_each_encoding(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, command: str, encoding: str
) -> None:
    record, read = READERS[command]
    text = json.dumps(record, ensure_ascii=False) + "\r\n"
    plain = read(written(tmp_path, text.encode(), packed=False), tiny_tokenizer)
    found = read(written(tmp_path, ENCODINGS[encoding](text), packed="gzip" in encoding), tiny_tokenizer)
    assert BAD in repr(plain) or PROMPT in repr(plain) or GOOD in repr(plain)
    assert found == plain


@pytest.mark.parametrize("encoding", REFUSED)
@pytest.mark.parametrize("command", READERS)
def test_each_command_refuses_each_other_encoding_in_one_line(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, command: str, encoding: str
) -> None:
    record, read = READERS[command]
    write, message = REFUSED[encoding]
    source = written(tmp_path, write(json.dumps(record, ensure_ascii=False)), packed="gzip" in encoding)
    with pytest.raises(DataError, match=message):
        read(source, tiny_tokenizer)


@pytest.mark.parametrize("command", READERS)
def test_each_command_refuses_half_of_a_character(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, command: str
) -> None:
    record, read = READERS[command]
    cut = json.dumps(record).replace(r"\ude43", "").replace(r"\u00df", r"\ud83d")  # "🙃" is two escapes in JSON
    with pytest.raises(DataError, match=r"is not valid Unicode \(half of a surrogate pair at character \d+\)"):
        read(written(tmp_path, cut.encode(), packed=False), tiny_tokenizer)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_chat_templates_file_is_read_alike(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, encoding: str
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    template = "{% for m in messages %}Größe: {{ m.content }}{% endfor %}"
    source = written(tmp_path, ENCODINGS[encoding](template), packed="gzip" in encoding)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template=source))
    assert tokenizer.chat_template == template
    Path(source).write_bytes(template.encode("cp1252"))
    with pytest.raises(DataError, match="is not a whole gzip file" if "gzip" in encoding else "is not UTF-8"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template=source))


def test_half_of_a_character_in_other_fields_of_messages_is_found(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}<{{ m.reasoning_content or '' }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "hi", "reasoning_content": "x\ud83d"}]
    record = {"prompt": turns, "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="message 1 of 'prompt' is not valid Unicode"):
        read_preferences(
            DataConfig(preferences=written(tmp_path, json.dumps(record).encode(), packed=False)), tiny_tokenizer
        )

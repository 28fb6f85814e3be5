"""Ends and beginnings of sequence in people's texts, and unusual chat templates: what readers make of them and say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig
from tlcr.data.readers import read_edits, read_marked_answers, read_preferences, read_prompts
from tlcr.errors import DataError
from tlcr.text.tokenization import encode_answer

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "<assistant>{% endif %}", "<assistant><think>{% endif %}"
)


def written(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture
def chat(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    return tiny_tokenizer


@pytest.mark.parametrize("end", ["<eos>", "<eos>\n", "<eos><eos> "])
def test_an_end_in_plain_answers_is_taken_off_counted_and_said(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, end: str
) -> None:
    records = [{"prompt": "Q:", "chosen": f" good{k}{end}", "rejected": f" bad{k}"} for k in range(2)]
    records.append({"prompt": "Q:", "chosen": " x", "rejected": " y"})
    found = read_preferences(DataConfig(preferences=written(tmp_path, *records)), tiny_tokenizer)
    assert [pair.chosen for pair in found.records] == [" good0", " good1", " x"]
    (note,) = found.notes
    assert note.startswith("2 of 3 records have a text that ends with an end token") and repr(" good0" + end) in note
    for pair in found.records:
        ids = encode_answer(tiny_tokenizer, pair.prompt, pair.chosen, max_prompt_tokens=9, max_answer_tokens=99).ids
        assert ids[-1] == tiny_tokenizer.eos_token_id and ids.count(tiny_tokenizer.eos_token_id) == 1


def test_ends_and_beginnings_in_messages_are_written_once(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    context = [*turn("user", "<bos>Hi<eos>"), *turn("assistant", "Yes?<eos>\n"), *turn("user", "Go on.<eos>")]
    source = written(
        tmp_path, {"prompt": context, "chosen": "Good.<eos>\n", "rejected": turn("assistant", "Bad.<eos>")}
    )
    found = read_preferences(DataConfig(preferences=source), chat)
    (pair,) = found.records
    assert pair.prompt == "<bos><user>Hi<eos>\n<assistant>Yes?<eos>\n<user>Go on.<eos>\n<assistant>"
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")
    assert "1 of 1 records have a text that ends with an end token" in found.notes[0]
    assert "1 of 1 records have a text that begins with a beginning-of-sequence token" in found.notes[1]
    assert read_prompts(DataConfig(prompts=source), chat).records == (pair.prompt,)


def test_edits_that_differ_in_an_end_alone_change_nothing(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = written(tmp_path, {"prompt": "Q:", "rejected": " good", "revised": " good<eos>"})
    found = read_edits(DataConfig(edits=source), tiny_tokenizer)
    assert (found.records[0].rejected, found.records[0].revised) == (" good", " good")
    assert any("1 of 1 revisions change nothing" in note for note in found.notes)
    with pytest.raises(DataError, match="an answer is '<eos>', which is special tokens alone"):
        read_edits(
            DataConfig(edits=written(tmp_path, {"prompt": "Q:", "rejected": " a", "revised": " <eos>"})), tiny_tokenizer
        )


@pytest.mark.parametrize(
    ("response", "as_read"),
    [("so bad.<eos>", "so bad."), ("so bad.<eos>\n", "so bad."), ("  so bad. ", "so bad."), ("so bad.\n", "so bad.")],
)
def test_marked_errors_stay_on_their_words(
    tmp_path: Path, chat: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, response: str, as_read: str
) -> None:
    monkeypatch.setattr(chat, "chat_template", CHAT.replace("{{ m.content }}", "{{ m.content | trim }}"))
    at = response.index("bad")
    spans = [{"start": at, "end": at + 3, "label": "word"}, {"start": at, "end": len(response), "label": "rest"}]
    source = written(tmp_path, {"prompt": turn("user", "Hi"), "response": response, "spans": spans})
    (answer,) = read_marked_answers(source, DataConfig(), chat).records
    assert answer.response == as_read
    assert [as_read[span.start : span.end] for span in answer.spans] == ["bad", "bad."]


def test_a_template_that_opens_thoughts_and_answers_that_it_shortens_are_said(
    tmp_path: Path, chat: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "chat_template", THINKS)
    record = {"prompt": turn("user", "Hi"), "chosen": "<think>Hm.</think>Good.", "rejected": "Bad."}
    found = read_preferences(DataConfig(preferences=written(tmp_path, record, record)), chat)
    assert (found.records[0].prompt, found.records[0].chosen, found.records[0].rejected) == (
        "<bos><user>Hi<eos>\n<assistant>",
        "<think>Hm.</think>Good.",
        "Bad.",
    )
    opened, shortened = found.notes
    assert opened.startswith("2 of 2 conversations are for a chat template that ends the prompt with '<think>'")
    assert shortened.startswith("2 of 4 answers hold text that the chat template leaves out")
    prompts = read_prompts(DataConfig(prompts=written(tmp_path, record)), chat)
    assert prompts.records == (found.records[0].prompt,) and "ends the prompt with '<think>'" in prompts.notes[0]


def test_usual_conversations_have_no_notes(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    record = {"prompt": turn("user", "Hi"), "chosen": "Good.", "rejected": "Bad."}
    assert read_preferences(DataConfig(preferences=written(tmp_path, record)), chat).notes == ()

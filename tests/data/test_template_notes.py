"""What a chat template leaves out, is given, or writes by the day, is found by rendering and said with an example."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig
from tlcr.data.readers import ReadResult, read_edits, read_preferences, read_prompts
from tlcr.data.records import RawPrompt
from tlcr.data.template_notes import LOOKED_AT, template_notes
from tlcr.types import PreferencePair

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = "{% if messages[0].role == 'system' and tools %}{{ tools | tojson }}{% endif %}" + PLAIN
THINKING = "{% if enable_thinking %}[thinks]{% endif %}" + PLAIN
DATED = "Today: {{ date_string or strftime_now('%d %b %Y') }}\n" + PLAIN
DEAF = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Read = Callable[..., ReadResult[PreferencePair]]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def record(number: int, *before: dict[str, Any], answer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [*before, said("user", f"Question {number}?")],
        "chosen": [said("assistant", "Yes.") if answer is None else answer],
        "rejected": [said("assistant", "No.")],
        **more,
    }


@pytest.fixture
def read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Read:
    def read(template: str, *records: dict[str, Any], reader: Any = read_preferences, **at: Any) -> ReadResult[Any]:
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
        source = str(path)
        return reader(DataConfig(preferences=source, edits=source, prompts=source), tiny_tokenizer, **at)

    return read


class TestLeftOut:
    def test_fields_of_messages_wherever_they_stand(self, read: Read) -> None:
        earlier = said("assistant", "Hm.", reasoning_content="I wonder"), said("tool", "12 degrees", name="weather")
        answer = said("assistant", "Yes.", reasoning_content="Because")
        (note,) = read(PLAIN, *(record(k, said("user", "Hi"), *earlier, answer=answer) for k in range(3))).notes
        assert note == (
            "the chat template does not render reasoning_content of assistant messages in 3 of 3 records (the first is "
            "'I wonder'), name of tool messages in 3 of 3 records (the first is 'weather'), reasoning_content of "
            "answers in 3 of 3 records (the first is 'Because'): no model reads that; set model.chat_template to one "
            "that does, or leave it out of the data"
        )

    def test_a_whole_message(self, read: Read) -> None:
        (note,) = read(DEAF, record(0, said("system", "In French.")), record(1)).notes
        assert "does not render content of system messages in 1 of 1 records (the first is 'In French.')" in note

    @pytest.mark.parametrize("template", [PLAIN, TOOLS])
    def test_tools_also_where_the_template_names_them(self, read: Read, template: str) -> None:
        rows = (
            record(0, tools=[{"name": "look_up"}]),
            record(1, said("system", "Be brief."), tools=[{"name": "look_up"}]),
        )
        (note,) = read(template, *rows).notes
        assert f"does not render tools in {2 if template == PLAIN else 1} of 2 records" in note

    def test_switches(self, read: Read) -> None:
        off, on = ({"chat_template_kwargs": {"enable_thinking": value}} for value in (False, True))
        assert read(THINKING, record(0, **off), record(1, **on)).notes == (), "the default's value is not lost"
        (note,) = read(PLAIN, record(0, **off)).notes
        assert "does not render enable_thinking in 1 of 1 records (the first is False)" in note

    def test_all_records_are_counted_and_the_first_are_looked_at(self, read: Read) -> None:
        rows = [record(k, said("system", "s")) for k in range(LOOKED_AT + 5)]
        (note,) = read(DEAF, *rows, reader=read_prompts).notes
        assert f"in {LOOKED_AT} of {LOOKED_AT} records looked at, of {LOOKED_AT + 5} (" in note

    def test_nothing_is_said_where_all_is_rendered(self, read: Read) -> None:
        assert read(PLAIN, record(0, said("system", "s")), record(1)).notes == ()


class TestColumns:
    def test_those_that_the_template_names_are_given_to_it(self, read: Read) -> None:
        found = read(DATED, record(0, date_string="May Day", margin=3), record(1, date_string="1 May", margin=2))
        assert [pair.prompt[:16] for pair in found.records] == ["Today: May Day\n<", "Today: 1 May\n<us"]
        (note,) = found.notes
        assert note == (
            "columns that the chat template is given, because it names them: date_string (the first date_string is "
            "'May Day')"
        )

    def test_a_table_s_false_is_false(self, read: Read) -> None:
        edit = {"prompt": [said("user", "Hi")], "rejected": "No.", "revised": "Yes."}
        rows = [{**edit, "enable_thinking": value} for value in ("False", "true")]
        found = read(THINKING, *rows, reader=read_edits)
        assert [pair.prompt for pair in found.records] == ["<user>Hi<assistant>", "[thinks]<user>Hi<assistant>"]

    def test_beside_prompts_that_are_texts_they_are_not_read(self, read: Read) -> None:
        text = {"prompt": "Q?", "chosen": " Yes.", "rejected": " No.", "tools": [{"name": "look_up"}]}
        (note,) = read(PLAIN, text, record(0)).notes
        assert note == (
            "1 of 1 prompts are texts, which no chat template renders, so that their tools are not read (the first "
            "holds [{'name': 'look_up'}]): give such prompts as messages"
        )


class TestDate:
    def test_a_template_that_writes_it_is_named_with_the_line_and_the_remedy(self, read: Read) -> None:
        rows = record(0), record(1), {**record(2), "date_string": "May Day"}
        found = read(DATED, *rows, rendered_at=datetime(2026, 7, 4))
        assert [pair.prompt.partition("\n")[0] for pair in found.records] == ["Today: 04 Jul 2026"] * 2 + [
            "Today: May Day"
        ]
        (note,) = (note for note in found.notes if "the date" in note)
        assert note.startswith("the chat template writes the date into 2 of 3 prompts ('Today: 04 Jul 2026')")
        assert "in a column 'date_string' of the data" in note and "model.chat_template" in note

    @pytest.mark.parametrize("reader", [read_preferences, read_prompts])
    def test_every_reader_takes_the_moment(self, read: Read, reader: Any) -> None:
        first, second = (
            read(DATED, record(0), reader=reader, rendered_at=datetime(2026, 7, day)).records[0] for day in (1, 2)
        )
        assert first != second and "01 Jul 2026" in str(first) and "02 Jul 2026" in str(second)

    def test_only_the_first_records_are_rendered_on_another_day(self, read: Read) -> None:
        (note,) = (note for note in read(DATED, *map(record, range(LOOKED_AT + 5))).notes if "the date" in note)
        assert note.startswith(f"the chat template writes the date into {LOOKED_AT} of the first {LOOKED_AT} prompts (")

    def test_no_note_without_a_date(
        self, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raws = [RawPrompt([said("user", "Hi")])]
        for template in (PLAIN, "{{ raise_exception('no') }}{{ strftime_now('%Y') }}"):
            monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
            assert template_notes(raws, tiny_tokenizer, datetime(2026, 7, 4)) == ()
        assert template_notes([RawPrompt("Hi")], tiny_tokenizer, None) == ()


def test_columns_that_only_other_formats_read_are_named(read: Read) -> None:
    """The prompts' reader leaves the answers out, but not a system message; "turns" holds a conversation."""
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    (note,) = read(
        PLAIN, {**hh, "system": "In French.", "turns": [{"from": "human", "value": "Hi"}], "margin": 1}
    ).notes
    assert note == "columns that are not read: system, turns (the first holds 'In French.')"
    assert read(PLAIN, record(0, revised=[said("assistant", "Well.")]), reader=read_prompts).notes == ()

"""Damage by other programs to records is repaired, counted, and reported with an example."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig
from tlcr.data.readers import (
    ReadResult,
    read_edits,
    read_marked_answers,
    read_preferences,
    read_prompts,
    read_raw_preferences,
)
from tlcr.data.records import as_texts
from tlcr.data.repairs import columns_left_out, repaired
from tlcr.data.sources import Row, read_rows
from tlcr.errors import DataError
from tlcr.types import PreferencePair

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% if shout %}<shout>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}]
ASK = {"role": "user", "content": "Is it warm?"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    return tiny_tokenizer


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., ReadResult[PreferencePair]]:
    def read(*records: dict[str, Any]) -> ReadResult[PreferencePair]:
        return read_preferences(DataConfig(preferences=written(tmp_path, *records)), tokenizer)

    return read


def written(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def only(result: ReadResult[PreferencePair]) -> tuple[str, str, str]:
    (pair,) = result.records
    return pair.prompt, pair.chosen, pair.rejected


# ---- what messages hold, and the columns beside them


def test_tool_calls_of_earlier_turns_reach_the_prompt(read: Callable) -> None:
    turns = [ASK, said("Let me see.", tool_calls=CALL), {"role": "tool", "content": "18 C"}]
    found = read({"prompt": turns, "chosen": [said("Yes.")], "rejected": [said("No.")]})
    assert only(found) == (
        "<user>Is it warm?<end><assistant>Let me see.<call>look_up<end><tool>18 C<end><assistant>",
        "Yes.",
        "No.",
    )
    assert found.notes == ()


def test_tool_calls_and_reasoning_of_answers_are_what_the_template_writes(read: Callable) -> None:
    chosen = said("Let me see.", tool_calls=CALL)
    other = [{**CALL[0], "function": {"name": "guess", "arguments": {}}}]
    rejected = {"role": "assistant", "content": None, "tool_calls": other, "reasoning_content": "hm"}
    found = read({"prompt": [ASK], "chosen": [chosen], "rejected": [rejected]})
    assert only(found) == ("<user>Is it warm?<end><assistant>", "Let me see.<call>look_up", "[hm]<call>guess")


def test_answers_that_differ_in_nothing_that_the_template_writes_are_no_pair(read: Callable) -> None:
    answers = {name: [said("Yes.", colour=name)] for name in ("chosen", "rejected")}
    with pytest.raises(DataError, match="the same text in this tokenizer's chat template"):
        read({"prompt": [ASK], **answers})


def test_a_template_that_does_not_continue_its_own_prompt_is_said(
    read: Callable, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE + "<think>")
    with pytest.raises(
        DataError, match=r"does not continue its own prompt where an answer holds tool calls or reasoning"
    ):
        read({"prompt": [ASK], "chosen": [said("a", tool_calls=CALL)], "rejected": [said("b")]})


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_switches_of_a_record_are_given_to_the_template(read: Callable, as_json: bool) -> None:
    tools: Any = json.dumps(CALL) if as_json else CALL
    record = {"tools": tools, "chat_template_kwargs": {"shout": True}, "prompt": [ASK]}
    prompt, chosen, _ = only(read({**record, "chosen": [said("Yes.")], "rejected": "No."}))
    assert prompt == f"<tools>{json.dumps(CALL)}<shout><user>Is it warm?<end><assistant>" and chosen == "Yes."


def test_prompts_have_them_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = written(tmp_path, {"prompt": [ASK], "tools": CALL, "system": "Be brief."})
    (prompt,) = read_prompts(DataConfig(prompts=source), tokenizer).records
    assert prompt == f"<tools>{json.dumps(CALL)}<system>Be brief.<end><user>Is it warm?<end><assistant>"
    source = written(tmp_path, {"chosen": [ASK, said("Yes.")], "rejected": [ASK, said("No.")], "tools": CALL})
    (prompt,) = read_prompts(DataConfig(preferences=source), tokenizer).records
    assert prompt == f"<tools>{json.dumps(CALL)}<user>Is it warm?<end><assistant>"


def test_tools_that_are_no_json_are_said(read: Callable) -> None:
    with pytest.raises(DataError, match="field 'tools' is a text that is not JSON"):
        read({"prompt": [ASK], "tools": "look_up()", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match="'chat_template_kwargs' is a list, not a mapping"):
        read({"prompt": [ASK], "chat_template_kwargs": [1], "chosen": "a", "rejected": "b"})


def test_system_and_history_come_before_the_prompt(read: Callable) -> None:
    record = {"prompt": "And then?", "chosen": " It ended.", "rejected": " No."}
    earlier = "<system>You are a pirate.<end><user>A story!<end><assistant>Once.<end>"
    for history in ([["A story!", "Once."]], [{"role": "user", "content": "A story!"}, said("Once.")]):
        prompt, chosen, _ = only(read({**record, "system": "You are a pirate.", "history": history}))
        assert prompt == f"{earlier}<user>And then?<end><assistant>" and chosen == " It ended."


def test_a_conversation_keeps_the_system_message_of_its_own(read: Callable) -> None:
    own = [{"role": "system", "content": "Own."}, ASK]
    prompt, _, _ = only(read({"system": "Other.", "prompt": own, "chosen": "a", "rejected": "b"}))
    assert prompt == "<system>Own.<end><user>Is it warm?<end><assistant>"


def test_a_transcript_gets_them_as_a_transcript(read: Callable) -> None:
    record = {"prompt": "\n\nHuman: And?\n\nAssistant:", "chosen": " It ended.", "rejected": " No."}
    prompt, _, _ = only(read({**record, "system": "You are a pirate.", "history": [["A story!", "Once."]]}))
    assert prompt == ("You are a pirate.\n\nHuman: A story!\n\nAssistant: Once.\n\nHuman: And?\n\nAssistant:")


def test_a_transcript_s_history_may_hold_a_message_without_a_text(read: Callable) -> None:
    record = {"prompt": "\n\nHuman: And?\n\nAssistant:", "chosen": " It ended.", "rejected": " No."}
    prompt, _, _ = only(read({**record, "history": [ASK, {"role": "assistant", "tool_calls": CALL}]}))
    assert prompt == (
        f"\n\nHuman: Is it warm?\n\nAssistant: {json.dumps({'tool_calls': CALL})}\n\nHuman: And?\n\nAssistant:"
    )


@pytest.mark.parametrize("history", ["once", [["a"]], [["a", ""]], [["a", 1]]])
def test_a_history_of_another_shape_is_said(read: Callable, history: Any) -> None:
    with pytest.raises(DataError, match="'history'"):
        read({"prompt": "And?", "history": history, "chosen": "a", "rejected": "b"})


def test_fields_that_parquet_fills_with_null_are_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {
            "prompt": [ASK, said("Hm.", tool_calls=CALL), {"role": "tool", "content": "18 C"}],
            "tools": [{"name": "look_up", "city": {"type": "string"}}, {"name": "convert", "unit": {"enum": ["F"]}}],
            "chosen": "a",
            "rejected": "b",
        },
        {"prompt": [ASK], "chosen": "Yes.", "rejected": "No."},
    ]
    path = tmp_path / "pairs.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).to_parquet(str(path))
    first, second = read_preferences(DataConfig(preferences=str(path)), tokenizer).records
    assert (
        "<call>look_up" in first.prompt
        and "null" not in first.prompt
        and second.prompt == "<user>Is it warm?<end><assistant>"
    )


@pytest.mark.parametrize("name", ["pairs.parquet", "saved"])
def test_tools_of_different_arguments_have_no_nulls_from_parquet(name: str, tmp_path: Path) -> None:
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    calls = [*CALL, {"type": "function", "function": {"name": "convert", "arguments": {"unit": "F"}}}]
    record = {
        "tools": [tool("look_up", city={"type": "string"}), tool("convert", unit={"type": "string", "enum": ["F"]})],
        "prompt": [ASK, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "64 F"}],
        "chosen": "a",
        "rejected": None,
    }
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([record, {"prompt": [ASK], "chosen": "Yes.", "rejected": "No."}])
    data.save_to_disk(tmp_path / name) if name == "saved" else data.to_parquet(str(tmp_path / name))
    first, second = read_rows(str(tmp_path / name), split="train", limit=None)
    assert first.values == record
    assert second.values["tools"] is None and second.values["prompt"] == [ASK]
    (tmp_path / "lines").mkdir()
    explicit = {"prompt": [ASK], "tools": [{"name": "f", "default": None}]}
    (row,) = read_rows(written(tmp_path / "lines", explicit), split="train", limit=None)
    assert row.values == explicit


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no feature Json")
def test_columns_of_json_are_read_as_their_values(tmp_path: Path) -> None:
    records = [
        {"prompt": [ASK], "chosen": [said("a", tool_calls=CALL)], "rejected": [said("b", reasoning_content="Hm.")]},
        {"prompt": [ASK], "chosen": [said("c")], "rejected": [said("d", tool_calls=[])]},
    ]
    (tmp_path / "folder").mkdir()
    direct = read_rows(written(tmp_path / "folder", *records), split="train", limit=None)
    of_json = datasets.List(datasets.Json())
    features = datasets.Features(prompt=of_json, chosen=of_json, rejected=of_json)
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(records, features=features)
    data.to_parquet(str(tmp_path / "pairs.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("folder", "pairs.parquet", "saved"):
        found = read_rows(str(tmp_path / name), split="train", limit=None)
        assert [row.values for row in found] == [row.values for row in direct] == records, name


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no feature Json")
def test_a_column_that_mixes_texts_and_messages_is_read_as_both(tmp_path: Path) -> None:
    records = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": [ASK], "chosen": "c", "rejected": "d"},
    ]
    path = tmp_path / "pairs.parquet"
    text = datasets.Value("string")
    features = datasets.Features(prompt=datasets.Json(), chosen=text, rejected=text)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records, features=features).to_parquet(str(path))
    assert [row.values for row in read_rows(str(path), split="train", limit=None)] == records


def test_a_reviser_is_given_texts_only(tmp_path: Path) -> None:
    source = written(tmp_path, {"prompt": [ASK], "chosen": [said("a", tool_calls=CALL)], "rejected": [said("b")]})
    raw = read_raw_preferences(DataConfig(preferences=source)).records
    with pytest.raises(DataError, match=r"holds more than a text .* a reviser edits texts; leave such pairs out"):
        as_texts(raw)


def test_columns_that_are_not_read_are_named_once(read: Callable, caplog: pytest.LogCaptureFixture) -> None:
    record = {"prompt": "Hi", "chosen": " a", "rejected": " b", "images": ["cat.png"], "margin": 0.5}
    record |= {"context": "On a mat.", "videos": []}
    with caplog.at_level(logging.WARNING, "tlcr"):
        found = read(record, record)
    assert found.notes == ("columns that are not read: images, context (the first holds ['cat.png'])",)
    assert caplog.text.count("columns that are not read") == 1


def test_long_examples_are_cut() -> None:
    (note,) = columns_left_out([Row("f", 1, 1, {"context": "x" * 100})], ())
    assert note == f"columns that are not read: context (the first holds '{'x' * 39}...)"


# ---- conversations as strings


@pytest.mark.parametrize("notation", [str, json.dumps])
def test_a_conversation_that_became_a_string_is_read_as_its_messages(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, notation: Callable[[object], str]
) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        rows.writeheader()
        rows.writerow(
            {
                "prompt": notation([ASK]),
                "chosen": notation([ASK, said("Yes.")]),
                "rejected": notation([ASK, said("No.")]),
            }
        )
        rows.writerow({"prompt": "Is it?", "chosen": "[A role, no list]", "rejected": "[1, 2]"})
        rows.writerow({"prompt": "Is it?", "chosen": "[{[]: 'role'}]", "rejected": "[1, 2]"})
    found = read_preferences(DataConfig(preferences=str(path)), tokenizer)
    first, second, third = found.records
    assert (first.prompt, first.chosen, first.rejected) == ("<user>Is it warm?<end><assistant>", "Yes.", "No.")
    assert (second.chosen, second.rejected) == ("[A role, no list]", "[1, 2]")
    assert (third.chosen, third.rejected) == ("[{[]: 'role'}]", "[1, 2]")
    assert len(found.notes) == 1
    assert found.notes[0].startswith(
        "1 of 3 records hold a conversation as a string, which is read as its messages (prompt"
    )


# ---- line ends


def test_windows_line_ends_are_read_as_others_in_every_format(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    shared = "\r\n\r\nHuman: hi\r\n\r\nAssistant: hello\r\n\r\nHuman: food?\r\n\r\nAssistant:"
    plain = shared.replace("\r\n", "\n")
    for record in (
        {"chosen": shared + " Good.\r\nYes.", "rejected": shared + " Bad."},
        {"prompt": shared, "chosen": " Good.\r\nYes.", "rejected": " Bad."},
    ):
        found = read_preferences(DataConfig(preferences=written(tmp_path, record)), tokenizer)
        assert only(found) == (plain, " Good.\nYes.", " Bad.")
        assert found.notes[0].startswith(r"1 of 1 records have Windows line ends (\r\n), which are read as \n (")
    messages = {"prompt": [{"role": "user", "content": "a\r\nb"}], "chosen": "c", "rejected": "d"}
    (pair,) = read_preferences(DataConfig(preferences=written(tmp_path, messages)), tokenizer).records
    assert pair.prompt == "<user>a\nb<end><assistant>"
    edit = {"prompt": "a\r\n", "rejected": "b", "revised": "c\r\n"}
    (edited,) = read_edits(DataConfig(edits=written(tmp_path, edit)), tokenizer).records
    assert (edited.prompt, edited.revised) == ("a\n", "c\n")


def test_answers_whose_characters_are_counted_stay_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    record = {"prompt": "a:", "response": " b\r\nbad", "spans": [{"start": 4, "end": 7}]}
    (answer,) = read_marked_answers(written(tmp_path, record), DataConfig(), tokenizer).records
    assert answer.response == " b\r\nbad" and answer.response[answer.spans[0].start : answer.spans[0].end] == "bad"


# ---- answers that contain their prompt


@pytest.mark.parametrize("prompt", ["Q: How was it?\nA:", "\n\nHuman: How was it?\n\nAssistant:"])
def test_a_prompt_that_all_answers_repeat_is_taken_off(read: Callable, prompt: str) -> None:
    found = read(
        *({"prompt": f"{k}{prompt}", "chosen": f"{k}{prompt} Good.", "rejected": f"{k}{prompt} Bad."} for k in "12")
    )
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found.records] == [
        (f"{k}{prompt}", " Good.", " Bad.") for k in "12"
    ]
    assert found.notes[0].startswith("2 of 2 records repeat the prompt at the beginning of their answers")


@pytest.mark.parametrize("prompt", ["Q: How was it?\nA:\n", "Q: How was it? A: ", "\n\nQ:\n\n"])
def test_what_a_repeated_prompt_ends_with_stands_once(read: Callable, prompt: str) -> None:
    """Prompt and answer together are the text that the record had."""
    found = read({"prompt": prompt, "chosen": f"{prompt}Good.", "rejected": f"{prompt}Bad."})
    ((chosen, rejected),) = [(pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in found.records]
    assert (chosen, rejected) == (f"{prompt}Good.", f"{prompt}Bad.")


def test_a_prompt_that_begins_an_answer_by_chance_stays(read: Callable) -> None:
    found = read(
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi, what?"},
        {"prompt": "Bye", "chosen": " Hi", "rejected": "Bye now"},
    )
    assert [pair.chosen for pair in found.records] == ["Hi there", " Hi"]
    assert not any("repeat the prompt" in note for note in found.notes)


def test_rows_with_a_problem_are_left_alone() -> None:
    rows = [Row("f", 1, 1, {}, "broken"), Row("f", 2, 2, {"prompt": "Hi", "chosen": "Hi a", "rejected": "Hi b"})]
    (broken, whole), notes = repaired(rows, ("chosen", "rejected"))
    assert broken is rows[0] or broken == rows[0]
    assert whole.values == {"prompt": "Hi", "chosen": " a", "rejected": " b"} and len(notes) == 1


# ---- where prompt and answer meet


def test_a_prompt_that_shares_a_token_with_its_answer_is_noted(read: Callable) -> None:
    (note,) = read({"prompt": "The food was good and the service was: ", "chosen": "good", "rejected": "bad"}).notes
    assert note.startswith("2 of the first 2 answers share a token with the end of their prompt (...'ervice was: '")
    assert read({"prompt": "The food was good and the service was:", "chosen": " good", "rejected": " bad"}).notes == ()


# ---- what files hold


def test_a_cell_may_be_longer_than_the_csv_module_s_own_limit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    record = {"prompt": "How was the food?", "chosen": " good" * 30_000, "rejected": " bad"}
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"long{suffix}"
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, record, delimiter=separator)
            rows.writeheader()
            rows.writerow(record)
        (pair,) = read_preferences(DataConfig(preferences=str(path)), tokenizer).records
        assert pair.chosen == record["chosen"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["Video", "Image"])  # torchcodec would be needed to write sounds
@pytest.mark.parametrize("stored", ["parquet", "folder"])
def test_media_beside_the_texts_are_not_decoded_but_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str, nested: bool, stored: str
) -> None:
    feature = getattr(datasets, kind)()
    media: Any = {"bytes": b"not decoded by anyone", "path": None}
    features = datasets.Features(
        {
            **dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Value("string")),
            "media": datasets.List(feature) if nested else feature,
        }
    )
    record = {"prompt": "Hi", "chosen": " a", "rejected": " b", "media": [media] if nested else media}
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({name: [value] for name, value in record.items()}, features=features)
    path = tmp_path / ("pairs.parquet" if stored == "parquet" else "pairs")
    data.to_parquet(str(path)) if stored == "parquet" else data.save_to_disk(str(path))
    found = read_preferences(DataConfig(preferences=str(path)), tokenizer)
    assert only(found) == ("Hi", " a", " b")
    assert found.notes[0].startswith("columns that are not read: media (the first holds ")

"""Records of every format and file kind, and every way in which they can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig
from tlcr.data.readers import (
    MalformedRecord,
    ReadResult,
    read_edits,
    read_marked_answers,
    read_preferences,
    read_prompts,
    read_raw_preferences,
    read_raw_prompts,
)
from tlcr.data.sources import read_rows
from tlcr.errors import ConfigError, DataError
from tlcr.types import EditPair, PreferencePair

REAL = Path(__file__).parents[3] / "shared" / "data"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

EDIT = {"prompt": "Was it good?", "rejected": " It was bad.", "revised": " It was good."}
PREFERENCE = {"prompt": "Was it good?", "chosen": " Yes.", "rejected": " No."}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."}
TLCR = {
    "context": "###Human: Hi ###Assistant: Hello ###Human: How?###Assistant:",
    "chosen_response": "Like this.",
    "reject_response": "No idea.",
    "raw_response": "It is unhelpful, so ..\n<|Start Of Modified Response|>\nSome idea.",
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("d")],
        "rejected": [assistant("e")],
    },
    {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "d", "rejected": "e"},
    {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
    },
    {
        "prompt": [user("a")],
        "chosen": [assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("b"), user("c"), assistant("e")],
    },
    {
        "prompt": "a",
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
    },
    {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("e")],
    },
]
"""One exchange and a question, then the answers d and e, in every form."""
TURNS_BEFORE = [
    ([assistant("b"), user("c")], "<user>a<assistant>b<user>c<assistant>"),
    ([{"role": "system", "content": "s"}], "<system>s<user>a<assistant>"),
    ([{"role": "developer", "content": "s"}], "<developer>s<user>a<assistant>"),
    ([{"role": "system", "content": "s"}, user("a")], "<system>s<user>a<assistant>"),
    ([assistant("Welcome."), user("a")], "<assistant>Welcome.<user>a<assistant>"),
]
"""Turns before the answers, with the rendered prompt where the column `prompt` is the text a."""
LAYOUTS: list[dict[str, Any]] = [
    *(PREFERENCE, {**PREFERENCE, "system": "s", "history": [["b", "c"]]}, HH, TLCR, *CONVERSATIONS),
    {"prompt": [user("a")], "chosen": "d", "rejected": [assistant("e")]},
    {"prompt": "a", "chosen": json.dumps([user("a"), assistant("d")]), "rejected": "e"},
    {"prompt": "b", "system": "s", "chosen": [user("a"), assistant("d")], "rejected": [user("a"), assistant("e")]},
    {"prompt": "Human: a", "chosen": "d", "rejected": "e"},
    *({"prompt": "", "chosen": chosen, "rejected": "e"} for chosen in ("d", [assistant("d")])),
    *({"prompt": "a", "chosen": [*b, assistant("d")], "rejected": [*b, assistant("e")]} for b, _ in TURNS_BEFORE),
    *(
        {"prompt": None, "chosen": [*b, user("a"), assistant("d")], "rejected": [*b, user("a"), assistant("e")]}
        for b, _ in TURNS_BEFORE
    ),
]
"""Preference pairs in every form."""


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    return tiny_tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*records: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


def edits(source: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ReadResult[EditPair]:
    return read_edits(DataConfig(edits=source, **options), tokenizer)


def preferences(source: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ReadResult[PreferencePair]:
    return read_preferences(DataConfig(preferences=source, **options), tokenizer)


def prompts(source: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ReadResult[str]:
    return read_prompts(DataConfig(prompts=source, **options), tokenizer)


class TestFiles:
    """The same two records from every kind of file."""

    RECORDS = ({**EDIT, "id": "a"}, {**EDIT, "id": "b", "prompt": 'A "quoted",\tprompt\nof two lines, é 🙃:'})

    def write(self, path: Path) -> None:
        datasets.disable_progress_bars()
        self._write(path)
        datasets.enable_progress_bars()

    def _write(self, path: Path) -> None:
        records = list(self.RECORDS)
        inner = path.with_suffix("") if path.suffix == ".gz" else path
        if inner.suffix in (".csv", ".tsv"):
            text = path.with_name("plain")
            with text.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(records[0]), delimiter="," if inner.suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(records)
            content = text.read_bytes()
        elif inner.name == "list.json":
            content = json.dumps(records, indent=2).encode()
        elif inner.suffix == ".parquet":
            datasets.Dataset.from_list(records).to_parquet(str(path))
            return
        elif not inner.suffix:
            data = datasets.Dataset.from_list(records)
            datasets.DatasetDict({"train": data}).save_to_disk(
                str(path)
            ) if "splits" in path.name else data.save_to_disk(str(path))
            return
        else:
            content = b"\n\n".join(json.dumps(record).encode() for record in records)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

    @pytest.mark.parametrize(
        "name",
        [
            *("a.jsonl", "a.ndjson", "lines.json", "list.json", "a.csv", "a.tsv", "a.parquet", "saved", "saved_splits"),
            *("a.jsonl.gz", "list.json.gz", "a.csv.gz", "a.tsv.gz"),
        ],
    )
    def test_every_kind(
        self,
        name: str,
        tmp_path: Path,
        tokenizer: PreTrainedTokenizerFast,
        capfd: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        source = tmp_path / name
        self.write(source)
        before = sorted(tmp_path.rglob("*"))
        cache = tmp_path / "cache"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        read = edits(str(source), tokenizer)
        assert read.format == "edits"
        assert [(pair.id, pair.prompt, pair.rejected, pair.revised) for pair in read.records] == [
            (record["id"], record["prompt"], record["rejected"], record["revised"]) for record in self.RECORDS
        ]
        assert sorted(tmp_path.rglob("*")) == before, "reading leaves nothing behind"
        assert capfd.readouterr() == ("", ""), "and prints nothing"
        assert not datasets.are_progress_bars_disabled(), "and leaves the progress bars of others alone"

    def test_folder_of_data_files(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        for split, ids in (("train", ["a", "b"]), ("test", ["c"])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({**EDIT, "id": id}) + "\n" for id in ids))
        assert [pair.id for pair in edits(str(folder), tokenizer).records] == ["a", "b"]
        assert [pair.id for pair in edits(str(folder), tokenizer, split="test").records] == ["c"]
        with pytest.raises(DataError, match="Bad split: valid") as error:
            edits(str(folder), tokenizer, split="valid")
        assert "data.split" in str(error.value)

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".jsonl.gz", ".json"])
    def test_a_folder_s_text_files_have_the_values_of_the_file_itself(self, suffix: str, tmp_path: Path) -> None:
        record = {"id": "007", "prompt": "Is it?", "chosen": "None", "rejected": "N/A", "date_string": "2024-07-26"}
        (tmp_path / "set").mkdir()
        path = tmp_path / "set" / f"a{suffix}"
        if ".json" in suffix:
            text = "".join(json.dumps({**record, **more}) + "\n" for more in ({}, {"margin": 1.5}, {"chosen": "1"}))
        else:
            separator = {".csv": ",", ".tsv": "\t"}[suffix]
            text = separator.join(record) + "\n" + separator.join(record.values()) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
        direct, found = (read_rows(str(source), split="train", limit=None) for source in (path, path.parent))
        assert direct[0].values == record
        assert [row.values for row in found] == [row.values for row in direct]
        assert [row.number for row in found] == [row.number for row in direct]

    def test_json_of_several_lines_in_a_folder_is_read_by_datasets(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        for id in ("a", "b"):
            (folder / f"{id}.json").write_text(json.dumps({**EDIT, "id": id}, indent=2) + "\n")
        assert [pair.id for pair in edits(str(folder), tokenizer).records] == ["a", "b"]
        (folder / "a.json").write_text(json.dumps([{**EDIT, "id": "a"}], indent=2) + "\n")
        (folder / "b.json").write_text(json.dumps([{**EDIT, "id": "007"}]) + "\n")
        assert [pair.id for pair in edits(str(folder), tokenizer).records] == ["a", "007"]

    def test_a_damaged_line_in_a_folder_is_named_with_its_file(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        for name, text in (("a.jsonl", json.dumps(EDIT)), ("b.jsonl", "\n{"), ("c.jsonl", json.dumps(EDIT))):
            (folder / name).write_text(text + "\n")
        read = edits(str(folder), tokenizer, on_malformed="skip")
        assert [pair.id for pair in read.records] == [f"{folder}:1", f"{folder}:3"]
        assert str(read.malformed[0]).startswith(f"{folder}, record 2: b.jsonl, line 2: invalid JSON")

    def test_a_folder_may_say_how_its_files_are_to_be_read(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / "a.csv").write_text("prompt;rejected;revised\na;b;c\n")
        configs = "configs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n"
        (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
        assert [pair.revised for pair in edits(str(tmp_path), tokenizer).records] == ["c"]

    def test_a_folder_of_two_kinds_says_what_it_leaves_out(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            (folder / name).write_text(json.dumps({**EDIT, "id": name}) + "\n")
        (folder / "dataset_infos.json").write_text("{}")
        assert len(edits(str(folder), tokenizer).records) == 2 and "left out" not in caplog.text
        (folder / "c.csv").write_text("prompt,rejected,revised\na,b,c\n")
        assert len(edits(str(folder), tokenizer).records) == 2
        assert "is read as files of one kind (.jsonl), and 1 others are left out, such as c.csv" in caplog.text

    def test_hub_dataset(self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub itself is not reached in tests; what it is asked for, and what becomes of the answer, is."""
        asked = []

        def load_dataset(*name: str | None, split: str) -> datasets.Dataset:
            asked.append((*name, split))
            return datasets.Dataset.from_list([EDIT, {**EDIT, "revised": None}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        read = edits("someone/edits:small", tokenizer, split="validation", on_malformed="skip")
        assert asked == [("someone/edits", "small", "validation")]
        assert [pair.id for pair in read.records] == ["someone/edits:small:1"]
        assert [str(bad) for bad in read.malformed] == ["someone/edits:small, record 2: field 'revised' is null"]
        edits("someone/edits", tokenizer, on_malformed="skip")
        assert asked[1] == ("someone/edits", None, "train")

    def test_saved_splits_must_have_the_one_that_is_asked_for(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.write(tmp_path / "saved_splits")
        with pytest.raises(DataError, match=r"has no split 'test'; set data\.split to one of train"):
            edits(str(tmp_path / "saved_splits"), tokenizer, split="test")

    def test_limit(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        source = jsonl(*({**EDIT, "id": id} for id in "abc"))
        assert [pair.id for pair in edits(source, tokenizer, limit=2).records] == ["a", "b"]

    def test_ids_are_the_column_or_file_and_row(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = edits(jsonl({**EDIT, "id": 7}, EDIT, {**EDIT, "id": None}), tokenizer)
        assert [pair.id for pair in read.records] == ["7", "data.jsonl:2", "data.jsonl:3"]


class TestBadFiles:
    """Each ends in one line that names the file and what to do."""

    def refused(self, source: str | Path, tokenizer: PreTrainedTokenizerFast, *parts: str, **options: Any) -> None:
        with pytest.raises(DataError) as error:
            edits(str(source), tokenizer, **options)
        message = str(error.value)
        assert "\n" not in message
        for part in (Path(source).name, *parts):
            assert part in message

    def test_empty_file(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "nothing.jsonl"
        path.touch()
        self.refused(path, tokenizer, "is empty (0 bytes)", "write or download it again")
        path.write_text("\n \n")
        self.refused(path, tokenizer, "is empty", "no record")
        (tmp_path / "header.csv").write_text("prompt,rejected,revised\n")
        self.refused(tmp_path / "header.csv", tokenizer, "is empty", "no record")
        (tmp_path / "list.json").write_text("[]")
        self.refused(tmp_path / "list.json", tokenizer, "is empty", "no record")

    def test_damaged_gzip(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        whole = gzip.compress(b"".join(json.dumps({**EDIT, "id": k}).encode() + b"\n" for k in range(999)))
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(whole[: len(whole) // 2])
        self.refused(path, tokenizer, "not a whole gzip file", "download or write it again", on_malformed="skip")
        path.write_bytes(json.dumps(EDIT).encode())
        self.refused(path, tokenizer, "not a whole gzip file")
        path.write_bytes(whole[:200] + b"x" * 30 + whole[230:])
        self.refused(path, tokenizer, "not a whole gzip file")

    def test_damaged_parquet(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "a.parquet"
        path.write_bytes(b"PAR1 and no more than that PAR1")
        self.refused(path, tokenizer, "cannot read", "check that the file is whole")

    def test_wrong_columns(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        self.refused(
            jsonl({"question": "a", "answer": "b"}), tokenizer, "columns answer, question", "prompt, rejected, revised"
        )
        with pytest.raises(
            DataError, match=r"columns prompt, rejected, revised; wanted are prompt, chosen, rejected; or"
        ):
            preferences(jsonl(EDIT), tokenizer)
        with pytest.raises(DataError, match=r"columns question; wanted are .* or prompt \(text"):
            prompts(jsonl({"question": "a"}), tokenizer)

    def test_invalid_json(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(EDIT) + '\n\n{"prompt": "cut off\n' + json.dumps(EDIT) + "\n[1]\n")
        self.refused(path, tokenizer, "record 2 (line 3): invalid JSON", "2 of 4 records", "data.on_malformed=skip")
        read = edits(str(path), tokenizer, on_malformed="skip")
        assert [pair.id for pair in read.records] == ["a.jsonl:1", "a.jsonl:3"]
        assert [(bad.row, bad.line) for bad in read.malformed] == [(2, 3), (4, 5)]
        assert "JSON list, not an object" in read.malformed[1].reason
        path.write_text("{\n")
        self.refused(path, tokenizer, "record 1 (line 1): invalid JSON", "mend the file")
        for text in ("[" * 5000, '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "[" + "9" * 5000 + "]"):
            path.write_text(f"{text}\n")
            self.refused(path, tokenizer, "invalid JSON (")
        path = tmp_path / "a.json"
        path.write_text('\n[\n{"prompt": "a"},\n{"prompt" "b"}]')
        self.refused(path, tokenizer, "line 4: invalid JSON", "mend it", on_malformed="skip")

    def test_table_that_does_not_fit_its_header(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "a.csv"
        path.write_text('prompt,rejected,revised\np," two\nlines", b\np, a\np, a, b, c\n')
        read = edits(str(path), tokenizer, on_malformed="skip")
        assert [(pair.id, pair.rejected) for pair in read.records] == [("a.csv:1", " two\nlines")]
        assert [(bad.row, bad.line, bad.reason) for bad in read.malformed] == [
            (2, 4, "2 cells, where the header names 3 columns"),
            (3, 5, "4 cells, where the header names 3 columns"),
        ]
        path.write_text("prompt,rejected,revised,rejected\np,a,b,c\n")
        self.refused(path, tokenizer, "line 1: the header names 'rejected' twice", on_malformed="skip")
        path.write_text('prompt,rejected,revised\np,"never closed,b\n')
        self.refused(path, tokenizer, "line 2: not readable as .csv", ".jsonl")

    def test_not_utf8(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes("prompt,rejected,revised\npé,a,b".encode("latin-1"))
        self.refused(path, tokenizer, "is not UTF-8", "convert it to UTF-8")

    def test_file_that_may_not_be_read(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = jsonl(EDIT)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        self.refused(source, tokenizer, "cannot be read (Permission denied)", "check its permissions")

    def test_folder_without_data(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        (tmp_path / "hollow").mkdir()
        self.refused(tmp_path / "hollow", tokenizer, "cannot read", "doesn't contain any data files")

    def test_unknown_extension(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        for name in ("a.xlsx", "a.parquet.gz", "noextension"):
            (tmp_path / name).write_text("x")
            self.refused(tmp_path / name, tokenizer, "unknown kind of file", ".jsonl", "convert the file")

    def test_missing_file_names_the_nearest(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        path = Path(jsonl(EDIT, name="reviews_train.jsonl"))
        self.refused(
            path.with_name("review_train.jsonl"), tokenizer, "there is no file", "reviews_train.jsonl", "check"
        )

    def test_name_that_is_neither_here_nor_on_the_hub(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_edits").mkdir()
        self.refused(
            "my_edit", tokenizer, "neither a file nor a folder (nearest name: 'my_edits')", "hub", "check the name"
        )

    def test_no_usable_record(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        source = jsonl(*[{**EDIT, "revised": None}] * 3)
        self.refused(source, tokenizer, "none of the 3 records", "'revised' is null", on_malformed="skip")

    def test_source_that_is_not_set(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for read, field in ((read_edits, "edits"), (read_preferences, "preferences"), (read_prompts, "prompts")):
            with pytest.raises(ConfigError, match=f"data.{field} is not set; name a file"):
                read(DataConfig(), tokenizer)


class TestMalformedRecords:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"revised": None}, "field 'revised' is null"),
            ({"revised": ""}, "field 'revised' is empty"),
            ({"prompt": None}, "field 'prompt' is null"),
            ({"rejected": 5}, "field 'rejected' is a int, not text"),
            ({"chosen": ["x"]}, "message 1 of 'chosen' has no 'role'"),
            (
                {"rejected": "a \ud83d b"},
                "field 'rejected' is not valid Unicode (half of a surrogate pair at character 3)",
            ),
            ({"rejected": []}, "field 'rejected' is not a list of messages"),
        ],
    )
    def test_edits(
        self, change: dict, reason: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, caplog: Any
    ) -> None:
        source = jsonl(EDIT, {**EDIT, **change}, EDIT)
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            read = edits(source, tokenizer, on_malformed="skip")
        assert len(read.records) == 2
        assert read.malformed == (MalformedRecord("data.jsonl", 2, 2, reason),)
        assert caplog.messages == [f"skipped data.jsonl, record 2 (line 2): {reason}"]
        assert read.summary() == f"{source} (edits): 2 records, 1 malformed and skipped"
        with pytest.raises(DataError) as error:
            edits(source, tokenizer)
        assert str(error.value).startswith(f"data.jsonl, record 2 (line 2): {reason}; 1 of 3 records of {source}")

    def test_missing_field(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = edits(jsonl(EDIT, {"prompt": "a", "rejected": "b"}), tokenizer, on_malformed="skip")
        assert [bad.reason for bad in read.malformed] == ["field 'revised' is missing"]

    def test_all_are_counted_and_the_first_are_logged(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, caplog: Any
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            read = edits(jsonl(EDIT, *[{**EDIT, "prompt": None}] * 50), tokenizer, on_malformed="skip")
        assert len(read.malformed) == 50
        assert (len(caplog.messages), caplog.messages[-1].split(" of ")[0]) == (21, "skipped 30 more malformed records")

    def test_equal_answers_are_no_preference(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl(PREFERENCE, {**PREFERENCE, "chosen": " No."}), tokenizer, on_malformed="skip")
        assert [bad.reason for bad in read.malformed] == ["chosen and rejected are the same text"]

    def test_revision_without_an_edit_is_kept_and_noted(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, caplog: Any
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            read = edits(jsonl(EDIT, {**EDIT, "revised": EDIT["rejected"]}), tokenizer)
        assert len(read.records) == 2
        assert "1 of 2 revisions change nothing" in read.summary()
        assert read.summary() in caplog.messages

    def test_answer_that_runs_on_in_the_prompts_word_is_noted(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        read = preferences(jsonl({"prompt": "Say yes", "chosen": "Yes", "rejected": " No"}), tokenizer)
        assert read.notes == (
            "1 of 2 answers run on inside the prompt's last word (...Say yesYes...): end the prompt or begin the "
            "answer with white space",
        )
        assert preferences(jsonl(PREFERENCE), tokenizer).notes == ()


class TestPreferences:
    def only(self, read: ReadResult[PreferencePair]) -> tuple[str, str, str]:
        (pair,) = read.records
        return pair.prompt, pair.chosen, pair.rejected

    def test_standard(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        assert self.only(preferences(jsonl(PREFERENCE), tokenizer)) == ("Was it good?", " Yes.", " No.")

    @pytest.mark.parametrize("record", CONVERSATIONS)
    def test_conversational(self, record: dict, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl(record), tokenizer)
        assert read.format == "preference"
        assert self.only(read) == ("<user>a<assistant>b<user>c<assistant>", "d", "e")

    @pytest.mark.parametrize("prompt", [None, [user("a") | {"id": "p"}]])
    def test_shared_turns_may_have_other_ids_in_each_conversation(
        self, prompt: list | None, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """They were set aside as unlike; and turns of the prompt stood there twice."""

        def conversation(answer: str, id: str) -> list[dict]:
            call = {"role": "assistant", "tool_calls": [{"id": id, "function": {"name": "f", "arguments": "{}"}}]}
            result = {"role": "tool", "content": "r", "tool_call_id": id}
            return [user("a") | {"id": "u" + id}, call, result, assistant(answer)]

        record = {"prompt": prompt, "chosen": conversation("d", "1"), "rejected": conversation("e", "2")}
        assert self.only(preferences(jsonl(record), tokenizer)) == ("<user>a<assistant><tool>r<assistant>", "d", "e")

    @pytest.mark.parametrize("change", [{"name": "g"}, {"arguments": '{"user_id": 3}'}])
    def test_other_tool_calls_are_other_turns(
        self, change: dict, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        def conversation(answer: str, results: str, **changed: str) -> list[dict]:
            calls = [{"id": id, "function": {"name": "f", "arguments": id, **changed}} for id in "xy"]
            of_each = [{"role": "tool", "content": "r", "tool_call_id": id} for id in results]
            return [user("a"), {"role": "assistant", "tool_calls": calls}, *of_each, assistant(answer)]

        for other in (conversation("e", "yx"), conversation("e", "xy", **change)):
            with pytest.raises(DataError, match="before the last answer differ"):
                preferences(jsonl({"chosen": conversation("d", "xy"), "rejected": other}), tokenizer)

    def test_conversational_parquet(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        source = tmp_path / "a.parquet"
        record = {"chosen": [user("a"), assistant("d")], "rejected": [user("a"), assistant("e")]}
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([record]).to_parquet(str(source))
        datasets.enable_progress_bars()
        assert self.only(preferences(str(source), tokenizer)) == ("<user>a<assistant>", "d", "e")

    def test_fields_of_messages_that_json_cannot_hold_are_left_out(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """As such columns are; and what is compared and written of messages is JSON."""
        source = tmp_path / "a.parquet"
        odd = {"at": datetime(2026, 7, 4), "raw": b"\x01", "name": "n"}
        record = {"chosen": [user("a") | odd, assistant("d")], "rejected": [user("a") | odd, assistant("e")]}
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([record]).to_parquet(str(source))
        datasets.enable_progress_bars()
        assert self.only(preferences(str(source), tokenizer)) == ("<user>a<assistant>", "d", "e")
        (raw,) = read_raw_preferences(DataConfig(preferences=str(source))).records
        assert raw.prompt == [user("a") | {"name": "n"}]

    def test_text_prompt_and_messages_for_answers(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        record = {"prompt": "a", "chosen": [assistant("d")], "rejected": [assistant("e")]}
        assert self.only(preferences(jsonl(record), tokenizer)) == ("<user>a<assistant>", "d", "e")

    @pytest.mark.parametrize(("before", "prompt"), TURNS_BEFORE)
    def test_text_prompt_is_the_first_user_message_unless_the_conversation_has_it(
        self, before: list, prompt: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        record = {"prompt": "a", "chosen": [*before, assistant("d")], "rejected": [*before, assistant("e")]}
        assert self.only(preferences(jsonl(record), tokenizer)) == (prompt, "d", "e")

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (
                {"chosen": [user("a"), assistant("d")], "rejected": [user("b"), assistant("e")]},
                "before the last answer differ",
            ),
            ({"chosen": [user("a")], "rejected": [user("b")]}, "the last message of 'chosen' is of role 'user'"),
            ({"chosen": [assistant("d")], "rejected": [assistant("e")]}, "nothing before the answer"),
            (
                {"prompt": [user("a"), assistant("b")], "chosen": "d", "rejected": "e"},
                "ends with an assistant's message",
            ),
            ({"prompt": [user("")], "chosen": "d", "rejected": "e"}, "the content of message 1 of 'prompt' is empty"),
            ({"prompt": [user("a")], "chosen": "d", "rejected": "d"}, "are the same text"),
        ],
    )
    def test_malformed_conversations(
        self, record: dict, reason: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(DataError, match=reason):
            preferences(jsonl(record), tokenizer)

    def test_conversations_without_a_template(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(ConfigError, match=r"set model\.chat_template"):
            preferences(jsonl({"prompt": [user("a")], "chosen": "d", "rejected": "e"}), tokenizer, on_malformed="skip")

    def test_hh(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        opening = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: How?\n\nAssistant:"
        read = preferences(jsonl({"chosen": opening + " Like\n\nthis. ", "rejected": opening + " Why?"}), tokenizer)
        assert read.format == "hh"
        assert self.only(read) == (opening, " Like\n\nthis. ", " Why?")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"chosen": "\n\nHuman: Ho\n\nAssistant: Hello!"}, "differ between chosen and rejected, from character 11"),
            ({"chosen": "\n\nHuman: Hi\n\nAssistant:  "}, "the last answer of 'chosen' is empty"),
            ({"rejected": HH["rejected"] + "\n\nHuman: No"}, "'rejected' is not a transcript whose last turn"),
            ({"rejected": "\n\nAssistant: Hi"}, "'rejected' has no turn before its answer"),
            ({"rejected": HH["chosen"]}, "the same text"),
        ],
    )
    def test_malformed_hh(self, change: dict, reason: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl(HH, {**HH, **change}), tokenizer, on_malformed="skip")
        assert len(read.records) == 1
        assert reason in read.malformed[0].reason

    def test_format_can_be_named(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        source = jsonl({**HH, "prompt": "ignored"})
        assert self.only(preferences(source, tokenizer, preferences_format="hh"))[0] == "\n\nHuman: Hi\n\nAssistant:"

    def test_tlcr(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl(TLCR), tokenizer)
        assert read.format == "tlcr"
        prompt = "\n\nHuman: Hi \n\nAssistant: Hello \n\nHuman: How?\n\nAssistant:"
        assert self.only(read) == (prompt, " Like this.", " No idea.")


class TestEdits:
    def test_transcript_that_stops_before_the_answer_is_completed(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        record = {
            "prompt": "Human: Hi\n\nAssistant: Yes?\n\nHuman: How?",
            "rejected": "Like so.",
            "revised": "Like this.",
        }
        (pair,) = edits(jsonl(record), tokenizer).records
        assert pair.prompt == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: How?\n\nAssistant:"
        assert (pair.rejected, pair.revised) == (" Like so.", " Like this.")
        complete = {**record, "prompt": pair.prompt, "rejected": pair.rejected, "revised": pair.revised}
        assert edits(jsonl(complete), tokenizer).records == (pair,)

    def test_conversational(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        record = {"prompt": [user("a")], "rejected": [assistant("b")], "revised": "c", "chosen": [assistant("d")]}
        (pair,) = edits(jsonl(record), tokenizer).records
        assert (pair.prompt, pair.rejected, pair.revised, pair.chosen) == ("<user>a<assistant>", "b", "c", "d")

    def test_tlcr(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        done = {**TLCR, "response": " Some other idea."}
        read = edits(jsonl(TLCR, done), tokenizer)
        assert read.format == "tlcr"
        assert [(pair.rejected, pair.revised, pair.chosen) for pair in read.records] == [
            (" No idea.", " Some idea.", " Like this."),
            (" No idea.", " Some other idea.", " Like this."),
        ]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"raw_response": "Some idea."}, "no line '<|Start Of Modified Response|>' before the revision"),
            ({"raw_response": "x\n<|Start Of Modified Response|>\n "}, "the revision in 'raw_response' is empty"),
            ({"context": None}, "field 'context' is null"),
            ({"rejected_token_edit": "UD", "modified_token_edit": ["U"]}, "'rejected_token_edit' is not a list"),
            ({"rejected_token_edit": ["U", "A"], "modified_token_edit": ["U"]}, "not a list of the edit codes U, S, D"),
            ({"rejected_token_edit": ["U", "S"], "modified_token_edit": ["U", "A"]}, "not two sides of one edit"),
            ({"rejected_token_edit": ["U", "D"]}, "'modified_token_edit' is not a list"),
        ],
    )
    def test_malformed_tlcr(
        self, change: dict, reason: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        read = edits(jsonl(TLCR, {**TLCR, **change}), tokenizer, on_malformed="skip")
        assert len(read.records) == 1
        assert reason in read.malformed[0].reason

    def test_edit_codes_are_compared_where_they_fit_the_tokenizer(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        record = {**TLCR, "reject_response": "good food", "response": "good soup"}
        kept, gone = (tokenizer.tokenize(text) for text in ("good", " food"))
        added = tokenizer.tokenize(" soup")
        assert len(gone) != len(added), "the lengths below tell the two sides apart"
        swapped = min(len(gone), len(added))
        rejected = ["U"] * len(kept) + ["D"] * (len(gone) - swapped) + ["S"] * swapped
        revised = ["U"] * len(kept) + ["A"] * (len(added) - swapped) + ["S"] * swapped
        coded = {**record, "rejected_token_edit": rejected, "modified_token_edit": revised}
        other = {**record, "rejected_token_edit": ["U"], "modified_token_edit": ["U"]}
        (note,) = edits(jsonl(coded, other, record), tokenizer).notes
        assert note.startswith("edit codes: 1 of 2 records have as many codes as this tokenizer makes tokens")
        assert "100.0% of the codes agree" in note
        wrong = {**coded, "rejected_token_edit": ["D", *rejected[1:]], "modified_token_edit": ["A", *revised[1:]]}
        (note,) = edits(jsonl(wrong), tokenizer).notes
        assert f"{1 - 2 / len(rejected + revised):.1%} of the codes agree" in note
        (note,) = edits(jsonl(other), tokenizer).notes
        assert "made with another" in note


class TestPrompts:
    def test_texts_and_messages_each_once(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = prompts(jsonl({"prompt": "Hi "}, {"prompt": [user("a")]}, {"prompt": "Hi "}), tokenizer)
        assert read.records == ("Hi ", "<user>a<assistant>")
        assert read.notes == ("1 repeated prompts left out",)

    def test_in_the_users_home(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        jsonl({"prompt": "Hi"}, name="here.jsonl")
        assert prompts("~/here.jsonl", tokenizer).records == ("Hi",)
        with pytest.raises(DataError, match=f"no file or folder '{tmp_path}/there.jsonl'"):
            prompts("~/there.jsonl", tokenizer)

    def test_malformed(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = prompts(
            jsonl({"prompt": "Hi"}, {"prompt": None}, {"prompt": [assistant("a")]}), tokenizer, on_malformed="skip"
        )
        assert [bad.row for bad in read.malformed] == [2, 3]

    def test_preferences_have_prompts_too(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        assert prompts(jsonl(HH), tokenizer).records == ("\n\nHuman: Hi\n\nAssistant:",)
        assert prompts(jsonl(PREFERENCE), tokenizer).records == ("Was it good?",)

    @pytest.mark.parametrize("field", ["preferences", "prompts"])
    @pytest.mark.parametrize("record", LAYOUTS)
    def test_of_pairs_are_those_that_the_pairs_have(
        self, record: dict, field: str, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """A column `prompt` decided alone, so that PPO was given other prompts than SFT, under other keys."""
        source = jsonl(record)
        pairs, raw_pairs = preferences(source, tokenizer), read_raw_preferences(DataConfig(preferences=source))
        cfg = DataConfig(**{field: source})
        read, raw = read_prompts(cfg, tokenizer), read_raw_prompts(cfg)
        assert read.records == tuple(pair.prompt for pair in pairs.records)
        assert read.prompt_keys == raw.prompt_keys == pairs.prompt_keys == raw_pairs.prompt_keys
        assert [one.prompt for one in raw.records] == [pair.prompt for pair in raw_pairs.records]

    def test_of_preferences_are_in_the_format_that_was_named_for_these(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        cfg = DataConfig(preferences=jsonl({**HH, "prompt": "ignored"}), preferences_format="hh")
        (pair,), read = read_preferences(cfg, tokenizer).records, read_prompts(cfg, tokenizer)
        assert (read.format, read.records) == ("hh", (pair.prompt,)) and pair.prompt.endswith("Hi\n\nAssistant:")
        assert read.prompt_keys == read_raw_prompts(cfg).prompt_keys == ("Hi",)

    @pytest.mark.parametrize("prompt", ["a", [user("a")]])
    def test_of_edits_are_those_that_the_edits_have(
        self, prompt: object, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        before = [{"role": "system", "content": "s"}]
        conversations = {
            "rejected": [*before, user("a"), assistant("b")],
            "revised": [*before, user("a"), assistant("c")],
        }
        for answers in ({"rejected": " b", "revised": " c"}, conversations):
            source = jsonl({"prompt": prompt, **answers})
            read, pairs = prompts(source, tokenizer), edits(source, tokenizer)
            assert read.records == tuple(pair.prompt for pair in pairs.records)
            assert read.prompt_keys == pairs.prompt_keys


needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data, which lies at {REAL} where it is")


@needs_real_data
class TestRealFiles:
    def test_hh(self, tokenizer: PreTrainedTokenizerFast) -> None:
        source = str(REAL / "hh_harmless_1600.jsonl.gz")
        read = preferences(source, tokenizer, on_malformed="skip")
        assert (read.format, len(read.records), len(read.malformed)) == ("hh", 1595, 5)
        assert all(pair.prompt.endswith("\n\nAssistant:") for pair in read.records)
        assert all(pair.chosen.startswith(" ") and pair.rejected.startswith(" ") for pair in read.records)
        reasons = sorted(bad.reason.partition(" differ")[0] for bad in read.malformed)
        assert reasons == [*["the last answer of 'chosen' is empty"] * 4, "the turns before the last answer"]
        with pytest.raises(DataError, match=r"record 87 \(line 87\): the last answer of 'chosen' is empty; 5 of 1600"):
            preferences(source, tokenizer)

    def test_revised_hh_meets_the_same_prompts(self, tokenizer: PreTrainedTokenizerFast) -> None:
        read = edits(str(REAL / "hh_revised_150.jsonl"), tokenizer)
        assert (read.format, len(read.records), read.notes) == ("edits", 150, ())
        known = {
            (pair.prompt, pair.rejected.strip())
            for pair in preferences(str(REAL / "hh_harmless_1600.jsonl.gz"), tokenizer, on_malformed="skip").records
        }
        assert sum((pair.prompt, pair.rejected.strip()) in known for pair in read.records) == 150

    def test_other_columns_are_named(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="columns Sentiment, Text, batch_id"):
            edits(str(REAL / "imdb_counterfactual_dev.tsv"), tokenizer)


class TestTextWithoutAPrompt:
    """An empty prompt is legal in every format, counted and said."""

    @pytest.mark.parametrize(
        "record",
        [
            {"prompt": "", "chosen": "Yes.", "rejected": "No."},
            {"prompt": " ", "chosen": "Yes.", "rejected": "No."},
            {"prompt": "", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
            {"prompt": [], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
            {"context": "", "chosen_response": "Yes.", "reject_response": "No."},
        ],
        ids=["empty", "blank", "messages", "no messages", "tlcr"],
    )
    def test_preferences(self, record: dict, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl(record, record), tokenizer)
        (pair, _) = read.records
        blank = record.get("prompt") == " "
        assert pair.prompt == (" " if blank else "<bos>") and pair.chosen.strip() == "Yes."
        assert read.prompt_keys == ("", "") and read.answer_keys == ("No.", "No.")
        assert "2 of 2 prompts are empty: what answers them is text without a prompt" in read.notes

    def test_edits_prompts_and_marked_answers(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        (edit,) = edits(jsonl({**EDIT, "prompt": ""}), tokenizer).records
        assert (edit.prompt, edit.revised) == ("<bos>", EDIT["revised"])
        assert prompts(jsonl({"prompt": ""}, {"prompt": "Hi"}), tokenizer).records == ("<bos>", "Hi")
        source = jsonl({"prompt": "", "response": "It was bad.", "spans": [{"start": 7, "end": 10}]})
        (marked,) = read_marked_answers(source, DataConfig(), tokenizer).records
        assert marked.prompt == "<bos>" and marked.response[marked.spans[0].start : marked.spans[0].end] == "bad"

    def test_an_answer_that_holds_more_than_text_is_malformed(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """No chat template renders it, which alone could write the rest."""
        named = {"prompt": "", "chosen": [{**assistant("Hi"), "name": "Bot"}], "rejected": [assistant("Ho")]}
        called = {"prompt": "", "rejected": "No.", "revised": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}
        for read, record, told in (
            (preferences, named, "field 'chosen' holds more than a text (name)"),
            (edits, called, "field 'revised' holds more than a text (tool_calls)"),
        ):
            with pytest.raises(DataError, match=f"{re.escape(told)}.*; give a prompt, or leave these fields out"):
                read(jsonl(record), tokenizer)
        kept = preferences(jsonl(named, {**PREFERENCE, "prompt": ""}), tokenizer, on_malformed="skip")
        assert len(kept.records) == len(kept.malformed) == 1

    def test_a_system_message_is_a_prompt(self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
        read = preferences(jsonl({**PREFERENCE, "prompt": "", "system": "Write."}), tokenizer)
        assert read.records[0].prompt == "<system>Write.<assistant>" and not read.notes

    def test_a_missing_prompt_is_said_with_the_remedy(
        self, jsonl: Callable, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        rows = jsonl(PREFERENCE, {"chosen": "a", "rejected": "b"})
        with pytest.raises(DataError, match="field 'prompt' is missing; text without a prompt has an empty text there"):
            preferences(rows, tokenizer)
        conversations = jsonl({"chosen": [assistant("a")], "rejected": [assistant("b")]})
        with pytest.raises(DataError, match="nothing before the answer; text without a prompt has an empty text as"):
            preferences(conversations, tokenizer)

"""The converter of the rewritten comments, on a table made here and on the real one, and its measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.paradetox import marks, prepare
from tlcr.config.schema import DataConfig
from tlcr.data.readers import read_edits, read_marked_answers, read_preferences, read_prompts

REAL = Path(__file__).parents[3] / "shared" / "data" / "paradetox.tsv"

TABLE = '''toxic\tneutral1\tneutral2\tneutral3
you are all damn fools , he said .\tYou're all wrong.\tYou are all fools, he said!\t
this is a dumb idea\tThis isn't a good idea\t\t
"they said "" what a load of crap "" ."\t"They said ""what a load"""\t\t
we do not agree , idiot .\tWe do not agree, friend.\t\t
the same as before .\tThe same as before!\t\t
no rewrite of this\t\t\t
'''


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("You're RIGHT .", "youre right"),
        ("dude , it isn\u2019t  so ! !", "dude, it isnt so"),
        (" a ; b : c ? d", "a; b: c? d"),
        ("...", ""),
    ],
)
def test_both_sides_are_written_alike(text: str, written: str) -> None:
    assert prepare.plain(text) == written


def test_of_several_rewrites_the_closest_is_taken() -> None:
    assert prepare.closest("a b c d", ["a x y z", "a b c", "a b c d", ""]) == "a b c"
    assert prepare.closest("a b", ["a b", ""]) is None


def test_sentences_become_records_by_their_first_words(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text(TABLE)
    pairs = list(prepare.read_pairs(table))
    assert pairs[0] == ("you are all damn fools, he said", "you are all fools, he said")
    assert pairs[3:] == [
        ("we do not agree, idiot", "we do not agree, friend"),
        ("the same as before", None),
        ("no rewrite of this", None),
    ]
    records = prepare.edit_records(pairs, at_most=3, at_least=2)
    assert [(r["prompt"], r["rejected"], r["revised"]) for r in records] == [
        ("you are all", " damn fools, he said", " fools, he said"),
        ("they said", ' " what a load of crap "', ' "what a load"'),
        ("we do not", " agree, idiot", " agree, friend"),
    ]


def test_no_two_of_the_three_files_share_an_opening(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "table.tsv"
    rows = [f"opening {n // 2} goes bad {n}\tOpening {n // 2} goes well {n}.\t\t" for n in range(40)]
    table.write_text("\n".join(["toxic\tneutral1\tneutral2\tneutral3", *rows]) + "\n")
    arguments = ["--table", str(table), "--output", str(tmp_path / "out"), "--comments", "6", "--prompts", "4"]
    with caplog.at_level("INFO", logger="prepare"):
        prepare.main(arguments)
    comments, edits, prompts = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("comments", "edits", "prompts"))
    assert (len(comments), len(edits), len(prompts)) == (12, 20, 4)
    openings = [{record["prompt"] for record in part} for part in (comments, edits, prompts)]
    assert list(map(len, openings)) == [6, 10, 4]
    assert len(set.union(*openings)) == 20
    assert all("bad" in c["chosen"] and "well" in c["rejected"] for c in comments)
    assert all("bad" in e["rejected"] and "well" in e["revised"] and e["chosen"] == e["revised"] for e in edits)
    assert "40 have a rewrite" in caplog.messages[0]
    before = [(tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in ("comments", "edits", "prompts")]
    prepare.main(arguments)
    assert before == [(tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in ("comments", "edits", "prompts")]


def test_too_few_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.tsv"
    table.write_text(TABLE)
    with pytest.raises(SystemExit):
        prepare.main(["--table", str(table), "--output", str(tmp_path / "out")])
    assert "2 records are too few" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real data, which lies at {REAL} where it is")
def test_real_comments_can_be_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prepare.main(["--table", str(REAL), "--output", str(tmp_path)])
    edits = read_edits(DataConfig(edits=str(tmp_path / "edits.jsonl")), tiny_tokenizer)
    assert (edits.format, len(edits.records), edits.notes) == ("edits", 2892, ())
    comments = read_preferences(DataConfig(preferences=str(tmp_path / "comments.jsonl")), tiny_tokenizer)
    prompts = read_prompts(DataConfig(prompts=str(tmp_path / "prompts.jsonl")), tiny_tokenizer)
    assert (len(comments.records), len(prompts.records)) == (2042, 1000)


def test_a_list_of_words_tells_civil_from_toxic() -> None:
    pytest.importorskip("better_profanity", reason="needs better-profanity")
    from examples.paradetox.words import clean

    assert clean(["he is"] * 3, [" a damn fool", " a good man", ""]) == [0.0, 1.0, 1.0]


def test_another_model_tells_civil_from_toxic() -> None:
    pytest.importorskip("profanity_check", reason="needs alt-profanity-check")
    from examples.paradetox.toxicity import civility

    toxic, civil = civility(["he is"] * 2, [" a complete idiot", " a complete stranger"])
    assert 0 <= toxic < 0.1
    assert 0.9 < civil <= 1


# ---- marks


def test_words_are_marked_that_two_others_took_out(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    table = tmp_path / "table.tsv"
    rows = [
        # the second takes out "damn" and "fools", the third "all" and "damn fools"
        ("you are all damn fools , he said .", "You are wrong", "you are all wrong, he said", "you are, he said"),
        ("what a load of crap", "what a lie", "what a load", "that is a load"),
        ("what a load of it", "what a lie", "", ""),  # begins as a marked one does
        ("this is dumb", "this is wrong", "This is wrong.", ""),  # two of one text: not three
    ]
    columns = ("toxic", "neutral1", "neutral2", "neutral3")
    table.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    marks.main(["--table", str(table), "--output", str(tmp_path / "out"), "--marked", "1", "--threshold", "1"])
    both = {
        record["response"]: [record["response"][span["start"] : span["end"]] for span in record["spans"]]
        for name in ("spans", "spans_threshold")
        for record in lines(tmp_path / "out" / f"{name}.jsonl")
    }
    assert both == {"you are all damn fools, he said": ["damn fools,"], "what a load of crap": ["of crap"]}
    (edit,) = lines(tmp_path / "out" / "edits.jsonl")
    assert (edit["rejected"], edit["revised"]) == ("this is dumb", "this is wrong")
    (held_out,) = lines(tmp_path / "out" / "edits_held_out.jsonl")
    (judged,) = lines(tmp_path / "out" / "spans.jsonl")
    assert held_out["id"] == judged["id"] and held_out["rejected"] == judged["response"]
    assert held_out["revised"] in ("you are wrong", "what a lie")
    assert read_marked_answers(str(tmp_path / "out" / "spans.jsonl"), DataConfig(), tiny_tokenizer).records[0].spans


def test_the_kind_of_a_mark_is_how_many_edits_take_the_word_out() -> None:
    edits = [("a damn, damn fool", "a person"), *[("you fool !", "you !")] * 9]
    times = marks.times_taken_out(edits)
    assert times == {"damn": 1, "fool": 10}, "an edit counts once, and commas do not"
    text = "no fool, fool damn idiot here damn"
    found = marks.spans(text, [False, True, True, True, True, False, True], times)
    assert [(text[span["start"] : span["end"]], span["label"]) for span in found] == [
        ("fool, fool", "in 10 edits or more"),
        (" damn", "in 1 to 9 edits"),
        (" idiot", "in no edit"),
        ("damn", "in 1 to 9 edits"),
    ]


def test_only_edits_that_are_learnt_from_count(tmp_path: Path) -> None:
    rows = [(f"so {n} bad", f"so {n}", f"so {n} ok", f"so {n} fine") for n in range(2)]
    rows += [(f"it {n} is bad", f"it {n} is fine", "", "") for n in range(3)]
    table = tmp_path / "table.tsv"
    table.write_text("\n".join("\t".join(row) for row in (("toxic", "neutral1", "neutral2", "neutral3"), *rows)) + "\n")
    for learnt, kind in ((0, "in no edit"), (3, "in 1 to 9 edits")):
        out = tmp_path / str(learnt)
        amounts = ["--marked", "1", "--threshold", "1", "--learnt", str(learnt)]
        marks.main(["--table", str(table), "--output", str(out), *amounts])
        (judged,) = lines(out / "spans.jsonl")
        assert [span["label"] for span in judged["spans"]] == [kind]


def test_too_few_comments_with_three_rewrites_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.tsv"
    table.write_text(TABLE)
    with pytest.raises(SystemExit):
        marks.main(["--table", str(table), "--output", str(tmp_path / "out")])
    assert "has 0 sentences with three rewrites, wanted 500" in capsys.readouterr().err

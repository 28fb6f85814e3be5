"""The converter of the edited reviews, on a table made here and on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.imdb_reviews import classifier, prepare, sentiment
from tlcr.config.schema import DataConfig
from tlcr.data.readers import read_edits, read_preferences, read_prompts

REAL = Path(__file__).parents[3] / "shared" / "data"

TABLE = """Sentiment\tText\tbatch_id
Negative\tI saw it. It was bad.<br /><br />"So bad".\t4
Positive\tI saw it. It was good.<br /><br />"So good".\t4
Positive\tA great film.\t5
Negative\tAn awful film.\t5
Negative\tThe same thing twice.\t6
Positive\tThe same thing twice.\t6
Negative\tNo other side of this.\t7
Negative\tone two three four five six seven eight nine bad\t8
Positive\tone two three four five six seven eight nine good\t8
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_become_edits_prompts_and_a_held_out_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "train.tsv"
    table.write_text(TABLE)
    with caplog.at_level("INFO", logger="prepare"):
        prepare.main(["--train", str(table), "--dev", str(table), "--output", str(tmp_path / "out")])
    edits = lines(tmp_path / "out" / "edits.jsonl")
    assert edits == lines(tmp_path / "out" / "held_out.jsonl")
    assert [edit["id"] for edit in edits] == ["imdb-4", "imdb-8"]
    assert (edits[0]["prompt"], edits[0]["rejected"]) == ("I saw it. It was", ' bad.\n\n"So bad".')
    assert edits[0]["revised"] == edits[0]["chosen"] == ' good.\n\n"So good".'
    assert edits[1]["prompt"] == "one two three four five six seven eight"
    assert edits[1]["rejected"] == " nine bad"
    assert lines(tmp_path / "out" / "prompts.jsonl") == [{"prompt": edit["prompt"]} for edit in edits]
    for reason in (
        "1 left out: fewer than 3 first",
        "1 left out: not edited",
        "1 left out: not a negative and a positive",
    ):
        assert reason in caplog.messages[0]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data, which lies at {REAL} where it is")
def test_real_reviews_can_be_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    train, dev = (str(REAL / f"imdb_counterfactual_{part}.tsv") for part in ("train", "dev"))
    prepare.main(["--train", train, "--dev", dev, "--output", str(tmp_path)])
    edits = read_edits(DataConfig(edits=str(tmp_path / "edits.jsonl")), tiny_tokenizer)
    assert (edits.format, len(edits.records), edits.notes) == ("edits", 1363, ())
    assert all(3 <= len(pair.prompt.split()) <= 8 for pair in edits.records)
    assert (
        len(read_preferences(DataConfig(preferences=str(tmp_path / "held_out.jsonl")), tiny_tokenizer).records) == 202
    )
    prompts = read_prompts(DataConfig(prompts=str(tmp_path / "prompts.jsonl")), tiny_tokenizer)
    assert {pair.prompt for pair in edits.records} == set(prompts.records)


def test_sentiment_is_that_of_the_answer_alone() -> None:
    good, bad, none = sentiment.compound(["a horrible, awful film"] * 3, [" I loved it.", " I hated it.", ""])
    assert good > 0.5
    assert bad < -0.5
    assert none == 0


def test_the_classifier_learns_the_words_that_were_changed_and_not_the_films(tmp_path: Path) -> None:
    dev = tmp_path / "held_out.jsonl"
    films = ["the western", "the musical", "the thriller"]
    records = [{"rejected": f"{film} is dull", "revised": f"{film} is superb"} for film in films]
    records[2]["prompt"] = "\x85\u2028"  # ends no line of a file of JSON lines
    dev.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    texts, labels, pairs = classifier.texts_of(dev)
    assert texts[:3] == ["the western is dull", "the western is superb", "the musical is dull"]
    assert (labels.tolist(), pairs.tolist()) == ([0, 1] * 3, [0, 0, 1, 1, 2, 2])
    dull, superb, other = classifier.trained(dev).predict_proba(["dull", "superb", "a western"])[:, 1]
    assert dull < 0.3 < other < 0.7 < superb
    assert other == pytest.approx(0.5, abs=0.05)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data, which lies at {REAL} where it is")
def test_the_classifier_is_right_of_reviews_that_it_did_not_learn_from(tmp_path: Path) -> None:
    train, dev = (str(REAL / f"imdb_counterfactual_{part}.tsv") for part in ("train", "dev"))
    prepare.main(["--train", train, "--dev", dev, "--output", str(tmp_path)])
    texts, labels, _ = classifier.texts_of(tmp_path / "edits.jsonl")
    assert classifier.trained(tmp_path / "held_out.jsonl").score(texts, labels) > 0.8

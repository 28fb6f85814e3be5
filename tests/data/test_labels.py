"""Labels worked out by hand: in context, at the end of sequence, and where answers are cut."""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.text.test_tokenization import byte_level
from tlcr.config.schema import DataConfig, LabelConfig
from tlcr.data import labels
from tlcr.data.labels import EndOfSequence, label_pair, label_pairs, write_labels
from tlcr.data.readers import read_edits, read_preferences
from tlcr.text.tokenization import character_spans
from tlcr.types import EditPair, LabelledAnswer, LabelledPair

REAL = Path(__file__).parents[3] / "shared" / "data"
LETTERS = byte_level()
SIGNS = {-1: "-", 0: ".", 1: "+"}


def label(
    rejected: str,
    revised: str,
    *,
    prompt: str = "p",
    limit: int = 99,
    end: EndOfSequence = "neutral",
    tokenizer: PreTrainedTokenizerFast = LETTERS,
) -> LabelledPair:
    pair = EditPair(id="x", prompt=prompt, rejected=rejected, revised=revised)
    return label_pair(pair, tokenizer, max_prompt_tokens=99, max_answer_tokens=limit, end_of_sequence=end)


def signs(answer: LabelledAnswer) -> str:
    """One sign a token: - . + and a blank where it does not count."""
    assert len(answer.labels) == len(answer.counted) == len(answer.encoded.answer_ids)
    return "".join(SIGNS[label] if counts else " " for label, counts in zip(answer.labels, answer.counted, strict=True))


def both(pair: LabelledPair) -> tuple[str, str]:
    assert (pair.rejected.side, pair.revised.side) == ("rejected", "revised")
    return signs(pair.rejected), signs(pair.revised)


class TestAlignment:
    @pytest.mark.parametrize(
        ("rejected", "revised", "labels"),
        [
            ("abc", "abc", ("....", "....")),
            ("abc", "axc", (".-..", ".+..")),
            ("abc", "ac", (".-..", "...")),
            ("ac", "abc", ("...", ".+..")),
            ("abc", "xyzabc", ("....", "+++....")),
            ("abc", "xyz", ("---.", "+++.")),
        ],
    )
    def test_by_hand(self, rejected: str, revised: str, labels: tuple[str, str]) -> None:
        assert both(label(rejected, revised)) == labels

    def test_labels_are_of_tokens_as_they_stand_in_context(self) -> None:
        tokenizer = byte_level("Ġ a", "Ġa b")
        # Alone " ab" is one token and " ac" two; after "x " the first token of both swallows the prompt's space.
        pair = label("ab", "ac", prompt="x ", tokenizer=tokenizer)
        names = [tokenizer.convert_ids_to_tokens(list(a.encoded.answer_ids)) for a in (pair.rejected, pair.revised)]
        assert names == [["Ġab", "<eos>"], ["Ġa", "c", "<eos>"]]
        assert both(pair) == ("-.", "++.")
        assert pair.rejected.encoded.ids[: pair.rejected.encoded.answer_start] == tuple(tokenizer("x")["input_ids"])

    def test_prompt_tokens_are_not_labelled(self) -> None:
        pair = label("ab", "xb", prompt="abab")
        for answer in (pair.rejected, pair.revised):
            assert list(answer.encoded.ids[: answer.encoded.answer_start]) == LETTERS("abab")["input_ids"]
        assert len(pair.rejected.labels) == 3
        assert both(pair) == ("-..", "+..")

    def test_an_end_of_sequence_inside_an_answer_is_a_token_and_one_at_its_end_is_its_end(self) -> None:
        assert both(label("a<eos>b", "ab")) == (".-..", "...")
        pair = label("a<eos>", "a")
        assert pair.rejected.encoded.answer_ids == pair.revised.encoded.answer_ids
        assert both(pair) == ("..", "..")


class TestEndOfSequence:
    CASES = (
        ("abc", "abc", "=", "nothing is edited"),
        ("abc", "xbc", "=", "the last tokens are kept"),
        ("abc", "abx", "=", "the last token is replaced, one for one"),
        ("abc", "axy", "=", "two tokens are replaced by two"),
        ("abcd", "xyzw", "=", "all tokens are replaced by as many"),
        ("abc", "ab", "!", "the revision ends earlier"),
        ("ab", "abc", "!", "the revision goes on"),
        ("abc", "abxyz", "!", "one token is replaced by three"),
        ("abcd", "axd", "=", "the deletion is inside, the end stays"),
        ("ab", "ba", "!", "the tail moves to the front: b is deleted after a, and added before it"),
    )

    @pytest.mark.parametrize(("rejected", "revised", "moved", "why"), CASES)
    def test_boundary(self, rejected: str, revised: str, moved: str, why: str) -> None:
        ends = [signs_[-1] for signs_ in both(label(rejected, revised, end="boundary"))]
        assert ends == (["-", "+"] if moved == "!" else [".", "."]), why

    @pytest.mark.parametrize(("rejected", "revised", "moved", "why"), CASES)
    def test_neutral_and_ignore(self, rejected: str, revised: str, moved: str, why: str) -> None:
        assert [signs_[-1] for signs_ in both(label(rejected, revised, end="neutral"))] == [".", "."]
        ignored = label(rejected, revised, end="ignore")
        assert [signs_[-1] for signs_ in both(ignored)] == [" ", " "]
        assert [signs_[:-1] for signs_ in both(ignored)] == [signs_[:-1] for signs_ in both(label(rejected, revised))]
        assert ignored.rejected.labels[-1] == 0


class TestCut:
    def test_tokens_whose_partner_was_cut_off_stay_neutral(self) -> None:
        # Cut first and aligned then, the e of the one revision would look added, and the cd of the other deleted.
        assert both(label("abcdef", "bcdef", limit=4)) == ("-...", "....")
        assert both(label("abcdef", "xyabcdef", limit=4)) == ("....", "++..")

    def test_edits_beyond_the_limit_are_gone(self) -> None:
        pair = label("abcdef", "abcxyz", limit=3)
        assert both(pair) == ("...", "...")
        assert not pair.rejected.encoded.complete
        assert not pair.revised.encoded.complete

    @pytest.mark.parametrize("end", ["neutral", "ignore", "boundary"])
    def test_only_an_end_that_is_there_is_labelled(self, end: EndOfSequence) -> None:
        last = {"neutral": ".", "ignore": " ", "boundary": "+"}[end]
        assert both(label("abcdef", "abc", limit=4, end=end)) == ("...-", "..." + last)

    @settings(max_examples=200, deadline=None)
    @given(
        rejected=st.text("ab c", min_size=1, max_size=12),
        revised=st.text("ab c", min_size=1, max_size=12),
        limit=st.integers(1, 14),
        end=st.sampled_from(["neutral", "ignore", "boundary"]),
    )
    def test_a_cut_only_takes_away(self, rejected: str, revised: str, limit: int, end: EndOfSequence) -> None:
        whole, cut = both(label(rejected, revised, end=end)), both(label(rejected, revised, end=end, limit=limit))
        assert cut == (whole[0][:limit], whole[1][:limit])


class TestStatistics:
    PAIRS = (
        EditPair("a", "p", "abcd", "abcd"),
        EditPair("b", "p", "abcd", "axcd"),
        EditPair("c", "p", "abcdefgh", "abcdef"),
        EditPair("d", "p", "ab", "xy"),
    )

    def run(self, limit: int = 7, **options: Any) -> Any:
        return label_pairs(self.PAIRS, LETTERS, DataConfig(max_answer_tokens=limit), LabelConfig(**options))

    def test_by_hand(self) -> None:
        pairs, statistics = self.run()
        assert [both(pair) for pair in pairs] == [
            (".....", "....."),
            (".-...", ".+..."),
            ("......-", "......."),
            ("--.", "++."),
        ]
        # Ends of sequence aside: 4 + 4 + 7 + 2 rejected tokens (of c, cut at 7, no end), 4 + 4 + 6 + 2 revised ones.
        assert (statistics.pairs, statistics.rejected_tokens, statistics.revised_tokens) == (4, 17, 16)
        assert statistics.negative_share == 4 / 33
        assert statistics.positive_share == 3 / 33
        assert statistics.neutral_share == 26 / 33
        assert statistics.edited_share == 7 / 33
        assert (statistics.unedited_pairs, statistics.truncated_pairs) == (1, 1)
        # 0 / 8, 2 / 8, 1 / 13 and 4 / 4.
        assert statistics.edited_share_histogram == (2, 0, 1, 0, 0, 0, 0, 0, 0, 1)

    def test_bins_hold_their_lower_edge(self) -> None:
        pair = EditPair("x", "p", "abcde", "xyzde")
        _, statistics = label_pairs([pair], LETTERS, DataConfig(), LabelConfig())
        assert statistics.edited_share == 6 / 10
        assert statistics.edited_share_histogram.index(1) == 6

    def test_same_as_one_by_one_and_ends_do_not_matter(self) -> None:
        pairs, statistics = self.run(end_of_sequence="boundary")
        for given_, labelled in zip(self.PAIRS, pairs, strict=True):
            alone = label_pair(given_, LETTERS, max_prompt_tokens=256, max_answer_tokens=7, end_of_sequence="boundary")
            assert labelled == alone
        assert statistics == self.run()[1]

    def test_no_pairs(self) -> None:
        pairs, statistics = label_pairs([], LETTERS, DataConfig(), LabelConfig())
        assert (pairs, statistics.pairs, statistics.edited_share) == ([], 0, 0.0)

    def test_warns_where_most_was_edited(self, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            monkeypatch.setattr(labels, "MOSTLY_EDITED", 7 / 33)
            self.run()
            cut, unedited = caplog.messages
            assert cut.startswith("token labels: 1 of 8 answers are longer than data.max_answer_tokens (7)")
            assert unedited.startswith("1 of 4 edit pairs have")
            caplog.clear()
            monkeypatch.setattr(labels, "MOSTLY_EDITED", 0.2)
            self.run()
        mostly = next(message for message in caplog.messages if " were edited" in message)
        assert mostly.startswith("21% of the answer tokens were edited, more than 20%")
        assert "chosen" in mostly and "have a reviser edit" in mostly

    def test_summary_is_one_line(self) -> None:
        assert self.run()[1].summary() == (
            "4 pairs, 17 + 16 tokens, 21.2% edited (12.1% negative, 9.1% positive); "
            "1 pairs unedited, 1 cut at the length limit"
        )

    def test_thousands_of_pairs_in_seconds(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        words = [" good", " bad", " food", " soup", ",", " and", " wonderful", " rude", " never"]
        made = []
        for k in range(2100):
            answer = random.choices(words, k=40)
            revised = [random.choice(words) if random.random() < 0.2 else word for word in answer]
            made.append(EditPair(str(k), "The waiter was", "".join(answer), "".join(revised)))
        start = time.perf_counter()
        pairs, statistics = label_pairs(made, tiny_tokenizer, DataConfig(), LabelConfig())
        assert time.perf_counter() - start < 20
        assert [pair.id for pair in pairs] == [pair.id for pair in made]
        assert 0.05 < statistics.edited_share < 0.4


class TestWriteLabels:
    def test_lines_can_be_read_by_people_and_tools(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.jsonl"
        write_labels(path, [label("aé🙃", "a🙃", end="ignore"), label("ab", "b")], LETTERS)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [line["id"] for line in lines] == ["x", "x"]
        assert lines[0]["prompt"] == "p"
        rejected = lines[0]["rejected"]
        assert rejected["tokens"] == ["a", "é", "", "🙃", "", "", "", "<eos>"]
        assert rejected["labels"] == ["neutral", "negative", "negative", *["neutral"] * 5]
        assert rejected["counted"] == [True] * 7 + [False]
        assert rejected["ids"] == list(label("aé🙃", "").rejected.encoded.answer_ids)
        assert rejected["complete"] is True
        assert lines[1]["revised"]["labels"] == ["neutral", "neutral"]

    def test_failure_leaves_the_previous_file(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.jsonl"
        write_labels(path, [label("ab", "b")], LETTERS)
        before = path.read_bytes()

        def broken() -> Any:
            yield label("ab", "b")
            raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_labels(path, broken(), LETTERS)
        assert [entry.name for entry in tmp_path.iterdir()] == ["labels.jsonl"]
        assert path.read_bytes() == before


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data, which lies at {REAL} where it is")
class TestRealData:
    def test_minimal_edits_leave_most_tokens_neutral(
        self, tiny_tokenizer: PreTrainedTokenizerFast, caplog: Any
    ) -> None:
        data = DataConfig(edits=str(REAL / "hh_revised_150.jsonl"))
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            _, statistics = label_pairs(read_edits(data, tiny_tokenizer).records, tiny_tokenizer, data, LabelConfig())
        assert statistics.pairs == 150
        assert 0.2 < statistics.edited_share < 0.5
        assert [message for message in caplog.messages if "are longer than" not in message] == []

    def test_chosen_taken_for_a_revision_is_warned_of(
        self, tiny_tokenizer: PreTrainedTokenizerFast, caplog: Any
    ) -> None:
        data = DataConfig(
            preferences=str(REAL / "hh_harmless_1600.jsonl.gz"), on_malformed="skip", limit=200, max_answer_tokens=4096
        )
        pairs = read_preferences(data, tiny_tokenizer).records
        edits = [EditPair(pair.id, pair.prompt, pair.rejected, pair.chosen) for pair in pairs]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="tlcr"):
            label_pairs(edits, tiny_tokenizer, data, LabelConfig())
        assert any("few neutral tokens are left" in message for message in caplog.messages)

    def test_labels_find_the_errors_that_people_marked(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokens that the human correction takes away, against the human error spans: see the data's README."""
        records = json.loads((REAL / "qa_feedback_dev.json").read_text(encoding="utf-8"))[:150]
        pairs = [
            EditPair(
                str(k),
                record["question"],
                " " + record["prediction 1"],
                " " + record["feedback"]["corrected-prediction"],
            )
            for k, record in enumerate(records)
        ]
        labelled, _ = label_pairs(pairs, tiny_tokenizer, DataConfig(max_answer_tokens=4096), LabelConfig())

        def f1(shift: int) -> float:
            hit = edited = wrong = 0
            for record, pair in zip(records, labelled, strict=True):
                ids = pair.rejected.encoded.answer_ids[:-1]
                labels = [label == -1 for label in pair.rejected.labels[:-1]]
                labels = labels[-shift:] + labels[:-shift]
                for (start, end), negative in zip(character_spans(tiny_tokenizer, ids), labels, strict=True):
                    errors = record["feedback"]["errors"]
                    # One character less: the answer above begins with a space.
                    marked = any(error["start"] < end - 1 and start - 1 < error["end"] for error in errors)
                    hit, edited, wrong = hit + (negative and marked), edited + negative, wrong + marked
            return 2 * hit / (edited + wrong)

        assert f1(shift=0) > 0.8
        assert f1(shift=40) < 0.8, "labels that are elsewhere do not"

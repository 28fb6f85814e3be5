"""What a reviser is asked, how its answer is read, and which revisions are minimal edits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tlcr.chat import Answer, NoAnswer
from tlcr.chat.reading import is_refusal
from tlcr.data.formats import REVISION_MARKER
from tlcr.data.records import RawPreference
from tlcr.reviser import prompt as prompt_module
from tlcr.reviser.checks import OUTCOMES, CheckedRevision, changed_share, check_answer, check_revision
from tlcr.reviser.files import content_key
from tlcr.reviser.prompt import revision_question
from tlcr.reviser.reading import Revision, read_revision

PAIR = RawPreference(
    "1",
    "\n\nHuman: How was it?\n\nAssistant:",
    " It was warm and lovely.",
    " It was cold, and the waiter was an idiot.",
)
GOOD = "It was cold, and the waiter was slow."


def as_json(revised: object, **more: object) -> str:
    return json.dumps({"comparison": " kinder ", "reason": "rude", "revised": revised, **more})


# ---- the request


@pytest.mark.parametrize("answer_format", ["json", "marker"])
def test_a_request_holds_the_three_texts_and_asks_for_three_steps(answer_format) -> None:
    asked = revision_question(PAIR, answer_format, max_new_tokens=9, temperature=0.5, attempt=2)
    (message,) = asked.messages
    assert message.role == "user"
    for text in (PAIR.prompt, PAIR.chosen, PAIR.rejected):
        assert f"\n{text.strip()}\n" in message.content
    steps = [message.content.index(step) for step in ("1. Compare.", "2. Reason.", "3. Rewrite.")]
    assert steps == sorted(steps)
    assert (asked.max_new_tokens, asked.temperature, asked.attempt) == (9, 0.5, 2)
    assert (asked.schema is not None) == (answer_format == "json")
    assert (REVISION_MARKER in message.content) == (answer_format == "marker")
    assert asked.template == f"revise-1-{answer_format}"


def test_texts_with_braces_and_messages_come_through_as_they_are() -> None:
    turns = [{"role": "system", "content": "Be {kind}."}, {"role": "user", "content": "Hi {0}\n"}]
    asked = revision_question(RawPreference("1", turns, "{a}", "{b"), "json", max_new_tokens=9, temperature=None)
    content = asked.messages[0].content
    assert "<conversation>\nSystem: Be {kind}.\n\nUser: Hi {0}\n</conversation>" in content
    assert "<preferred>\n{a}\n</preferred>" in content and "<dispreferred>\n{b\n</dispreferred>" in content


def test_whoever_changes_the_words_changes_the_version() -> None:
    """Answers are kept, and runs recorded, under the version. On a change: a new VERSION and its digest here."""
    words = json.dumps([prompt_module.TASK, prompt_module.CLOSING, prompt_module.SCHEMA])
    known = {"revise-1": "5b28159abb014b21"}
    assert known[prompt_module.VERSION] == hashlib.sha256(words.encode()).hexdigest()[:16]


def test_the_page_on_the_reviser_shows_the_words_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reviser.md").read_text(encoding="utf-8")
    assert f"```text\n{prompt_module.TASK}{prompt_module.CLOSING['json']}\n```\n" in page
    assert f"```text\n{prompt_module.CLOSING['marker']}\n```\n" in page


def test_the_schema_is_one_that_strict_servers_take_and_that_the_reader_reads() -> None:
    schema = prompt_module.SCHEMA
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == schema["required"] == ["comparison", "reason", "revised"]
    example = {name: f"a {name}" for name in schema["properties"]}
    assert read_revision(json.dumps(example)) == Revision("a revised", "a comparison", "a reason")


# ---- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (as_json(GOOD), Revision(GOOD, "kinder", "rude")),
        (f"Here it is:\n```json\n{as_json(GOOD)}\n```\nHope it helps {{}}!", Revision(GOOD, "kinder", "rude")),
        (f"<think>maybe {as_json('no')}</think>{as_json(GOOD)}", Revision(GOOD, "kinder", "rude")),
        (f"It is rude.\n</think>\n\n{REVISION_MARKER}{GOOD}", Revision("\n" + GOOD)),  # the template opened <think>
        (f"maybe {as_json('no')}\n</think>\n{as_json(GOOD)}", Revision(GOOD, "kinder", "rude")),
        (f"maybe {as_json('no')}\n</think>\nNo.", None),
        (f"<think>maybe {as_json('no')}", None),
        # quotations
        (as_json("a </think> b"), Revision("a </think> b", "kinder", "rude")),
        (as_json("b", note="</think>"), Revision("b", "kinder", "rude")),
        (f"Bad.\n{REVISION_MARKER}a\n</think>\nb", Revision("\na\n</think>\nb", reason="Bad.")),
        (f"No <think> </think>.\n{REVISION_MARKER}{GOOD}", Revision("\n" + GOOD, reason="No <think> </think>.")),
        (f"draft {as_json('first')} final {as_json(GOOD)}", Revision(GOOD, "kinder", "rude")),
        ('{"revised": "two\nlines"}', Revision("two\nlines")),  # raw line breaks are not JSON, and models write them
        ('{"revised": "a {brace} and \\"quotes\\"", "reason": 3}', Revision('a {brace} and "quotes"')),
        (f"It was rude.\n{REVISION_MARKER} {GOOD}\n", Revision(f"\n {GOOD}\n", reason="It was rude.")),
        (f"<|Start Of Modified Response|>{GOOD}", Revision(GOOD)),
        (f"{REVISION_MARKER}or\n{REVISION_MARKER}{GOOD}", Revision("\n" + GOOD, reason=f"{REVISION_MARKER}or")),
        (f'{{"note": 1}} {REVISION_MARKER}{GOOD}', Revision("\n" + GOOD, reason='{"note": 1}')),
        (as_json(""), Revision("", "kinder", "rude")),
        ('{"revised": "half \\ud83d"}', None),
        (r'{"revised": "a", "reason": "\ud83d", "comparison": "\ud83d\ude00"}', Revision("a", "\U0001f600", "?")),
        (as_json(GOOD)[:-9], None),
        (as_json(None), None),
        (as_json([GOOD]), None),
        (json.dumps([GOOD]), None),
        (GOOD, None),
        ("", None),
    ],
)  # fmt: skip
def test_a_revision_is_found_in_what_the_model_said(text: str, expected: Revision | None) -> None:
    found = read_revision(text)
    assert found == expected
    if found is not None and found.revised:
        assert found.revised.strip() in text.replace('\\"', '"')


@pytest.mark.parametrize("text", ["{" * 20_000, '{"a": ' * 5_000, '{"a": ' * 300 + "1" + "}" * 300])
def test_a_model_that_repeats_itself_has_no_revision_and_breaks_nothing(text: str) -> None:
    assert read_revision(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m very sorry, no.", True),
        ("Sorry, I won't.", True),
        ("**I cannot assist with this request.**", True),
        ("<think>hmm</think>\nI am unable to do this.", True),
        ("I decline to edit this.", True),
        ("It is a sorry state of affairs.", False),
        ("I can do that: nothing to change.", False),
        ("Icannot", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_opens(text: str, expected: bool) -> None:
    assert is_refusal(text) is expected


# ---- checks


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a b c d", "a b c d", 0.0),
        ("a b c d", "a x c d", 0.25),
        ("a b c d", "a b c d e", 0.2),
        ("a b, c.", "a b c.", 0.2),  # marks count as words: a b , c .
        ("  a\n b ", "a b", 0.0),
        ("a b", "c d e f", 1.0),
        ("", "", 0.0),
        ("", "a", 1.0),
        ("don't", "do not", 1.0),  # don ' t -> do not
        ("这家餐厅的菜又冷又慢", "这家餐厅的菜又热又快", 0.2),  # without spaces a character is a word
        ("とてもおいしい", "とてもまずい", 3 / 7),
        ("อาหารเย็น", "อาหารร้อน", 1 / 3),
        ("GPU 加速", "CPU 加速", 1 / 3),
        ("ｱｲｳ", "ｱｲｴ", 1 / 3),
    ],
)
def test_the_share_of_changed_words(before: str, after: str, expected: float) -> None:
    assert changed_share(before, after) == changed_share(after, before) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("revised", "outcome"),
    [
        (GOOD, "revised"),
        (f"\n\n{GOOD}  ", "revised"),
        ("It was cold, and the waiter was an idiot.", "unchanged"),
        ("  It was  cold, and the waiter\nwas an idiot. ", "unchanged"),
        ("It was cold and the waiter was an idiot.", "revised"),  # one mark
        ("", "empty"),
        (" \n\t", "empty"),
        ("It was warm and lovely.", "copied"),
        (" It was warm  and lovely. ", "copied"),
        ("I would rather not talk about that restaurant, but thank you for asking!", "rewritten"),
    ],
)
def test_each_check_has_its_outcome(revised: str, outcome: str) -> None:
    found = check_revision(PAIR, Revision(revised, "c", "r"), max_changed=0.75)
    assert found.outcome == outcome
    assert (found.comparison, found.reason) == ("c", "r")


def test_the_threshold_of_a_rewrite_is_the_config_s_and_met_exactly_it_passes() -> None:
    pair = RawPreference("1", "p", "wholly another thing to say", "a b c d")
    revision = Revision("a b x y")
    assert check_revision(pair, revision, max_changed=0.5).outcome == "revised"
    found = check_revision(pair, revision, max_changed=0.49)
    assert (found.outcome, found.detail) == ("rewritten", "50% of the words changed; reviser.max_changed is 49%")


def test_a_copy_of_a_chosen_answer_that_is_itself_a_light_edit_is_a_minimal_edit() -> None:
    words = [f"w{k}" for k in range(10)]
    for changes, outcome in ((1, "revised"), (3, "revised"), (4, "copied")):
        chosen = " ".join(["x"] * changes + words[changes:])
        pair = RawPreference("1", "p", chosen, " ".join(words))
        assert check_revision(pair, Revision(chosen), max_changed=0.75).outcome == outcome


@pytest.mark.parametrize("lead", ["", " ", "\n\n"])
@pytest.mark.parametrize("tail", ["", "\n"])
def test_white_space_at_the_ends_is_the_rejected_answer_s(lead: str, tail: str, tiny_tokenizer) -> None:
    """A lost leading space makes the first token another one: the label of a word that nobody touched would change."""
    from tlcr.data.labels import label_pair
    from tlcr.types import EditPair

    pair = RawPreference("1", "q:", " x", f"{lead}The food was good and bad{tail}")
    found = check_revision(pair, Revision("The food was good and good"), max_changed=0.75)
    assert found.revised == f"{lead}The food was good and good{tail}"
    edit = EditPair("1", pair.prompt, pair.rejected, found.revised)
    limits = {"max_prompt_tokens": 99, "max_answer_tokens": 99, "end_of_sequence": "neutral"}
    labelled = label_pair(edit, tiny_tokenizer, **limits)
    assert labelled.rejected.labels[0] == labelled.revised.labels[0] == 0
    assert -1 in labelled.rejected.labels and 1 in labelled.revised.labels


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(as_json(GOOD)), "revised"),
        (Answer(f"because\n{REVISION_MARKER}{GOOD}"), "revised"),
        (Answer(as_json(GOOD), finish="length"), "truncated"),
        (Answer(as_json(GOOD), finish="refusal"), "refusal"),
        (Answer("I'm sorry, I can't help with that."), "refusal"),
        (Answer(as_json("I'm sorry, I can't.")), "rewritten"),  # an answer that declines is an answer
        (Answer(as_json(GOOD)[:40]), "unreadable"),
        (Answer("The waiter was slow."), "unreadable"),
        (NoAnswer("HTTP 400: filtered", final=True), "declined"),
        (NoAnswer("no answer within 5 s", final=False), "unanswered"),
    ],
)
def test_what_an_answer_means_for_its_pair(answer: Answer | NoAnswer, outcome: str) -> None:
    found = check_answer(PAIR, answer, max_changed=0.75)
    assert found.outcome == outcome and outcome in OUTCOMES
    if outcome == "revised":
        assert found == CheckedRevision(
            "revised",
            revised=f" {GOOD}",
            comparison="kinder" if "comparison" in getattr(answer, "text", "") else "",
            reason=found.reason,
            changed_share=pytest.approx(2 / 11, abs=1e-4),
        )


# ---- content keys


def test_a_content_key_sees_the_words_and_not_the_white_space() -> None:
    key = content_key("a b", "c d")
    assert key == content_key(" a  b\n", "\nc d ")
    assert key == content_key([{"role": "user", "content": "a b"}], "c d")
    assert key == content_key([{"role": "user", "content": "a b", "id": "m17"}], "c d")
    others = [content_key("a", "b c d"), content_key("a b c", "d"), content_key("a b", "c e"), content_key("ab", "c d")]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert len({key, content_key(turns, "c d"), *others}) == 6

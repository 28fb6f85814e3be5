"""The embedded task: gold worked out by hand, what the reviser does, and that all of it depends on the seed alone."""

from __future__ import annotations

import hashlib
import random
import statistics

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from tlcr.data.embedded import build_model, build_tokenizer, generate_pairs, gold, prompts, revise, score
from tlcr.data.embedded.gold import ITEM, UNKNOWN_VALUE
from tlcr.data.embedded.language import (
    OPENERS,
    TAILS,
    USUAL_WORDS,
    is_held_out,
    known_words,
    lexicon,
    misspell,
    render,
    words_of,
)
from tlcr.data.embedded.reviser import edit_probability
from tlcr.errors import ConfigError, DataError
from tlcr.types import EditPair, PreferencePair

MAGA = "User: how is maga dipo today?\nAssistant:"  # domain 0
NERA = "User: how is nera dipo today?\nAssistant:"  # domain 1
MAGA_10 = "User: how is maga dipo today in 10 words?\nAssistant:"

# In the lexicon bosu is 1 and kigi -.74 everywhere, nika .93; nela is .96 in domain 0 and 0 elsewhere, fefi -.94 in
# domain 0 and .94 elsewhere; ka and te negate; fo and va are function words; re is a connective.


@pytest.mark.parametrize(
    ("prompt", "response", "total"),
    [
        (MAGA, "", 0.0),
        (MAGA, " fo bosu.", 1.0),
        (MAGA, " fo ka bosu.", -1.0),
        (MAGA, " fo ka kigi.", 0.74),
        (MAGA, " fo ka va bosu.", -1.0),  # a function word does not take the negation
        (MAGA, " fo ka va bosu nika.", -1.0 + 0.93),  # the first content word takes it
        (MAGA, " fo ka, bosu.", 1.0),  # negation ends with the clause
        (MAGA, " fo ka. bosu", 1.0),
        (MAGA, " fo ka re bosu", 1.0),
        (MAGA, " ka te bosu", 1.0),  # two negators
        (MAGA, " bosu ka", 1.0),  # what comes before is not negated
        (MAGA, " fo nela", 0.96),
        (NERA, " fo nela", 0.0),
        (MAGA, " fo fefi", -0.94),
        (NERA, " fo fefi", 0.94),
        (NERA, " ka fefi", -0.94),
        (MAGA, " bosuu", UNKNOWN_VALUE),
        (MAGA, " ka bosuu", UNKNOWN_VALUE),  # what is no word is not better for being negated
        (MAGA, " fo" * 21 + " bosu", 1.0 - 0.08 * (1 + 2)),  # words 21 and 22 are late by 1 and 2
        (MAGA, " fo" * 20, 0.0),
        (MAGA_10, " fo" * 10, 0.0),
        (MAGA_10, " fo" * 11 + " bosu", 1.0 - 0.16 * (1 + 2)),  # half of the words: each late one costs twice as much
    ],
)
def test_gold_by_hand(prompt: str, response: str, total: float) -> None:
    assert gold(prompt, response).total == pytest.approx(total, abs=1e-12)
    assert score([prompt], [response]) == pytest.approx([total], abs=1e-12)


def test_gold_says_where_each_word_stands() -> None:
    response = " fo ka bosu, kigi."
    words = gold(MAGA, response).words
    assert [response[w.start : w.end] for w in words] == ["fo", "ka", "bosu", "kigi"]
    assert [w.value for w in words] == [0.0, 0.0, -1.0, -0.74]
    assert [w.kind for w in words] == ["function", "negator", "content", "content"]
    assert [w.negated for w in words] == [False, False, True, False]
    assert gold(MAGA, response).per_word == pytest.approx(-1.74 / 4)
    assert gold(MAGA, "").per_word == 0.0


def test_neither_silence_nor_endless_talk_is_best() -> None:
    """With the best word there is, gold rises to an end inside the length limit of the task and falls after it."""
    totals = [gold(MAGA, " bosu" * count).total for count in range(80)]
    best = totals.index(max(totals))
    assert totals[0] == 0 and 20 < best < 40 and totals[79] < totals[best] / 2


def test_gold_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(DataError, match="names no topic"):
        gold("User: hello?\nAssistant:", " fo bosu")
    with pytest.raises(DataError, match="2 prompts came with 1 responses"):
        score([MAGA, NERA], [" fo"])


def test_words_do_not_collide() -> None:
    words = lexicon()
    groups = [
        *words.by_category.values(),
        words.pronouns,
        words.determiners,
        words.copulas,
        words.connectives,
        words.fillers,
        words.negators,
        tuple(words.topics),
        words.aspects,
        tuple({word for text in OPENERS + TAILS for word in text.split()}),
    ]
    every = [word for group in groups for word in group]
    assert len(every) == len(set(every)) >= 200
    values = [abs(v) for word in words.content.values() for v in word.values]
    assert all(v == 0 or 0.05 <= v <= 0.3 or 0.7 <= v <= 1 for v in values)
    topical = [word for word in words.content.values() if len(set(word.values)) > 1]
    assert len(topical) > 30
    assert all(misspell(word, random.Random(0)) not in known_words() for word in words.content)


def test_the_language_is_the_same_in_every_process() -> None:
    """A digest, because an order that came from string hashing would differ in the next process.

    It also stands guard over the published figures: whoever changes the language has to measure them again.
    """
    said = repr((generate_pairs(20, 3), prompts(20, 3))).encode()
    assert hashlib.sha256(said).hexdigest() == "5976776fcb38b32ca628fc6d4157ce1e547c0a6712c04f68de47e32d9fd338d0"


def test_pairs_depend_on_the_seed_alone_and_grow_at_the_end() -> None:
    random.seed(1)
    first = generate_pairs(30, 5)
    random.seed(2)
    assert generate_pairs(30, 5) == first
    assert generate_pairs(10, 5) == (first[0][:10], first[1][:10])
    assert generate_pairs(10, 6)[0] != first[0][:10]


def test_pairs_are_what_people_would_give() -> None:
    preferences, edits = generate_pairs(1500, 0)
    margins = []
    for preference, edit in zip(preferences, edits, strict=True):
        assert (edit.id, edit.prompt, edit.rejected, edit.chosen) == (
            preference.id,
            preference.prompt,
            preference.rejected,
            preference.chosen,
        )
        assert not is_held_out(edit.prompt)
        for answer in (preference.chosen, preference.rejected, edit.revised):
            assert answer.startswith(" ") and answer.endswith(".") and "  " not in answer
        chosen, rejected = gold(edit.prompt, preference.chosen).total, gold(edit.prompt, preference.rejected).total
        margins.append(chosen - rejected)
    assert 0.75 < statistics.mean(m > 0 for m in margins) < 0.95  # noisy, but not blind
    lengths = [len(gold(p.prompt, p.chosen).words) for p in preferences]
    assert min(lengths) >= 6 and max(lengths) <= 38 and statistics.stdev(lengths) > 3
    far, near = [m for m in margins if abs(m) > 2], [m for m in margins if abs(m) < 0.5]
    assert statistics.mean(m > 0 for m in far) > statistics.mean(m > 0 for m in near) + 0.2


def test_the_reviser_improves_gold_and_edits_a_small_share() -> None:
    _, edits = generate_pairs(1500, 1)
    gains = [gold(e.prompt, e.revised).total - gold(e.prompt, e.rejected).total for e in edits]
    assert statistics.mean(gains) > 1.0
    assert 0.8 < statistics.mean(g > 0 for g in gains) < 1.0  # not always right
    tokenizer = build_tokenizer(0)
    changed = total = 0
    for edit in edits[:400]:
        before, after = (tokenizer(text)["input_ids"] for text in (edit.rejected, edit.revised))
        operations = Levenshtein.editops(before, after)
        changed += len({o.src_pos for o in operations if o.tag != "insert"})
        changed += len({o.dest_pos for o in operations if o.tag != "delete"})
        total += len(before) + len(after)
    assert 0.12 < changed / total < 0.22


def test_edits_are_graded() -> None:
    """The worse a word is in its context, the more often the reviser touches it; by how much is in the formula."""
    rng = random.Random(0)
    touched = {}
    for word, value in (
        ("bosu", 1.0),
        ("gaki", 0.0),
        ("demo", -0.1),
        ("koza", -0.26),
        ("kigi", -0.74),
        ("lome", -0.95),
    ):
        answer = f" fo {word} va zida tu buko."  # six words, so the end may be extended: look at the beginning only
        (scored,) = (w for w in gold(MAGA, answer).words if w.text == word)
        assert scored.value == value
        count = sum(not revise(MAGA, answer, rng).startswith(f" fo {word} va") for _ in range(2000))
        touched[word] = count / 2000
        # Replacing a word may draw the same word again, and zida is edited by mistake once in a while.
        assert touched[word] == pytest.approx(edit_probability(scored), abs=0.04)
    rates = list(touched.values())
    assert rates[0] < 0.05 and rates[1] < 0.05
    assert rates[1] < rates[2] < rates[3] < rates[4] < rates[5]


def test_white_space_of_a_policy_is_no_edit() -> None:
    """What the reviser leaves as it is, it leaves to the letter; the rest it writes anew."""
    answer = " fo  bosu\nva nika , fo bosu va nika ."
    found = [revise(MAGA, answer, random.Random(seed)) for seed in range(50)]
    assert answer in found
    for text in found:
        assert text == answer or text.split() != answer.split()


def test_a_negated_good_word_is_what_the_reviser_sees_as_bad() -> None:
    rng = random.Random(0)
    touched = {
        answer: sum(revise(MAGA, answer, rng).split(" va")[0] != answer.split(" va")[0] for _ in range(1000)) / 1000
        for answer in (" fo ka bosu va zida.", " fo bosu va zida.", " fo ka lome va zida.", " fo lome va zida.")
    }
    negated_good, good, negated_bad, bad = touched.values()
    assert negated_good > 0.85 and bad > 0.8 and good < 0.06 and negated_bad < 0.06


def test_a_long_answer_is_trimmed_and_a_short_one_extended() -> None:
    rng = random.Random(0)
    clause = " fo gaki va zida,"
    long, short = clause * 7 + " fo gaki.", " fo gaki va zida."
    counts = {text: [len(gold(MAGA, revise(MAGA, text, rng)).words) for _ in range(500)] for text in (long, short)}
    assert 0.7 < statistics.mean(count <= USUAL_WORDS for count in counts[long]) <= 1.0
    assert 0.4 < statistics.mean(count >= 8 for count in counts[short]) < 0.6


def test_answers_are_as_long_as_the_prompts_ask_for() -> None:
    usual, longer = (generate_pairs(400, seed=0, words=words) for words in (USUAL_WORDS, 3 * USUAL_WORDS))
    assert usual == generate_pairs(400, seed=0)  # the usual length is not named in any prompt
    assert {words_of(pair.prompt) for pair in usual[0]} == {20} and "words" not in usual[0][0].prompt
    assert {words_of(pair.prompt) for pair in longer[0]} == {60}
    assert {words_of(prompt) for prompt in prompts(20, 0, "held_out", words=60)} == {60}

    def figures(made: tuple[list[PreferencePair], list[EditPair]]) -> tuple[float, float, float]:
        """Mean number of words, share of preferences that gold agrees with, share of answers that lose their end."""
        words = [len(gold(pair.prompt, pair.rejected).words) for pair in made[0]]
        right = [gold(p.prompt, p.chosen).total > gold(p.prompt, p.rejected).total for p in made[0]]
        cut = [len(gold(e.prompt, e.revised).words) < 0.8 * len(gold(e.prompt, e.rejected).words) for e in made[1]]
        return statistics.mean(words), statistics.mean(right), statistics.mean(cut)

    (words, right, cut), (more_words, still_right, still_cut) = figures(usual), figures(longer)
    assert more_words == pytest.approx(3 * words, rel=0.1)
    assert still_right == pytest.approx(right, abs=0.08) and still_cut == pytest.approx(cut, abs=0.08)


def test_prompts_of_the_splits_never_meet() -> None:
    train, held_out = prompts(1000, 0, "train"), prompts(300, 0, "held_out")
    assert len(set(train)) == 1000 and len(set(held_out)) == 300
    assert not set(train) & set(held_out)
    assert prompts(300, 0, "held_out") == held_out != prompts(300, 1, "held_out")
    with pytest.raises(ConfigError, match="ask for at most"):
        prompts(10**6, 0)
    with pytest.raises(ConfigError, match="split is 'test'"):
        prompts(1, 0, "test")  # type: ignore[arg-type]


def test_the_tokenizer_is_a_real_one() -> None:
    tokenizer = build_tokenizer(0)
    assert build_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    preferences, _ = generate_pairs(200, 11)
    for pair in preferences:
        text = pair.prompt + pair.chosen
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(tokenizer("Füße 🙂")["input_ids"]) == "Füße 🙂"
    pieces = [len(tokenizer(" " + word)["input_ids"]) for word in lexicon().content]
    assert 1.2 < statistics.mean(pieces) < 3 and max(pieces) > 2  # words of several tokens are common
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_the_model_depends_on_its_seed_and_leaves_the_random_state_alone() -> None:
    tokenizer = build_tokenizer(0)
    state = torch.get_rng_state()
    first, again, other = build_model(tokenizer, 0), build_model(tokenizer, 0), build_model(tokenizer, 1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(model.named_parameters()) for model in (first, again, other)]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert first.config.eos_token_id == tokenizer.eos_token_id
    assert first.generation_config.pad_token_id == tokenizer.pad_token_id


def test_rendering_reads_back_as_the_same_items() -> None:
    items = ["fo", "bosu", ",", "re", "nika", "."]
    assert render(items) == " fo bosu, re nika."
    assert ITEM.findall(render(items)) == items

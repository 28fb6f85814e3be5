"""Marks and edits from ParaDetox: which words of a toxic comment two people independently took out.

    python -m examples.paradetox.marks --table paradetox.tsv --output runs/paradetox_marks

A thousand of its sentences have three different rewrites by people. There the words that the second and the third took
out or replaced are marked, and the first rewrite says how well one person's edit finds what two others changed. Edits
to learn from come from the other sentences, none of which begins with the same three words as a marked one. The kind of
a mark is how many of those edits take the same word out: a score that knows words alone has nothing to go by where none
does. As JSON lines:

    edits.jsonl            id, prompt, rejected (the comment), revised (the closest rewrite)
    spans.jsonl            id, prompt, response, spans: the comments to judge on
    spans_threshold.jsonl  others, to choose thresholds on
    edits_held_out.jsonl   the comments to judge on, with their first rewrite

as `tlcr evaluate-tokens` and `examples/qa_feedback/baselines.py` read them (the latter wants a question and passages
beside, which are the prompt and none here).
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from examples.paradetox.prepare import closest, read_rewrites
from tlcr.files import write_json_lines

logger = logging.getLogger("marks")

PROMPT = "Comment:\n"
KINDS = {0: "in no edit", 1: "in 1 to 9 edits", 10: "in 10 edits or more"}
"""Kinds of marks, by how many edits at least take the word out."""
PUNCTUATION = ".,;:!?\"'()"
OPENING = 3
"""Words that no edit shares with a marked comment at its beginning."""


def read(path: Path) -> dict[str, list[str]]:
    """The rewrites of each toxic sentence that differ from it and from each other, all `plain`, in their order."""
    rewrites: dict[str, list[str]] = {}
    for toxic, of_row in read_rewrites(path):
        own = rewrites.setdefault(toxic, [])
        own += [rewrite for rewrite in dict.fromkeys(of_row) if rewrite not in ("", toxic, *own)]
    return rewrites


def taken_out(text: str, rewrite: str) -> list[bool]:
    """For each word of the text, whether the rewrite takes it out or replaces it, by the fewest changes."""
    words = text.split()
    gone = [False] * len(words)
    for step in Levenshtein.opcodes(words, rewrite.split()):
        if step.tag in ("delete", "replace"):
            gone[step.src_start : step.src_end] = [True] * (step.src_end - step.src_start)
    return gone


def bare(word: str) -> str:
    """The word without punctuation at its ends."""
    return word.strip(PUNCTUATION)


def times_taken_out(edits: Iterable[tuple[str, str]]) -> Counter[str]:
    """For each `bare` word how many edits (a text, its rewrite) take it out."""
    return Counter(
        word
        for text, rewrite in edits
        for word in {bare(word) for word, gone in zip(text.split(), taken_out(text, rewrite), strict=True) if gone}
    )


def kind_of(word: str, times: Mapping[str, int]) -> str:
    """The kind of a mark on a word."""
    return KINDS[max(least for least in KINDS if least <= times.get(bare(word), 0))]


def spans(text: str, is_marked: Sequence[bool], times: Mapping[str, int]) -> list[dict[str, Any]]:
    """The characters of the marked words, and their kinds; words of one kind in a row are one span. Between two words
    stands one space, which belongs to a span where both are marked."""
    words = text.split()
    begins = [0, *accumulate(len(word) + 1 for word in words)]
    found: list[dict[str, Any]] = []
    for k, word in enumerate(words):
        if not is_marked[k]:
            continue
        kind, end, follows = kind_of(word, times), begins[k] + len(word), k > 0 and is_marked[k - 1]
        if follows and found[-1]["label"] == kind:
            found[-1]["end"] = end
        else:
            found.append({"start": found[-1]["end"] if follows else begins[k], "end": end, "label": kind})
    return found


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"id": f"paradetox-{name}", "prompt": PROMPT, "question": PROMPT, "passages": [], **more}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="paradetox.tsv")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--marked", type=int, default=400, help="comments to judge on")
    parser.add_argument("--threshold", type=int, default=100, help="comments to choose thresholds on")
    parser.add_argument("--learnt", type=int, default=3000, help="edits that count for kinds: data.limit of marks.yaml")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rewrites = read(options.table)
    by_three = sorted(toxic for toxic, own in rewrites.items() if len(own) == 3)
    wanted = options.marked + options.threshold
    if len(by_three) < wanted:
        parser.error(
            f"{options.table} has {len(by_three)} sentences with three rewrites, wanted {wanted}; lower either"
        )
    random.Random(0).shuffle(by_three)
    chosen = by_three[:wanted]
    number = {toxic: str(k) for k, toxic in enumerate(rewrites)}

    def marked(toxic: str) -> dict[str, Any]:
        _, second, third = rewrites[toxic]
        both = [a and b for a, b in zip(taken_out(toxic, second), taken_out(toxic, third), strict=True)]
        return record(number[toxic], response=toxic, spans=spans(toxic, both, times))

    def edited(toxic: str, rewrite: str) -> dict[str, Any]:
        return record(number[toxic], rejected=toxic, revised=rewrite)

    openings = {tuple(toxic.split()[:OPENING]) for toxic in chosen}
    others = [toxic for toxic in rewrites if rewrites[toxic] and tuple(toxic.split()[:OPENING]) not in openings]
    random.Random(1).shuffle(others)
    edits = [edited(toxic, rewrite) for toxic in others if (rewrite := closest(toxic, rewrites[toxic])) is not None]
    times = times_taken_out((edit["rejected"], edit["revised"]) for edit in edits[: options.learnt])
    judged, tuned = chosen[: options.marked], chosen[options.marked :]
    for name, records in (
        ("edits", edits),
        ("spans", map(marked, judged)),
        ("spans_threshold", map(marked, tuned)),
        ("edits_held_out", (edited(toxic, rewrites[toxic][0]) for toxic in judged)),
    ):
        write_json_lines(options.output / f"{name}.jsonl", records)
    logger.info("%s: %d edits, %d and %d marked comments", options.output, len(edits), len(judged), len(tuned))


if __name__ == "__main__":
    main()

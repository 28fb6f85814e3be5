"""Marks and edits from ParaDetox: which words of a toxic comment two people independently took out.

    python -m examples.paradetox.marks --table paradetox.tsv --output runs/paradetox_marks

A thousand of its sentences have three different rewrites by people. There the words that the second and the third took
out or replaced are marked, and the first rewrite says how well one person's edit finds what two others changed. Edits
to learn from come from the other sentences, none of which begins with the same three words as a marked one. As JSON
lines:

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
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from examples.paradetox.prepare import closest, read_rewrites
from tlcr.files import write_json_lines

logger = logging.getLogger("marks")

PROMPT = "Comment:\n"
LABEL = "toxic"
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


def spans(text: str, is_marked: Sequence[bool]) -> list[dict[str, Any]]:
    """The characters of the marked words; words in a row are one span. One space stands between two words."""
    words = text.split()
    begins = [0, *accumulate(len(word) + 1 for word in words)]
    found: list[dict[str, Any]] = []
    for k, word in enumerate(words):
        if is_marked[k]:
            if k and is_marked[k - 1]:
                found[-1]["end"] = begins[k] + len(word)
            else:
                found.append({"start": begins[k], "end": begins[k] + len(word), "label": LABEL})
    return found


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"id": f"paradetox-{name}", "prompt": PROMPT, "question": PROMPT, "passages": [], **more}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="paradetox.tsv")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--marked", type=int, default=400, help="comments to judge on")
    parser.add_argument("--threshold", type=int, default=100, help="comments to choose thresholds on")
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
        return record(number[toxic], response=toxic, spans=spans(toxic, both))

    def edited(toxic: str, rewrite: str) -> dict[str, Any]:
        return record(number[toxic], rejected=toxic, revised=rewrite)

    openings = {tuple(toxic.split()[:OPENING]) for toxic in chosen}
    others = [toxic for toxic in rewrites if rewrites[toxic] and tuple(toxic.split()[:OPENING]) not in openings]
    random.Random(1).shuffle(others)
    edits = [edited(toxic, rewrite) for toxic in others if (rewrite := closest(toxic, rewrites[toxic])) is not None]
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

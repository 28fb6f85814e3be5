"""Turn answers whose errors people marked and corrected into edit records for training and error spans for evaluation.

QA-Feedback (github.com/allenai/FineGrainedRLHF, Apache-2.0) is a JSON list with, for each question, the passages that
the answer may draw on, a model's answer (`prediction 1`), the errors that people marked in it (`feedback.errors`:
character offsets and a type) and the answer as they corrected it (`feedback.corrected-prediction`).

    python -m examples.qa_feedback.prepare --data qa_feedback_dev.json --output runs/qa_feedback_data

holds 100 questions out and writes, as JSON lines that `tlcr` reads:

    edits.jsonl             id, prompt, rejected (the answer), revised (the corrected one): the other questions
    spans_threshold.jsonl   id, prompt, response, spans: those questions of edits.jsonl that training with the default
                            `data.held_out` puts aside by their prompt, to choose a threshold on
    spans.jsonl             the same for the held-out questions, for evaluation
    edits_held_out.jsonl    their corrections, which show how well the edits alone agree with the spans

Every record also has its question and passages. Questions whose passages come from the same article fall on the same
side. Which side that is depends on the text of the questions alone, not on their order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from tlcr.config.schema import DataConfig
from tlcr.data.records import prompt_key
from tlcr.data.splits import split_held_out
from tlcr.errors import DataError
from tlcr.files import write_json_lines

logger = logging.getLogger("prepare")

Raw = Mapping[str, Any]


def articles_in_common(records: Sequence[Raw]) -> list[list[Raw]]:
    """The records in groups: two are in one where they have passages of the same article, or a chain of such."""
    titles: dict[str, int] = {}
    links = [
        (r, titles.setdefault(passage[0], len(titles))) for r, raw in enumerate(records) for passage in raw["passages"]
    ]
    nodes = len(records) + len(titles)
    rows, columns = np.array(links, dtype=int).reshape(-1, 2).T
    graph = csr_array((np.ones(len(links)), (rows, len(records) + columns)), shape=(nodes, nodes))
    _, group_of = connected_components(graph, directed=False)
    groups: dict[int, list[Raw]] = {}
    for raw, group in zip(records, group_of[: len(records)], strict=True):
        groups.setdefault(int(group), []).append(raw)
    return list(groups.values())


def split_questions(records: Sequence[Raw], held_out: int) -> tuple[list[Raw], list[Raw]]:
    """(training, held-out) records, in the order of a hash of their questions, with exactly `held_out` of the latter.

    Groups of `articles_in_common` are taken whole, by the lowest hash of their questions; one that does not fit any
    more stays in training. Raises DataError where the groups do not come to `held_out` records.
    """
    ordered = [sorted(group, key=_hash) for group in articles_in_common(records)]
    train, out = list[Raw](), list[Raw]()
    for group in sorted(ordered, key=lambda group: _hash(group[0])):
        (out if len(out) + len(group) <= held_out else train).extend(group)
    if len(out) < held_out or not train:
        raise DataError(f"of {len(records)} questions {held_out} cannot be held out; hold out fewer (--held-out)")
    return train, out


def _hash(raw: Raw) -> str:
    return hashlib.sha256(raw["question"].encode()).hexdigest()


def opening(passage: Sequence[str], words: int) -> str:
    """The first whole sentences of a passage (after its title, with which the first one begins) up to so many words."""
    kept, left = list[str](), words
    for sentence in passage[1:]:
        left -= len(sentence.split())
        if left < 0:
            break
        kept.append(sentence)
    return " ".join(kept)


def prompt_of(raw: Raw, passage_words: int) -> str:
    """The prompt: the share of `passage_words` of each passage, and then the question.

    The question is last because a prompt that is too long is cut at the beginning.
    """
    share = passage_words // max(1, len(raw["passages"]))
    openings = [text for passage in raw["passages"] if (text := opening(passage, share))]
    return "\n\n".join([*openings, f"Question: {raw['question'].strip()}", "Answer:\n"])


def shared_fields(raw: Raw, passage_words: int) -> dict[str, Any]:
    return {
        "id": f"qa-{_hash(raw)[:16]}",
        "prompt": prompt_of(raw, passage_words),
        "question": raw["question"],
        "passages": [" ".join(passage[1:]) for passage in raw["passages"]],
    }


def edit_record(raw: Raw, passage_words: int) -> dict[str, Any]:
    """The answer and its correction, without the white space that the annotation tool puts around the correction."""
    corrected = raw["feedback"]["corrected-prediction"].strip()
    return shared_fields(raw, passage_words) | {"rejected": raw["prediction 1"], "revised": corrected}


def span_record(raw: Raw, passage_words: int) -> dict[str, Any]:
    spans = [
        {"start": error["start"], "end": error["end"], "label": error["error type"]}
        for error in sorted(raw["feedback"]["errors"], key=lambda error: error["start"])
    ]
    return shared_fields(raw, passage_words) | {"response": raw["prediction 1"], "spans": spans}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="qa_feedback_dev.json, or another part of it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--held-out", type=int, default=100, help="questions for evaluation (default 100)")
    parser.add_argument(
        "--passage-words",
        type=int,
        default=0,
        help="words of the passages, in equal parts and whole sentences, that go into the prompt (default 0)",
    )
    options = parser.parse_args(arguments)
    if options.held_out < 1:
        parser.error(f"--held-out is {options.held_out}; at least one question must be held out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, held_out = split_questions(json.loads(options.data.read_text(encoding="utf-8")), options.held_out)

    # Some corrected answers are empty. An empty revision is not an edit, so they are left out.
    corrected = [raw for raw in train if raw["feedback"]["corrected-prediction"].strip()]
    edits = [edit_record(raw, options.passage_words) for raw in corrected]
    names = [prompt_key(edit["prompt"]) for edit in edits]
    aside = {edit["id"] for edit in split_held_out(edits, DataConfig().held_out, names=names).held_out}
    spans = [span_record(raw, options.passage_words) for raw in corrected]
    for name, records in {
        "edits.jsonl": edits,
        "spans_threshold.jsonl": [record for record in spans if record["id"] in aside],
        "spans.jsonl": [span_record(raw, options.passage_words) for raw in held_out],
        "edits_held_out.jsonl": [edit_record(raw, options.passage_words) for raw in held_out],
    }.items():
        write_json_lines(options.output / name, records)
        logger.info("%s: %d records", options.output / name, len(records))
    logger.info("%d training questions left out: nothing remains of the corrected answer", len(train) - len(corrected))


if __name__ == "__main__":
    main()

"""Turn reviews that people edited into edit records, prompts and a held-out set.

The counterfactually augmented reviews (github.com/acmi-lab/counterfactually-augmented-data, Apache-2.0) are tables with
the columns Sentiment, Text and batch_id. Two rows share a batch_id: a review, and the same review minimally edited by a
person so that its sentiment flips. Here the negative one is the rejected answer and the positive one its revision,
whichever of them came first; the prompt is the first words that both have in common, and the policy continues them.

    python -m examples.imdb_reviews.prepare --train train_paired.tsv --dev dev_paired.tsv --output runs/imdb_data

writes, as JSON lines that `tlcr` reads:

    edits.jsonl      id, prompt, rejected, revised and chosen (= revised), from the training table; also fit for
                     `data.preferences`
    prompts.jsonl    prompt: the prompts of the above, each once
    held_out.jsonl   like edits.jsonl, from the dev table
"""

from __future__ import annotations

import argparse
import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from tlcr.data.openings import edit_record
from tlcr.files import write_json_lines

logger = logging.getLogger("prepare")


def read_reviews(path: Path) -> dict[str, dict[str, str]]:
    """For each batch_id its texts by sentiment, with line breaks in place of HTML's."""
    reviews: dict[str, dict[str, str]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, dialect="excel-tab", strict=True):
            reviews[row["batch_id"]][row["Sentiment"]] = row["Text"].replace("<br />", "\n").strip()
    return reviews


def edit_records(
    reviews: Mapping[str, Mapping[str, str]], *, at_most: int, at_least: int
) -> tuple[list[dict[str, str]], Counter[str]]:
    """Edit records, and how many pairs were left out for which reason."""
    records, left_out = [], Counter[str]()
    for batch_id, texts in reviews.items():
        if set(texts) != {"Negative", "Positive"}:
            left_out["not a negative and a positive text"] += 1
            continue
        negative, positive = texts["Negative"], texts["Positive"]
        record = edit_record(f"imdb-{batch_id}", negative, positive, at_most=at_most, at_least=at_least)
        if record is not None:
            records.append(record)
        else:
            left_out["not edited" if negative == positive else f"fewer than {at_least} first words in common"] += 1
    return records, left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="table of review pairs to train on")
    parser.add_argument("--dev", type=Path, required=True, help="table of review pairs to hold out")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--words", type=int, default=8, help="words of a prompt, where both texts share so many")
    parser.add_argument("--at-least", type=int, default=3, help="pairs that share fewer first words are left out")
    options = parser.parse_args(arguments)
    if not 1 <= options.at_least <= options.words:
        parser.error(f"--at-least {options.at_least} must be at least 1 and at most --words {options.words}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for table, name in ((options.train, "edits.jsonl"), (options.dev, "held_out.jsonl")):
        records, left_out = edit_records(read_reviews(table), at_most=options.words, at_least=options.at_least)
        write_json_lines(options.output / name, records)
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in left_out.items())
        logger.info("%s: %d edit records%s", options.output / name, len(records), f"; {reasons}" if reasons else "")
        if name == "edits.jsonl":
            prompts = dict.fromkeys(record["prompt"] for record in records)
            write_json_lines(options.output / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
            logger.info("%s: %d prompts", options.output / "prompts.jsonl", len(prompts))


if __name__ == "__main__":
    main()

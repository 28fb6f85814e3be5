"""Turn toxic comments that people rewrote into comments to learn from, edit records and prompts.

ParaDetox (github.com/s-nlp/paradetox, CC0) is a table of toxic sentences with up to three rewrites by people that say
the same without the toxicity: the columns toxic, neutral1, neutral2 and neutral3.

    python -m examples.paradetox.prepare --table paradetox.tsv --output runs/paradetox_data

writes, as JSON lines that `tlcr` reads, three sets of which no two share an opening:

    comments.jsonl   prompt, chosen and rejected, where *chosen* is the toxic ending: SFT on them makes the policy
                     write like these commenters, so that there is toxicity to remove
    edits.jsonl      id, prompt, rejected (toxic), revised and chosen (= revised): token labels and preferences
    prompts.jsonl    prompt: openings that PPO's policy continues

Of several rewrites the one with the fewest changed words counts, so that one sentence is one record. The rewriters
also put in capitals, apostrophes and full stops: both sides are written alike first, or the discriminator would learn
to tell neat from careless instead of civil from toxic.
"""

from __future__ import annotations

import argparse
import csv
import logging
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from tlcr.data.openings import edit_record
from tlcr.files import write_json_lines

logger = logging.getLogger("prepare")


def plain(text: str) -> str:
    """Lower case, no apostrophes, single spaces and none before punctuation, and no punctuation at the end."""
    text = re.sub(r"['\u2019]", "", text.lower())
    text = re.sub(r"\s+(?=[.,!?;:])", "", text)
    return " ".join(text.split()).rstrip(" .,!?;:")


def closest(toxic: str, rewrites: Iterable[str]) -> str | None:
    """The rewrite with the fewest changed words; None where there is none that differs."""
    others = [rewrite for rewrite in rewrites if rewrite not in ("", toxic)]
    return min(others, key=lambda other: Levenshtein.distance(toxic.split(), other.split()), default=None)


def read_rewrites(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(toxic sentence, its three rewrites in their order, "" where there is none), all `plain`."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, dialect="excel-tab", strict=True):
            yield plain(row["toxic"]), [plain(row[f"neutral{number}"] or "") for number in (1, 2, 3)]


def read_pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """(toxic sentence, its closest rewrite or None), both `plain`."""
    for toxic, rewrites in read_rewrites(path):
        yield toxic, closest(toxic, rewrites)


def edit_records(pairs: Iterable[tuple[str, str | None]], *, at_most: int, at_least: int) -> list[dict[str, str]]:
    """One record for each toxic sentence whose rewrite begins like it and goes on otherwise."""
    records: dict[str, dict[str, str]] = {}
    for toxic, rewrite in pairs:
        record = edit_record(f"paradetox-{toxic}", toxic, rewrite or "", at_most=at_most, at_least=at_least)
        if record is not None:
            records.setdefault(toxic, record)
    return list(records.values())


def three_parts(
    records: list[dict[str, str]], *, comments: int, prompts: int
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """(for comments, for edits, for prompts) by their openings, in an order drawn once and for all.

    comments, prompts: openings in the first and the last; the edits are what is left.
    """
    openings = sorted({record["prompt"] for record in records})
    random.Random(0).shuffle(openings)
    place = {opening: index for index, opening in enumerate(openings)}
    parts: tuple[list[dict[str, str]], ...] = ([], [], [])
    for record in records:
        index = place[record["prompt"]]
        parts[0 if index < comments else 2 if index < comments + prompts else 1].append(record)
    return parts[0], parts[1], parts[2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="paradetox.tsv")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--words", type=int, default=6, help="words of a prompt, where both texts share so many")
    parser.add_argument("--at-least", type=int, default=3, help="pairs that share fewer first words are left out")
    parser.add_argument("--comments", type=int, default=2000, help="openings to fine-tune the policy on")
    parser.add_argument("--prompts", type=int, default=1000, help="openings for PPO and its evaluation")
    options = parser.parse_args(arguments)
    if not 1 <= options.at_least <= options.words:
        parser.error(f"--at-least {options.at_least} must be at least 1 and at most --words {options.words}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pairs = list(read_pairs(options.table))
    records = edit_records(pairs, at_most=options.words, at_least=options.at_least)
    comments, edits, prompts = three_parts(records, comments=options.comments, prompts=options.prompts)
    if not edits:
        parser.error(
            f"{len(records)} records are too few for --comments {options.comments} and --prompts {options.prompts} "
            "openings: nothing is left for edits; lower one of them"
        )
    write_json_lines(
        options.output / "comments.jsonl",
        ({"id": r["id"], "prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["revised"]} for r in comments),
    )
    write_json_lines(options.output / "edits.jsonl", edits)
    openings = dict.fromkeys(record["prompt"] for record in prompts)
    write_json_lines(options.output / "prompts.jsonl", ({"prompt": opening} for opening in openings))
    logger.info(
        "%s: of %d sentences %d have a rewrite that begins with the same %d words or more; %d comments, %d edits, %d "
        "prompts",
        options.output,
        len(pairs),
        len(records),
        options.at_least,
        len(comments),
        len(edits),
        len(openings),
    )


if __name__ == "__main__":
    main()

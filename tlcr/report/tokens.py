"""Answers and one edit as people see them: every token with its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tlcr.data import embedded
from tlcr.data.embedded import GoldWord
from tlcr.errors import DataError
from tlcr.report.colours import css

SHOWN_ANSWERS = 6
"""Prompts whose answers are shown for each arm."""

MEASURES = {
    "reward": ("Reward", "what the arm's reward pays for this token, KL aside"),
    "advantage": ("Advantage", "how much better this token was than the value model expected: what PPO reinforces"),
    "value": ("Value", "the reward that the value model expects from here on, before this token"),
    "kl": ("KL", "log pi(token) - log pi_ref(token) in nats: above 0 the policy likes it more than the reference did"),
}
GOLD = ("Gold", "the true value of the word that the token belongs to, which training never saw")


@dataclass(frozen=True)
class ColouredToken:
    """A token's text, the background of each measure as a CSS colour, and its figures in words."""

    text: str
    breaks: bool
    """True where a line ends with it."""
    colours: dict[str, str]
    figures: str


@dataclass(frozen=True)
class DrawnToken:
    """A token of the drawn edit: its text, what became of it, and its reward; gold: of the word that ends here."""

    text: str
    change: str
    """"kept", "removed" or "added"."""
    reward: float
    gold: float | None


def measures(embedded_task: bool) -> dict[str, tuple[str, str]]:
    """Names of what the colours can show, with their titles and meanings."""
    return {**MEASURES, "gold": GOLD} if embedded_task else MEASURES


def answers(folder: Path, results: Mapping[str, Any], *, embedded_task: bool) -> list[dict[str, Any]]:
    """For each arm: the first seed's answers before and after, prompt by prompt, and the scale of each measure."""
    first = {row["name"]: row for row in reversed(results["arms"])}
    shown = []
    for arm in dict.fromkeys(row["name"] for row in results["arms"]):
        seed = first[arm]["seeds"][0]
        path = folder / "ppo" / seed["folder"] / "samples.jsonl"
        if not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if not lines:
            continue
        figures = [_figures(line, embedded_task) for line in lines]
        scales = {name: _scale([x for own in figures for x in own[name] if x is not None]) for name in figures[0]}
        colour = partial(_coloured, scales=scales)
        # By their place, not by their text: prompts may be equal, as empty ones are.
        by_place: list[dict[str, Any]] = []
        for when in ("before", "after"):
            of_time = [(line, own) for line, own in zip(lines, figures, strict=True) if line["when"] == when]
            for place, (line, own) in enumerate(of_time):
                if place == len(by_place):
                    by_place.append({"prompt": _given_prompt(line)})
                by_place[place][when] = {"gold": line["gold"], "tokens": colour(line["tokens"], own)}
        shown.append(
            {
                "arm": arm,
                "kl_coef": first[arm]["kl_coef"],
                "seed": seed["seed"],
                "scales": scales,
                "prompts": by_place[:SHOWN_ANSWERS],
            }
        )
    return shown


def _given_prompt(line: Mapping[str, Any]) -> str:
    """What the policy was given of a prompt, with a mark where its beginning was cut."""
    cut = line.get("prompt_cut", "")  # runs of version 0.1 did not write it
    return f"[cut: {len(cut)} characters] {line['prompt'][len(cut) :]}" if cut else line["prompt"]


def drawn_edit(example: Mapping[str, Any] | None, *, embedded_task: bool) -> dict[str, Any] | None:
    """The edit of an analysis as two rows of tokens; None where there is none."""
    if example is None:
        return None
    rows = []
    for side, change in (("rejected", "removed"), ("revised", "added")):
        answer = example[side]
        words = _words(example["prompt"], answer["text"], answer["tokens"]) if embedded_task else []
        last = {word: index for index, word in enumerate(words) if word is not None}
        gold = {index: word.gold for word, index in last.items()}
        columns = zip(answer["tokens"], answer["labels"], answer["rewards"], strict=True)
        tokens = [
            DrawnToken(text.replace("\n", "↵"), "kept" if label == "neutral" else change, reward, gold.get(index))
            for index, (text, label, reward) in enumerate(columns)
        ]
        rows.append((side, tokens))
    return {"prompt": example["prompt"], "rows": rows, "has_gold": embedded_task}


def _figures(line: Mapping[str, Any], embedded_task: bool) -> dict[str, list[float | None]]:
    """Each measure's values of one sample, None where a token has none."""
    count = len(line["tokens"])
    # A rollout scored without a reward has no such list.
    found = {name: [*line[name], *[None] * (count - len(line[name]))] for name in MEASURES}
    if not embedded_task:
        return found
    words = _words(line["prompt"], line["response"], line["tokens"])
    return {**found, "gold": [None if word is None else word.gold for word in words]}


def _words(prompt: str, text: str, tokens: Sequence[str]) -> list[GoldWord | None]:
    """The word of the embedded language that each token writes a part of; the same object for one word's tokens."""
    found: list[GoldWord | None] = [None] * len(tokens)
    try:
        words = embedded.gold(prompt, text).words
    except DataError:  # a prompt of the user's own names no topic of the language
        return found
    start = 0
    for index, token in enumerate(tokens):
        end = start + len(token)
        first = end - len(token.lstrip())
        found[index] = next((word for word in words if word.start < end and first < word.end), None)
        start = end
    return found


def _scale(values: Sequence[float]) -> float | None:
    """The size at which a colour is full: the 98th percentile of |x|, so that one outlier does not pale the rest."""
    sizes = sorted(abs(x) for x in values)
    if not sizes or sizes[-1] == 0:
        return None
    return sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))] or sizes[-1]


def _coloured(
    tokens: Sequence[str], figures: Mapping[str, Sequence[float | None]], *, scales: Mapping[str, float | None]
) -> list[ColouredToken]:
    shown, titles = [], measures(True)
    for index, text in enumerate(tokens):
        colours, words = {}, []
        for name, scale in scales.items():
            value = figures[name][index]
            if value is not None:
                words.append(f"{titles[name][0].lower()} {number(value)}")
                if scale:
                    colours[name] = css(value / scale)
        line = text.replace("\n", "↵")
        shown.append(ColouredToken(line, "\n" in text, colours, f"“{line.strip()}”: {', '.join(words)}"))
    return shown


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: a fixed number of decimals, a real minus sign, a dash where there is none."""
    if value is None:
        return "–"  # noqa: RUF001
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\u2212")

"""The answers that every trainer's test scores, and the tensor that each trainer must end up with.

``python -m tests.hosts.golden`` writes ``golden.json``. It is plain arithmetic in float64 and imports nothing of tlcr:
``p(positive) - p(negative)`` after the temperature, at the token itself, 0 where the mask is 0. The places of ``hosts``
come from what each trainer's own code does with index t.

The answers: prompts of different lengths, ends of sequence, answers that the limit cut, tokens of tools, one answer
without a token, the padding's id as a sampled token. No two tokens have the same logits, so that a shift shows.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("golden.json")
PAD, EOS, TEMPERATURE = 0, 2, 1.7

PROMPTS = [[5, 11, 7], [9, 4, 4, 13, 21, 6], [8]]
ANSWERS: list[tuple[list[int], list[int]]] = [  # ids and mask, two answers to each prompt
    ([12, 30, 17, 25, EOS], [1, 1, 1, 1, 1]),
    ([14, 0, 33, 19, 12, 12, 28], [1, 1, 1, 1, 1, 1, 1]),  # cut: no end of sequence; the padding's id was sampled
    ([22, 35, 41, 42, 16, EOS], [1, 1, 0, 0, 1, 1]),  # 41 and 42 are a tool's
    ([], []),
    ([EOS], [1]),
    ([44, 18, 23, 10], [0, 1, 1, 1]),  # the tool speaks first, and the limit cuts
]

Rows = list[list[float]]


def reward(logits: Sequence[float], temperature: float) -> float:
    """p(positive) - p(negative) of [negative, positive] or [negative, neutral, positive]."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    return (weights[-1] - weights[0]) / sum(weights)


def padded(rows: Sequence[Sequence[float]], *, left: bool = False, width: int | None = None) -> Rows:
    width = max(map(len, rows)) if width is None else width
    fills = [[0.0] * (width - len(row)) for row in rows]
    return [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]


def to_go(rewards: Sequence[float]) -> list[float]:
    """The sum of this reward and all after it."""
    return [math.fsum(rewards[t:]) for t in range(len(rewards))]


def centred_to_go(rewards: Rows, masks: list[list[int]], group: list[int]) -> Rows:
    """Reward-to-go less its mean over the group, where an answer that has ended counts as 0; 0 where masked."""
    width = max(map(len, rewards))
    going = padded([to_go(row) for row in rewards], width=width)
    result = []
    for i, mask in enumerate(masks):
        mates = [k for k, other in enumerate(group) if other == group[i]]
        means = [math.fsum(going[k][t] for k in mates) / len(mates) for t in range(width)]
        result.append([going[i][t] - means[t] if t < len(mask) and mask[t] else 0.0 for t in range(width)])
    return result


def hosts(prompts: list[list[int]], rewards: Rows, masks: list[list[int]], group: list[int]) -> dict[str, Any]:
    """What must lie in each trainer's tensor. Axes: B rows, T answer, L whole row, A = L - 1."""
    widest_prompt = max(map(len, prompts))
    rows = [[0.0] * len(prompt) + row for prompt, row in zip(prompts, rewards, strict=True)]
    return {
        # prompts padded left, completions right: column t is completion token t
        "trl": {"rewards_BT": padded(rewards), "advantages_BT": centred_to_go(rewards, masks, group)},
        # one row a sample, without padding: response token t
        "verl": {"rm_scores": rewards, "rm_scores_BT": padded(rewards)},
        # the action in column p - 1 emits the token at p of the whole row; padded right
        "openrlhf": {"token_rewards_BA": padded([row[1:] for row in rows])},
        # lists, as the generator returns them; in the batch the answers end in the last column
        "skyrl": {"rewards": rewards, "rewards_BT": padded(rewards, left=True)},
        "slime": {"rewards": rewards},
        # whole rows padded right, of which the columns from the shortest prompt's end on are kept
        "swift": {"rewards_BT": [row[min(map(len, prompts)) :] for row in padded(rows)]},
        # what a client that sends rows padded left, answers padded right, reads back
        "left_and_right": {"rewards_BL": [[0.0] * widest_prompt + row for row in padded(rewards)]},
    }


def build() -> dict[str, Any]:
    draw = random.Random(2407_16574)
    prompts = [PROMPTS[i // 2] for i in range(len(ANSWERS))]
    items = []
    for prompt, (ids, mask) in zip(prompts, ANSWERS, strict=True):
        logits = [[round(draw.uniform(-3, 3), 3) for _ in range(2)] for _ in range(len(prompt) + len(ids))]
        scored = logits[len(prompt) :]
        rewards = [reward(pair, TEMPERATURE) if counts else 0.0 for pair, counts in zip(scored, mask, strict=True)]
        items.append({"prompt_ids": prompt, "response_ids": ids, "mask": mask, "logits": logits, "rewards": rewards})
    group = [i // 2 for i in range(len(items))]
    rewards, masks = [item["rewards"] for item in items], [item["mask"] for item in items]
    return {
        "written_by": "python -m tests.hosts.golden",
        "labels": ["negative", "positive"],
        "temperature": TEMPERATURE,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "group": group,
        "items": items,
        "hosts": hosts(prompts, rewards, masks, group),
    }


def load() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return golden


class GoldenScorer:
    """A Scorer that knows the golden answers by their ids, and no other."""

    def __init__(self, shift: int = 0) -> None:
        """``shift`` reads the logits of so many tokens later (or, below 0, earlier): the mistake to be caught."""
        golden = load()
        self.asked = 0
        self.rewards = {}
        for item in golden["items"]:
            start, scored = len(item["prompt_ids"]), []
            for t, counts in enumerate(item["mask"]):
                row, column = item["logits"], start + t + shift
                inside = 0 <= column < len(row)
                scored.append(reward(row[column], golden["temperature"]) if counts and inside else 0.0)
            self.rewards[tuple(item["prompt_ids"]), tuple(item["response_ids"])] = scored

    def token_rewards(self, items: Sequence[Any]) -> list[list[float]]:
        self.asked += 1
        return [self.rewards[tuple(map(int, i.prompt_ids)), tuple(map(int, i.response_ids))] for i in items]


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"


def main() -> None:
    text = re.sub(r"\[\s*([-\d.e,\s]*?)\s*\]", _on_one_line, json.dumps(build(), indent=1))
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

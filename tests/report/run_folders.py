"""A run's folder with made-up figures, in the formats that the recipes write."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

from tlcr.config.trials import folder_of

NASTY = '<script>alert("x")</script> & <b>'

MACHINE = {"processor": "A CPU", "instructions": "AVX2", "threads": 2, "processes": 1, "gpu": None}
"""As `tlcr.training.checkpoint.machine` describes one."""


def evaluation(gold: float | None, kl: float, length: float = 20.0) -> dict[str, Any]:
    """The "before" or "after" object of evaluation.json."""
    return {
        "gold_per_token": gold,
        "gold_per_answer": None if gold is None else gold * length,
        "proxy_per_token": 2 * kl,
        "proxy_per_answer": 2 * kl * length,
        "kl_per_token": kl,
        "kl_per_answer": kl * length,
        "exact_kl_per_token": kl,
        "entropy": 2.0 - kl,
        "length": length,
        "ended_share": 0.9,
        "answers": 256,
        "standard_errors": {"gold_per_token": 0.01},
    }


def write_run(
    folder: Path,
    arms: dict[str, float],
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    updates: int = 60,
    scored: bool = True,
    answers: int = 3,
    kl_coefs: tuple[float, ...] = (),
) -> Path:
    """arms: name to how much gold a nat of KL buys there. Seeds differ a little; half the coefficient, twice the KL."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "output_dir: runs/made-up\nmodel:\n  path: embedded\narms:\n" + "".join(f"- name: {name}\n" for name in arms)
    )
    for arm_number, (arm, slope) in enumerate(arms.items()):
        for seed, kl_coef in itertools.product(seeds, kl_coefs or (None,)):
            own = folder / "ppo" / folder_of(arm, kl_coef if len(kl_coefs) > 1 else None, seed)
            own.mkdir(parents=True)
            rng = random.Random(f"{arm} {seed}")
            reach = max(0.9 - 0.12 * arm_number, 0.05) * (1.0 if kl_coef is None else min(kl_coefs) / kl_coef)
            rows, last = [], evaluation(None, 0.0)
            for update in range(updates + 1):
                kl = reach * update / updates
                gold = -0.05 + slope * kl**0.8 + 0.01 * (seed - 1) if scored else None
                row = {
                    "step": update,
                    "time": 0.0,
                    "reward/mean_score": slope * kl + rng.gauss(0, 0.02),
                    "kl/per_token": kl + rng.gauss(0, 0.01),
                    "length/mean": 22 + 4 * kl + rng.gauss(0, 0.4),
                    "policy/entropy": 2.2 - kl + rng.gauss(0, 0.02),
                }
                if update % 10 == 0 or update == updates:
                    last = evaluation(gold, kl, 22 + 4 * kl)
                    row |= {f"eval/{k}": v for k, v in last.items() if isinstance(v, float)}
                rows.append(row)
            (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            before = evaluation(-0.05 + 0.01 * (seed - 1) if scored else None, 0.0, 22)
            (own / "evaluation.json").write_text(json.dumps({"before": before, "after": last}))
            record = {"versions": {"tlcr": "0.1.0", "torch": "2.13.0"}, "machine": MACHINE | {"threads": 1}}
            (own / "done.json").write_text(json.dumps(record))
            lines = []
            for index in range(answers):
                for when in ("before", "after"):
                    tokens = [
                        " va",
                        " pi",
                        "bo",
                        " ne",
                        f" {NASTY}",
                        " lu",
                        "ti",
                        ".\n",
                        " sho",
                        " mara",
                        ".",
                        "<|end|>",
                    ]
                    lines.append(
                        {
                            "when": when,
                            "prompt": f"User: what of {NASTY} {index}?\nAssistant:",
                            "response": "".join(tokens[:-1]),
                            "tokens": tokens,
                            "reward": [rng.uniform(-1, 1) for _ in tokens],
                            "advantage": [rng.gauss(0, 1) for _ in tokens],
                            "value": [math.sin(i / 2) for i in range(len(tokens))],
                            "kl": [rng.gauss(0.3, 0.5) if when == "after" else 0.0 for _ in tokens],
                            "gold": 1.25 * index if scored else None,
                        }
                    )
            (own / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_stages(folder: Path) -> None:
    """Discriminator, reward model, SFT and labels."""
    bins = [
        {
            "lower": i / 15,
            "upper": (i + 1) / 15,
            "tokens": 400 // (1 + abs(i - 7)),
            "confidence": (i + 0.5) / 15,
            "target": min(1.0, (i + 0.8) / 15),
        }
        for i in range(15)
    ]
    discriminator = {
        "metrics": {
            "tokens": 5000.0,
            "edited_share": 0.16,
            "auc_positive_negative": 0.8765,
            "auc_negative_rest": 0.78,
            "auc_positive_rest": 0.7,
            "f1": 0.81,
            "pairwise_accuracy": 0.9,
            "ece_before": 0.04,
            "ece_after": None,
        },
        "undefined": {"ece_after": "it needs two held-out pairs with tokens"},
        "reliability": {"before": bins, "after": [b | {"target": b["confidence"]} for b in bins]},
    }
    for stage, metrics in (
        ("discriminator", {"auc_positive_negative": 0.8765}),
        ("reward_model", {"loss": 0.4321, "eval/accuracy": 0.7123}),
        ("sft", {"loss": 1.8, "eval/loss": 1.9}),
    ):
        (folder / stage).mkdir()
        record = {"metrics": metrics, "seconds": 12.5, "versions": {"transformers": "5.23.0"}, "machine": MACHINE}
        (folder / stage / "done.json").write_text(json.dumps(record))
    (folder / "discriminator" / "evaluation.json").write_text(json.dumps(discriminator))
    (folder / "labels").mkdir()
    statistics = {
        "pairs": 2000,
        "rejected_tokens": 50_000,
        "revised_tokens": 48_000,
        "negative_share": 0.081,
        "neutral_share": 0.84,
        "positive_share": 0.079,
        "edited_share": 0.16,
        "unedited_pairs": 12,
        "truncated_pairs": 0,
        "edited_share_histogram": [700, 800, 300, 120, 50, 20, 10, 0, 0, 0],
    }
    (folder / "labels" / "statistics.json").write_text(json.dumps(statistics))

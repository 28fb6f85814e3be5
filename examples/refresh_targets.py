"""What edits say of a word, as the policy that wrote it gets better: why self-training makes rewards smaller.

    python -m examples.refresh_targets runs/reward_comparison --arm continuous

A reviser's edits say what to change. A good word is positive where the reviser puts it, and neutral where it stood
already, so its mean target is 1/2 plus half the share of such words that the reviser put there, less half the share
that it took away. The better a policy, the fewer good words are left to put. For the edits of the data, the SFT model
and every trained policy of an arm, on the embedded task, this prints the mean target of good and of bad words: twice
the distance of the two is what a discriminator that fits them perfectly would pay a good word above a bad one.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.measures import figure
from examples.study import command, markdown
from tlcr.config.schema import ModelConfig
from tlcr.data import embedded
from tlcr.data.labels import label_pair
from tlcr.errors import DataError
from tlcr.evaluation.drift import judge
from tlcr.experiment.opening import reopen_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.models.loading import load_causal_lm
from tlcr.ops import TokenLabel
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.report.results import mean_over_seeds, read_runs
from tlcr.types import EditPair

ANSWERS = 512
TARGETS = {TokenLabel.NEGATIVE: 0.0, TokenLabel.NEUTRAL: 0.5, TokenLabel.POSITIVE: 1.0}


class Said(NamedTuple):
    """Of some edits: the share of answers that were edited, and the mean targets of good and bad words' tokens."""

    edited: float
    good: float
    bad: float


def said_by(edits: Sequence[EditPair], run: RunFolder) -> Said:
    """What the edits say of the words of both sides, good and bad by their value in context.

    Args:
        edits: revised answers.
        run: its tokenizer, and the settings by which it labels.

    Returns:
        The means over all tokens of such words.

    Raises:
        DataError: no word of the answers is good, or none is bad.
    """
    data = run.cfg.data
    targets: dict[bool, list[float]] = {True: [], False: []}
    for edit in edits:
        pair = label_pair(
            edit,
            run.tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_answer_tokens=sys.maxsize,
            end_of_sequence=run.cfg.labels.end_of_sequence,
        )
        for side, text in ((pair.rejected, edit.rejected), (pair.revised, edit.revised)):
            words = [(word.start, word.end, word.value) for word in embedded.gold(edit.prompt, text).words]
            said = [TARGETS[TokenLabel(label)] for label in side.labels]
            ids, context = side.encoded.answer_ids, side.encoded.ids[: side.encoded.answer_start]
            for token in judge(words, text, ids, said, context=context, tokenizer=run.tokenizer):
                targets[token.good].append(token.confidence)
    if not all(targets.values()):
        raise DataError("the answers have no good words, or no bad ones: nothing can be compared")
    good, bad = (sum(targets[which]) / len(targets[which]) for which in (True, False))
    return Said(sum(edit.rejected != edit.revised for edit in edits) / len(edits), good, bad)


def of_policy(source: ModelConfig, run: RunFolder) -> Said:
    """What the task's reviser says of a policy's answers to prompts of training."""
    generator, rng = seeded_generator("refresh targets", run.cfg.seed), random.Random(run.cfg.seed)
    rollout = generate(
        load_causal_lm(source),
        run.tokenizer,
        run.prompts.train[:ANSWERS],
        run.cfg.rollout,
        max_prompt_tokens=run.cfg.data.max_prompt_tokens,
        generator=generator,
    )
    answers = zip(rollout.prompts, rollout.responses, strict=True)
    return said_by([EditPair(str(i), p, r, embedded.revise(p, r, rng)) for i, (p, r) in enumerate(answers)], run)


def row(name: str, kls: Sequence[float], said: Iterable[Said]) -> list[str]:
    found = list(said)
    columns = [[each.edited for each in found], [each.good for each in found], [each.bad for each in found]]
    columns.append([2 * (each.good - each.bad) for each in found])
    return [name, *(figure(mean_over_seeds(values)) for values in [kls, *columns])]


def look(folder: Path, arm: str) -> None:
    """Prints the table of a run's arm. Raises DataError where there is none."""
    whole = reopen_run(folder)
    if not whole.embedded:
        raise DataError(f"{folder} is no run of the embedded task, the only one that knows each word's value")
    runs = whole.per_seed
    ends = [end for end in read_runs(folder) if end.arm == arm]
    if not ends:
        raise DataError(f"{folder} has no trained policy of an arm {arm!r}; name one with --arm")
    models = whole.model_folders  # one where seeds share their models
    rows = [row("edits of the data", [], [said_by(run.edits.train[:ANSWERS], run) for run in models])]
    rows.append(row("SFT model", [0.0] * len(models), [of_policy(run.policy_source, run) for run in models]))
    for coef in sorted({end.kl_coef for end in ends}, key=lambda coef: -(coef or 0.0)):
        own = [end for end in ends if end.kl_coef == coef]
        said = [
            of_policy(whole.cfg.model.saved_in(folder / "ppo" / end.folder / "policy"), runs[end.seed]) for end in own
        ]
        name = f"{arm}, {coef or 'its'} coefficient"
        rows.append(row(name, [end.after["kl_per_token"] for end in own], said))
    head = ["answers of", "KL, nats per token", "edited", "good words' target", "bad words'", "twice the distance"]
    sys.stdout.write(markdown(head, rows) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the output_dir of a run of the embedded task")
    parser.add_argument("--arm", default="continuous", help="the arm whose policies are looked at")
    options = parser.parse_args(arguments)
    return command(lambda: look(options.run, options.arm))


if __name__ == "__main__":
    raise SystemExit(main())

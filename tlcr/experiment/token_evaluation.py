"""``tlcr evaluate-tokens``: do token rewards fall where people marked errors?

Every arm of a config rewards answers in which people have marked errors. The negative of a good reward finds the
marked tokens. Nothing is generated and no policy is trained: the models that the rewards need must exist.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import WHOLE_ANSWER_KINDS, DataConfig, RunConfig
from tlcr.config.trials import arms_of
from tlcr.data.readers import read_marked_answers
from tlcr.errors import ConfigError, DataError
from tlcr.evaluation.span_metrics import (
    Figure,
    MarkedTokens,
    SpanEvaluation,
    best_threshold,
    difference,
    evaluate_spans,
    is_in_span,
)
from tlcr.experiment.frozen_models import load_frozen_models, load_reference
from tlcr.experiment.opening import config_kept_if_refused, open_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.files import write_json, write_json_lines
from tlcr.report.colours import coloured
from tlcr.rewards.composition import compose_rewards
from tlcr.text.padding import pad_left, pad_right
from tlcr.text.tokenization import answer_spans, encode_answers, token_pieces
from tlcr.text.truncation import cut_beginning, note_cuts
from tlcr.training.distributed import on_main_process
from tlcr.training.progress import Progress
from tlcr.types import EncodedAnswer, ErrorSpan, MarkedAnswer, Rollout

__all__ = [
    "MarkedRow",
    "error_scores",
    "evaluate_tokens",
    "mark",
    "marked_tokens",
    "print_evaluations",
    "token_rewards",
]

logger = logging.getLogger("tlcr")

WRITTEN = "token_evaluation"
"""In the run's folder: .json has the figures, .jsonl every token."""


# ---- marked tokens


@dataclass(frozen=True)
class MarkedRow:
    """A marked answer as the policy's tokens.

    characters: for each answer token, its characters in the response; empty for the end of sequence, which cannot be
    marked and does not count. kinds: for each token, the kinds of the errors that it belongs to.
    """

    answer: MarkedAnswer
    encoded: EncodedAnswer
    characters: tuple[tuple[int, int], ...]
    kinds: tuple[tuple[str, ...], ...]

    @property
    def is_counted(self) -> tuple[bool, ...]:
        return tuple(start < end for start, end in self.characters)


def mark(answers: Sequence[MarkedAnswer], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[MarkedRow]:
    """The answers as tokens, cut as `data` says, each with the errors that `span_metrics.is_in_span` puts it in."""
    encoded = encode_answers(
        tokenizer,
        [answer.prompt for answer in answers],
        [answer.response for answer in answers],
        max_prompt_tokens=data.max_prompt_tokens,
        max_answer_tokens=data.max_answer_tokens,
    )
    rows = [_mark(answer, row, tokenizer) for answer, row in zip(answers, encoded, strict=True)]
    note_cuts([(row.answer.prompt, [row.encoded]) for row in rows], data, stage="marked answers")
    return rows


def _mark(answer: MarkedAnswer, encoded: EncodedAnswer, tokenizer: PreTrainedTokenizerBase) -> MarkedRow:
    characters = answer_spans(tokenizer, answer.prompt, answer.response, encoded)
    if encoded.complete:
        characters.append((len(answer.response),) * 2)
    by_kind: dict[str, list[ErrorSpan]] = {}
    for span in answer.spans:
        by_kind.setdefault(span.label, []).append(span)
    # A token of which two kinds cover half each is an error of both; if they cover a third each, it is of neither.
    kinds = tuple(
        tuple(kind for kind, spans in by_kind.items() if is_in_span(*place, answer.response, spans))
        for place in characters
    )
    return MarkedRow(answer, encoded, tuple(characters), kinds)


def marked_tokens(rows: Sequence[MarkedRow]) -> MarkedTokens:
    """All counted tokens of the rows, in their order."""
    counted = [
        (number, kinds)
        for number, row in enumerate(rows)
        for kinds, is_counted in zip(row.kinds, row.is_counted, strict=True)
        if is_counted
    ]
    labels = sorted({kind for _, kinds in counted for kind in kinds})
    return MarkedTokens(
        error_N=np.array([bool(kinds) for _, kinds in counted], dtype=bool),
        kinds={label: np.array([label in kinds for _, kinds in counted], dtype=bool) for label in labels},
        answer_N=np.array([number for number, _ in counted], dtype=np.int64),
        answers=len(rows),
    )


# ---- the rewards of an arm


def token_rewards(run: RunFolder, cfg: RunConfig, rows: Sequence[MarkedRow], *, label: str) -> list[list[float]] | None:
    """The reward of `cfg.reward` for each token of each answer, the end of sequence included, as PPO would get it.

    KL, centring, length penalties and rewards for whole answers are left out, because they do not concern single
    tokens. None for a reward that has no other part. Raises ConfigError where the reward's model is missing.
    """
    if cfg.reward.kind in WHOLE_ANSWER_KINDS:
        return None
    # No value model is needed, nor a frozen model from which only the value model starts, nor the score at the end.
    reward = replace(cfg.reward, sequence_coef=0.0, centre=False, overlong_buffer=None)
    cfg = replace(cfg, reward=reward, ppo=replace(cfg.ppo, value_model="shared"))
    frozen = load_frozen_models(run, cfg)
    source = frozen.source(run, cfg, load_reference(run) if cfg.uses_dpo(reward) else None, cfg.seed)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].encoded.ids))
    rewards: dict[int, list[float]] = {}
    with Progress(label, len(rows)) as progress:
        for first in range(0, len(rows), cfg.rollout.batch_size):
            chosen = order[first : first + cfg.rollout.batch_size]
            rollout = _as_rollout([rows[i] for i in chosen], run)
            parts = compose_rewards(
                source(rollout),
                rollout.mask_BT,
                ended_B=rollout.ended_B,
                kl_BT=None,
                kl_coef=0.0,
                cfg=reward,
                temperature=frozen.temperature,
                centre=None,
            ).parts
            if "dense" not in parts:
                return None
            for i, reward_T, mask_T in zip(chosen, parts["dense"].cpu(), rollout.mask_BT.cpu(), strict=True):
                rewards[i] = reward_T[mask_T].tolist()
            progress.on_step(min(first + cfg.rollout.batch_size, len(rows)), {})
    return [rewards[i] for i in range(len(rows))]


def _as_rollout(rows: Sequence[MarkedRow], run: RunFolder) -> Rollout:
    padding = run.tokenizer.pad_token_id
    encoded = [row.encoded for row in rows]
    prompt_ids_BP, prompt_mask_BP = pad_left([row.ids[: row.answer_start] for row in encoded], padding)
    response_ids_BT, mask_BT = pad_right([row.answer_ids for row in encoded], padding)
    tensors = (prompt_ids_BP, prompt_mask_BP, response_ids_BT, mask_BT, torch.tensor([r.complete for r in encoded]))
    return Rollout(
        tuple(row.answer.prompt for row in rows),
        tuple(row.answer.response for row in rows),
        *(tensor.to(run.device) for tensor in tensors),
    )


def error_scores(rows: Sequence[MarkedRow], rewards: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The negative of the rewards of all counted tokens: high where an error is likely, as `evaluate_spans` wants."""
    return -np.array(
        [
            value
            for row, values in zip(rows, rewards, strict=True)
            for value, is_counted in zip(values, row.is_counted, strict=True)
            if is_counted
        ],
        dtype=np.float64,
    )


# ---- the command


def evaluate_tokens(cfg: RunConfig, *, spans: str, threshold_spans: str | None = None, show: int = 0) -> Path:
    """Evaluates every arm on the answers in `spans`; prints tables and the first `show` answers, and writes both.

    threshold_spans: marked answers to choose each arm's threshold on, which must not be in `spans`. Raises
    ConfigError or DataError.
    """
    with config_kept_if_refused(cfg):
        return _evaluate_tokens(cfg, spans, threshold_spans, show)


def _evaluate_tokens(cfg: RunConfig, spans: str, threshold_spans: str | None, show: int) -> Path:
    run = open_run(cfg, resume=False, whole=False)
    rows = _read(spans, run)
    tuned = [] if threshold_spans is None else _read(threshold_spans, run)
    _check_apart(rows, tuned)
    tokens = marked_tokens(rows)
    evaluations: dict[str, SpanEvaluation] = {}
    rewards: dict[str, list[list[float]]] = {}
    skipped: list[str] = []
    for folder in run.model_folders:
        for arm in arms_of(cfg):
            name = arm.name if len(run.model_folders) == 1 else f"{arm.name} seed-{folder.cfg.seed}"
            paid = token_rewards(folder, replace(folder.cfg, reward=arm.reward), [*rows, *tuned], label=name)
            if paid is None:
                skipped.append(f"{name} (reward.kind {arm.reward.kind})")
                continue
            rewards[name], for_threshold = paid[: len(rows)], paid[len(rows) :]
            threshold = None
            if tuned:
                threshold = best_threshold(marked_tokens(tuned).error_N, error_scores(tuned, for_threshold))
            evaluations[name] = evaluate_spans(tokens, error_scores(rows, rewards[name]), threshold=threshold)

    if not evaluations:
        raise ConfigError(
            "every arm pays for whole answers only, so that there is no token reward to evaluate: "
            f"{', '.join(skipped)}; name an arm that rewards tokens, such as reward.kind continuous"
        )
    if skipped:
        logger.warning("left out, because they pay for whole answers only: %s", ", ".join(skipped))

    def deliver() -> None:
        _write(run, rows, rewards, evaluations, {"spans": spans, "threshold_spans": threshold_spans})
        console = Console(highlight=False)
        for name, of_answers in rewards.items():
            for row, values in list(zip(rows, of_answers, strict=True))[:show]:
                _show(name, row, values, run.tokenizer, console)
        print_evaluations(evaluations, console)
        written = run.path / WRITTEN
        console.print(
            f"wrote {written}.json (all figures) and {written}.jsonl (each token)", soft_wrap=True, markup=False
        )

    on_main_process(deliver)
    return run.path / f"{WRITTEN}.json"


def _read(source: str, run: RunFolder) -> list[MarkedRow]:
    read = read_marked_answers(source, run.cfg.data, run.tokenizer, rendered_at=run.started)
    return mark(read.records, run.tokenizer, run.cfg.data)


def _check_apart(rows: Sequence[MarkedRow], tuned: Sequence[MarkedRow]) -> None:
    texts = [{(row.answer.prompt, row.answer.response) for row in some} for some in (rows, tuned)]
    if shared := len(texts[0] & texts[1]):
        raise DataError(
            f"{shared} answers are both in --spans and in --threshold-spans; a threshold chosen on the answers that "
            "it is measured on looks better than it is: take them out of one of the two"
        )


def _write(
    run: RunFolder,
    rows: Sequence[MarkedRow],
    rewards: Mapping[str, Sequence[Sequence[float]]],
    evaluations: Mapping[str, SpanEvaluation],
    sources: Mapping[str, str | None],
) -> None:
    found: dict[str, Any] = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    cut = sum(not row.encoded.complete for row in rows)
    write_json(run.path / f"{WRITTEN}.json", {**sources, "answers_cut": cut, "rewards": found})
    lines = (
        {
            "id": row.answer.id,
            "prompt": row.answer.prompt,
            "prompt_cut": cut_beginning(run.tokenizer, row.answer.prompt, row.encoded.answer_start),
            "response": row.answer.response,
            "spans": [asdict(span) for span in row.answer.spans],
            "tokens": _pieces(row, run.tokenizer),
            "kinds": row.kinds,
            "rewards": {name: of_answers[number] for name, of_answers in rewards.items()},
        }
        for number, row in enumerate(rows)
    )
    write_json_lines(run.path / f"{WRITTEN}.jsonl", lines)


# ---- output


def _pieces(row: MarkedRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    encoded = row.encoded
    return token_pieces(tokenizer, encoded.answer_ids, context=encoded.ids[: encoded.answer_start])


def _show(
    name: str, row: MarkedRow, rewards: Sequence[float], tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    console.print(f"[bold]{escape(name)}[/bold] [dim]{escape(row.answer.prompt)}[/dim]", soft_wrap=True)
    marked = [bool(kinds) for kinds in row.kinds]
    console.print(coloured(_pieces(row, tokenizer), rewards, underlined=marked), soft_wrap=True)
    console.print()


def print_evaluations(evaluations: Mapping[str, SpanEvaluation], console: Console | None = None) -> None:
    """The main figures of several scores of the same tokens, and the ROC-AUC of each kind of error where they differ.

    F1 tuned is at the chosen threshold. The last column has the differences in ROC-AUC to the first score.
    """
    console = console or Console(highlight=False)
    (_, first), *others = evaluations.items()
    counts, share = first.counts, _number(first.figures["share"].value)
    # Few columns, so that it fits into 80 characters without cutting a figure.
    columns = {"ROC-AUC": "auc", "in answers": "auc_per_answer", "F1 at 0": "f1"}
    if any(evaluation.threshold is not None for evaluation in evaluations.values()):
        columns["F1 tuned"] = "f1_at_threshold"
    table = _table(
        f"{counts['errors']} of {counts['tokens']} tokens ({share}) are marked, in {counts['answers']} answers",
        [*columns, *(["AUC - 1st"] if others else [])],
        no_wrap=True,
    )
    for name, evaluation in evaluations.items():
        cells = [_figure(evaluation.figures.get(column)) for column in columns.values()]
        if others:
            cells.append("" if evaluation is first else _figure(difference(evaluation, first, "auc"), sign="+"))
        table.add_row(escape(name), *cells)
    table.caption, table.caption_justify = "Below each figure: its 95% interval, over answers.", "left"
    console.print(table)

    kinds = sorted({name.partition("/")[2] for name in first.figures if "/" in name})
    if len(kinds) < 2:
        return
    shares = [f"{kind}\n{_number(first.figures[f'share/{kind}'].value)}" for kind in kinds]
    by_kind = _table("ROC-AUC of each kind's tokens (share) against those in no span", shares)
    for name, evaluation in evaluations.items():
        by_kind.add_row(escape(name), *(_figure(evaluation.figures[f"auc/{kind}"]) for kind in kinds))
    console.print(by_kind)


def _table(title: str, headings: Sequence[str], *, no_wrap: bool = False) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("reward", overflow="fold", min_width=10)
    for heading in headings:
        table.add_column(escape(heading), justify="right", overflow="fold", no_wrap=no_wrap)
    return table


def _number(value: float | None, sign: str = "", digits: int = 3) -> str:
    return "-" if value is None else format(value, f"{sign}.{digits}f")


def _figure(figure: Figure | None, sign: str = "") -> str:
    """The figure, and below it its interval."""
    if figure is None or figure.value is None:
        return "-"
    return f"{_number(figure.value, sign)}\n{_number(figure.low, sign, 2)}..{_number(figure.high, sign, 2)}"

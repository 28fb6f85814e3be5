"""Baselines for a discriminator on answers to questions: simpler scores of the same tokens, with the same evaluation.

    python -m examples.qa_feedback.baselines examples/qa_feedback/config.yaml --data runs/qa_feedback_data

needs what prepare.py wrote and the discriminator that `tlcr train discriminator` trained with that config. It prints
the tables of `tlcr evaluate-tokens` and writes baselines.json into the run's folder.

discriminator       the reward of a token, negated
constant            the same for every token: how many of them are errors
length              logistic regression on where a token stands: its number, its place in the answer from 0 to 1, and
                    the answer's length
lexical             logistic regression on which word it belongs to and whether question or passages have that word
lexical and length  on both
surprise            logistic regression on -log p of the token by the language model before any training
probe               logistic regression on what that model's last layer holds at the token, nothing of it trained
saliency            logistic regression on gradient times input: how the discriminator's mean log-odds over the answer
                    change with the token's embedding, times that embedding
attention           logistic regression on the attention that the answer's last token pays to the token in the
                    discriminator's last layer, the mean over heads
corrections         the answers' own corrections: a token is an error if the annotator removed it. Not a method, but
                    the agreement of edits and marked errors, which come from the same people

Training is the same for all: whether people took a token out of the answers that the discriminator was trained on. None
of them sees a marked error, except that each chooses its threshold on spans_threshold.jsonl, as the discriminator does.
Regressions choose the strength of their penalty among those answers, by ROC-AUC in five folds of answers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from examples.study import command
from tlcr.config.loading import load_config
from tlcr.data.labels import label_pairs
from tlcr.data.readers import read_marked_answers
from tlcr.errors import DataError
from tlcr.evaluation.span_metrics import best_threshold, difference, evaluate_spans
from tlcr.experiment.frozen_models import load_reference
from tlcr.experiment.opening import open_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.experiment.token_evaluation import (
    MarkedRow,
    error_scores,
    mark,
    marked_tokens,
    print_evaluations,
    token_rewards,
)
from tlcr.files import write_json
from tlcr.models.discriminator import load_discriminator
from tlcr.models.heads import backbone
from tlcr.models.logits import answer_logprobs
from tlcr.text.padding import pad_right
from tlcr.types import EditPair, MarkedAnswer

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Features = dict[str, float]
OfAnswer = Sequence[Features] | Floats
"""The features of each evaluated token of an answer: by name, or as a row of numbers."""

WORD = re.compile(r"\w+|[^\w\s]")
ENOUGH_FOR_A_SIGN = 60
"""Answers that a regression on one number is fitted on: of its coefficient only the sign matters to the ranking (ours).
"""
PENALTIES = (0.0003, 0.003, 0.03, 0.3)


@dataclass(frozen=True)
class Source:
    """The question of an answer, and the passages that it may use."""

    question: str
    passages: Sequence[str]


def read_sources(folder: Path) -> dict[str, Source]:
    """The question and the passages of every record that prepare.py wrote, by the record's id."""
    sources = {}
    for name in ("edits.jsonl", "spans.jsonl", "spans_threshold.jsonl"):
        for line in filter(None, (folder / name).read_text(encoding="utf-8").split("\n")):
            record = json.loads(line)
            sources[record["id"]] = Source(record["question"], record["passages"])
    return sources


def places(row: MarkedRow) -> list[int]:
    """Where the evaluated tokens stand in the row's ids."""
    return [row.encoded.answer_start + k for k, is_counted in enumerate(row.is_counted) if is_counted]


def words_of(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def length_features(row: MarkedRow) -> list[Features]:
    """For each evaluated token: the number of tokens before it, their share of the answer, and the answer's length."""
    tokens = sum(row.is_counted)
    return [{"number": float(k), "share": k / tokens, "tokens": float(tokens)} for k in range(tokens)]


def lexical_features(row: MarkedRow, source: Source) -> list[Features]:
    """For each evaluated token: the word of its first letter, and whether question or passages have that word."""
    text = row.answer.response
    word_at = {k: match[0].lower() for match in WORD.finditer(text) for k in range(*match.span())}
    question, passages = words_of(source.question), words_of(" ".join(source.passages))
    features = []
    for (start, end), is_counted in zip(row.characters, row.is_counted, strict=True):
        if is_counted:
            word = next((word_at[k] for k in range(start, end) if k in word_at), " ")
            among = {"in question": float(word in question), "in passages": float(word in passages)}
            features.append({f"word {word}": 1.0, **among})
    return features


def surprise_features(rows: Sequence[MarkedRow], model: PreTrainedModel, pad_token_id: int) -> list[list[Features]]:
    """For each evaluated token of each row: -log p(token | all before it) in nats."""
    found = []
    for first in range(0, len(rows), 8):
        batch = rows[first : first + 8]
        ids_BL, mask_BL = pad_right([row.encoded.ids for row in batch], pad_token_id)
        columns = ids_BL.shape[1] - 1
        with torch.no_grad():
            logprobs_BK = answer_logprobs(model, ids_BL.to(model.device), mask_BL.to(model.device), columns).cpu()
        for row, logprobs_K in zip(batch, logprobs_BK, strict=True):
            # nothing predicts the first token of all, which is a prompt's: column j is number j - 1 here
            start = row.encoded.answer_start - 1
            if start < 0:
                raise DataError(
                    f"answer {row.answer.id!r} has no prompt, and nothing predicts its first token: give its record one"
                )
            own = logprobs_K[start : start + len(row.characters)].tolist()
            counted = [value for value, is_counted in zip(own, row.is_counted, strict=True) if is_counted]
            found.append([{"surprise": -value} for value in counted])
    return found


def hidden_states(rows: Sequence[MarkedRow], model: PreTrainedModel, pad_token_id: int) -> list[Floats]:
    """For each row the last layer's state at its evaluated tokens, (tokens, H); it has seen the token itself."""
    found = []
    for first in range(0, len(rows), 8):
        batch = rows[first : first + 8]
        ids_BL, mask_BL = pad_right([row.encoded.ids for row in batch], pad_token_id)
        with torch.no_grad():
            states_BLH = backbone(model)(
                input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device).long(), use_cache=False
            ).last_hidden_state
        for row, states_LH in zip(batch, states_BLH.float().cpu(), strict=True):
            found.append(states_LH[places(row)].double().numpy())
    return found


def saliency_features(rows: Sequence[MarkedRow], model: PreTrainedModel, pad_token_id: int) -> list[list[Features]]:
    """For each evaluated token of each row: gradient times input, of the answer's mean log-odds of being positive.

    model: a discriminator; its first class is negative and its last one positive.
    """
    embeddings: list[Tensor] = []

    def keep(module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    found = []
    try:
        for first in range(0, len(rows), 4):
            batch = rows[first : first + 4]
            ids_BL, mask_BL = pad_right([row.encoded.ids for row in batch], pad_token_id)
            logits_BLC = model(input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device).long()).logits
            odds_BL = logits_BLC[..., -1] - logits_BLC[..., 0]
            means = [odds_L[places(row)].mean() for row, odds_L in zip(batch, odds_BL, strict=True)]
            embedding_BLH = embeddings.pop()
            (gradient_BLH,) = torch.autograd.grad(torch.stack(means).sum(), embedding_BLH)
            saliency_BL = (gradient_BLH.float() * embedding_BLH.detach().float()).sum(-1).cpu()
            found += _at_tokens("saliency", batch, saliency_BL)
    finally:
        hook.remove()
    return found


def attention_features(rows: Sequence[MarkedRow], model: PreTrainedModel, pad_token_id: int) -> list[list[Features]]:
    """For each evaluated token of each row: the attention that it gets from the row's last token in the last layer."""
    found = []
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that forms these weights
    try:
        for first in range(0, len(rows), 8):
            batch = rows[first : first + 8]
            ids_BL, mask_BL = pad_right([row.encoded.ids for row in batch], pad_token_id)
            with torch.no_grad():
                attention_BhLL = backbone(model)(
                    input_ids=ids_BL.to(model.device),
                    attention_mask=mask_BL.to(model.device).long(),
                    use_cache=False,
                    output_attentions=True,
                ).attentions[-1]
            last_B = mask_BL.sum(-1) - 1
            found += _at_tokens(
                "attention", batch, attention_BhLL.float().mean(1).cpu()[torch.arange(len(batch)), last_B]
            )
    finally:
        model.set_attn_implementation(own)
    return found


def _at_tokens(name: str, rows: Sequence[MarkedRow], values_BL: Tensor) -> list[list[Features]]:
    """The values at the evaluated tokens of each row."""
    return [[{name: x} for x in of_row[places(row)].tolist()] for row, of_row in zip(rows, values_BL, strict=True)]


def taken_out(pairs: Sequence[EditPair], run: RunFolder) -> tuple[list[MarkedRow], Bools]:
    """The answers of edit pairs as tokens, and for all evaluated tokens whether the correction removed them."""
    labelled, _ = label_pairs(pairs, run.tokenizer, run.cfg.data, run.cfg.labels)
    rows = mark([MarkedAnswer(pair.id, pair.prompt, pair.rejected, ()) for pair in pairs], run.tokenizer, run.cfg.data)
    labels = []
    for pair, row in zip(labelled, rows, strict=True):
        assert pair.rejected.encoded == row.encoded  # one encoder: label k is of token k
        pairs = zip(pair.rejected.labels, row.is_counted, strict=True)
        labels += [label < 0 for label, is_counted in pairs if is_counted]
    return rows, np.array(labels, dtype=bool)


def fitted(features: Sequence[OfAnswer], is_error_N: Bools) -> Pipeline:
    """Logistic regression on the features of all tokens; features[a] are those of answer a."""
    answer_N = np.repeat(np.arange(len(features)), [len(of_answer) for of_answer in features])
    if isinstance(features[0], np.ndarray):
        model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
    else:
        model = make_pipeline(DictVectorizer(), MaxAbsScaler(), LogisticRegression(solver="liblinear"))
    search = GridSearchCV(
        model, {"logisticregression__C": PENALTIES}, scoring="roc_auc", cv=GroupKFold(min(5, len(features)))
    )
    return search.fit(_flat(features), is_error_N, groups=answer_N).best_estimator_


def log_odds(model: Pipeline, features: Sequence[OfAnswer]) -> Floats:
    """Above 0 where a token is likelier an error than not."""
    return np.asarray(model.decision_function(_flat(features)))


def _flat(features: Sequence[OfAnswer]) -> Floats | list[Features]:
    if isinstance(features[0], np.ndarray):
        return np.concatenate(cast("Sequence[Floats]", features))
    return [token for of_answer in features for token in of_answer]


Scorer = Callable[[Sequence[MarkedRow]], Floats]


def baselines(run: RunFolder, sources: Mapping[str, Source]) -> dict[str, Scorer]:
    """Each baseline by name, fitted on the edits that the discriminator was trained on."""
    rows, is_error_N = taken_out(run.edits.train, run)
    share = is_error_N.mean()
    language_model = load_reference(run)
    discriminator, _ = load_discriminator(run.discriminator_folder, run.cfg.model, device=run.device)

    def length(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        return [length_features(row) for row in rows]

    def lexical(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        return [lexical_features(row, sources[row.answer.id]) for row in rows]

    def both(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        pairs = [zip(*some, strict=True) for some in zip(length(rows), lexical(rows), strict=True)]
        return [[{**one, **other} for one, other in of_answer] for of_answer in pairs]

    def surprise(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        return surprise_features(rows, language_model, run.tokenizer.pad_token_id)

    def probe(rows: Sequence[MarkedRow]) -> list[Floats]:
        return hidden_states(rows, language_model, run.tokenizer.pad_token_id)

    def saliency(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        return saliency_features(rows, discriminator, run.tokenizer.pad_token_id)

    def attention(rows: Sequence[MarkedRow]) -> list[list[Features]]:
        return attention_features(rows, discriminator, run.tokenizer.pad_token_id)

    def scorer(features: Callable[[Sequence[MarkedRow]], Sequence[OfAnswer]], answers: int = len(rows)) -> Scorer:
        own = rows[:answers]
        model = fitted(features(own), is_error_N[: sum(sum(row.is_counted) for row in own)])
        return lambda rows: log_odds(model, features(rows))

    return {
        "constant": lambda rows: np.full(sum(sum(row.is_counted) for row in rows), np.log(share / (1 - share))),
        "length": scorer(length),
        "lexical": scorer(lexical),
        "lexical and length": scorer(both),
        "surprise": scorer(surprise, ENOUGH_FOR_A_SIGN),
        "probe": scorer(probe),
        "saliency": scorer(saliency, ENOUGH_FOR_A_SIGN),
        "attention": scorer(attention, ENOUGH_FOR_A_SIGN),
    }


def corrections(run: RunFolder, data: Path) -> Floats:
    """1 where the annotator of the held-out answers took a token out, -1 elsewhere; in the order of spans.jsonl."""
    lines = (data / "edits_held_out.jsonl").read_text(encoding="utf-8").split("\n")
    # not read as edits: there an answer of which nothing remains is malformed
    records = [json.loads(line) for line in lines if line]
    pairs = [EditPair(record["id"], record["prompt"], record["rejected"], record["revised"]) for record in records]
    return np.where(taken_out(pairs, run)[1], 1.0, -1.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the config that the discriminator was trained with")
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    options = parser.parse_args(arguments)
    return command(lambda: compare(options.config, options.data))


def compare(config: Path, data: Path) -> None:
    """Prints how well each score finds the marked tokens; writes baselines.json into the run's folder."""
    run = open_run(load_config(config), resume=False, whole=False)

    def read(name: str) -> list[MarkedRow]:
        answers = read_marked_answers(str(data / name), run.cfg.data, run.tokenizer).records
        return mark(answers, run.tokenizer, run.cfg.data)

    rows, tuned = read("spans.jsonl"), read("spans_threshold.jsonl")
    tokens, is_error_N = marked_tokens(rows), marked_tokens(tuned).error_N
    scorers: dict[str, Scorer] = {
        "discriminator": lambda rows: error_scores(rows, token_rewards(run, run.cfg, rows, label="discriminator")),
        **baselines(run, read_sources(data)),
    }
    evaluations = {
        name: evaluate_spans(tokens, score(rows), threshold=best_threshold(is_error_N, score(tuned)))
        for name, score in scorers.items()
    }
    evaluations["corrections"] = evaluate_spans(tokens, corrections(run, data), threshold=0.0)
    print_evaluations(evaluations)
    behind = {
        name: {figure: vars(difference(evaluations["discriminator"], other, figure)) for figure in COMPARED}
        for name, other in evaluations.items()
        if name != "discriminator"
    }
    found = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    write_json(run.path / "baselines.json", {"methods": found, "discriminator_above": behind})


COMPARED = ("auc", "auc_per_answer", "average_precision", "f1", "f1_at_threshold")

if __name__ == "__main__":
    raise SystemExit(main())

"""Evaluates a policy: answers to held-out prompts, scored by a scorer that training never sees, and their KL.

Sampling and scoring are passed as functions, so that the same arithmetic evaluates a run on one process, a run on
several, or another sampler.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tlcr.config.functions import failure
from tlcr.errors import DataError, ShapeError
from tlcr.evaluation.drift import JudgedToken, WordGold, calibration_error, judge, ranking
from tlcr.files import atomic_write, write_json
from tlcr.text.tokenization import token_pieces
from tlcr.text.truncation import cut_beginning
from tlcr.training.distributed import on_all_processes
from tlcr.types import PolicyScores, Rollout

Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) to one finite score for each answer, higher is better."""

MEASURES = (
    "gold_per_token",
    "gold_per_answer",
    "proxy_per_token",
    "proxy_per_answer",
    "kl_per_token",
    "kl_per_answer",
    "exact_kl_per_token",
    "entropy",
    "length",
    "ended_share",
    "discriminator_auc",
    "discriminator_ece",
)
"""The measures of an evaluation, in the order of its JSON."""


@dataclass(frozen=True)
class TokenDetail:
    """The arm's reward of every action of a rollout, (B, T), all without KL.

    proxy_BT: the reward as its source and `reward.scale` make it. rewards_BT: the same, centred where the arm's is.
    advantages_BT: the advantage under the latter. confidence_BT: the discriminator's in each token, in [0, 1]; None
    where the reward is not read off one.
    """

    proxy_BT: Tensor
    rewards_BT: Tensor
    advantages_BT: Tensor
    confidence_BT: Tensor | None = None


class Detailer(Protocol):
    def __call__(self, rollout: Rollout, scores: PolicyScores) -> TokenDetail: ...


@dataclass(frozen=True)
class EvaluatedAnswer:
    """One answer and its sums over counted tokens; per-token lists only where the answer was kept as a sample."""

    prompt: str
    """Complete; what the policy was given lacks `prompt_cut` at its beginning."""
    response: str
    gold: float | None
    proxy: float | None
    """Sum of the arm's own reward without KL, not centred; None without a `detail`."""
    length: int
    """Counted tokens, the end of sequence among them."""
    kl: float
    """Sum of the sampled log-ratios log pi(a_t) - log pi_ref(a_t), nats."""
    exact_kl: float | None
    """Sum of the exact KL(pi || pi_ref) at each state, nats; None where it was not computed."""
    entropy: float
    """Sum over the states, nats."""
    ended: bool
    tokens: tuple[str, ...] = ()
    reward: tuple[float, ...] = ()
    advantage: tuple[float, ...] = ()
    value: tuple[float, ...] = ()
    token_kl: tuple[float, ...] = ()
    prompt_cut: str = ""
    judged: tuple[JudgedToken, ...] = ()
    """The tokens whose word has a gold, as the discriminator judged them; none without a discriminator, or where words
    have no gold."""

    def to_json(self, when: Literal["before", "after"]) -> dict[str, Any]:
        """A line of samples.jsonl."""
        return {
            "when": when,
            "prompt": self.prompt,
            "prompt_cut": self.prompt_cut,
            "response": self.response,
            "tokens": list(self.tokens),
            "reward": list(self.reward),
            "advantage": list(self.advantage),
            "value": list(self.value),
            "kl": list(self.token_kl),
            "gold": self.gold,
        }


@dataclass(frozen=True)
class PolicyEvaluation:
    """Means over the answers to held-out prompts, and their standard errors.

    Per token means a ratio of sums: all answers' gold (or KL, or entropy) over all their tokens, so that a long answer
    weighs by its length. A measure is None where it was not taken.
    """

    gold_per_token: float | None
    gold_per_answer: float | None
    proxy_per_token: float | None
    """What PPO maximised, without KL. It is the arm's own reward, on its own scale."""
    proxy_per_answer: float | None
    kl_per_token: float
    """Sampled KL(policy || reference), nats per token."""
    kl_per_answer: float
    """The same per answer, which is an unbiased estimate of the KL of whole answers."""
    exact_kl_per_token: float | None
    entropy: float
    """Nats per token."""
    length: float
    """Tokens per answer."""
    ended_share: float
    discriminator_auc: float | None
    """Of the discriminator's confidence in the policy's tokens against the gold of their words: `drift.ranking`."""
    discriminator_ece: float | None
    """The calibration error of the same: `drift.calibration_error`."""
    answers: int
    standard_errors: dict[str, float | None]
    """One for each measure that is a mean; the answer is the independent unit. None below two answers."""
    samples: tuple[EvaluatedAnswer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The "before" or "after" object of evaluation.json; samples go to a file of their own."""
        values = {name: getattr(self, name) for name in MEASURES}
        return {**values, "answers": self.answers, "standard_errors": dict(self.standard_errors)}

    def metrics(self) -> dict[str, float]:
        """Every measure that was taken, by its name: what training logs as ``eval/<measure>``."""
        return {name: float(value) for name in MEASURES if (value := getattr(self, name)) is not None}


def evaluate_policy(
    prompts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    generate: Callable[[Sequence[str]], Rollout],
    score: Callable[[Rollout], PolicyScores],
    scorer: Scorer | None,
    batch_size: int = 64,
    word_gold: WordGold | None = None,
    samples: int = 0,
    detail: Detailer | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[list[EvaluatedAnswer]], list[EvaluatedAnswer]] | None = None,
) -> PolicyEvaluation:
    """Answer every prompt once and measure the answers.

    Args:
        prompts: complete texts.
        tokenizer: the policy's tokenizer.
        generate: samples one answer for each prompt, at the sampling temperature and from a generator of fixed seed, so
            that two policies get the same random numbers.
        score: log-probabilities of policy and reference, values and entropies of a rollout, with the exact KL where it
            is wanted.
        scorer: gives whole answers their gold; None where there is none.
        batch_size: prompts given to ``generate`` at a time.
        word_gold: gives the words of an answer their gold, to hold a discriminator's confidence against; None where
            words have none.
        samples: answers kept with per-token detail, the first ones.
        detail: the arm's reward and advantages. Without it those of the samples are empty, and there is no proxy.
        share: the number of this process, and of processes that share the prompts. Each answers every such-and-such
            prompt, and calls ``generate``, ``score`` and ``detail`` as often as the others, because sharded models
            communicate there; where its share is used up, it answers the first prompt, and the answer does not count.
        gather: collects the answers of all processes (``accelerate.utils.gather_object``).

    Returns:
        Figures over all answers, and the samples.

    Raises:
        DataError: there are no prompts, or the scorer raises, or returns a wrong count or a score that is not finite.
        ShapeError: ``detail`` returns another shape than the rollout's.
    """
    answers: list[EvaluatedAnswer] = []
    process, processes = share
    own = prompts[process::processes]
    in_detail = len(range(process, samples, processes))
    for start in range(0, len(prompts[::processes]), batch_size):
        batch = own[start : start + batch_size]
        rollout = generate(batch or prompts[:1])
        scores = score(rollout)
        details = detail(rollout, scores) if detail is not None else None
        kept = min(max(in_detail - start, 0), len(batch))
        measure = partial(_answers, rollout, scores, scorer, tokenizer, kept, details, word_gold) if batch else list
        # A scorer may fail on the answers of one process: the others would wait for it.
        answers.extend(measure() if gather is None else on_all_processes(measure))
    if gather is not None:
        answers = _in_order_of_prompts(gather(answers), processes)
    return summarise(answers, samples=samples)


def _in_order_of_prompts(answers: Sequence[EvaluatedAnswer], processes: int) -> list[EvaluatedAnswer]:
    """The answers of all processes, which came one process after the other."""
    ordered, taken = list(answers), 0
    for process in range(processes):
        count = len(ordered[process::processes])
        ordered[process::processes] = answers[taken : taken + count]
        taken += count
    return ordered


def summarise(answers: Sequence[EvaluatedAnswer], *, samples: int) -> PolicyEvaluation:
    """The measures of a set of answers, with its first samples. DataError where there is no answer."""
    if not answers:
        raise DataError("there are no held-out prompts to evaluate on; raise evaluation.prompts or data.held_out")
    lengths = [float(a.length) for a in answers]
    # A measure is taken for all answers or for none: scorer and score() do not choose among them.
    gold = [a.gold for a in answers if a.gold is not None]
    proxy = [a.proxy for a in answers if a.proxy is not None]
    exact = [a.exact_kl for a in answers if a.exact_kl is not None]
    judged = [token for a in answers for token in a.judged]
    estimates = {
        "gold_per_token": ratio_of_sums(gold, lengths) if gold else (None, None),
        "gold_per_answer": mean_of(gold) if gold else (None, None),
        "proxy_per_token": ratio_of_sums(proxy, lengths) if proxy else (None, None),
        "proxy_per_answer": mean_of(proxy) if proxy else (None, None),
        "kl_per_token": ratio_of_sums([a.kl for a in answers], lengths),
        "kl_per_answer": mean_of([a.kl for a in answers]),
        "exact_kl_per_token": ratio_of_sums(exact, lengths) if exact else (None, None),
        "entropy": ratio_of_sums([a.entropy for a in answers], lengths),
        "length": mean_of(lengths),
        "ended_share": mean_of([float(a.ended) for a in answers]),
        "discriminator_auc": (ranking(judged), None) if judged else (None, None),
        "discriminator_ece": (calibration_error(judged), None),
    }
    return PolicyEvaluation(
        **{name: estimates[name][0] for name in MEASURES},  # type: ignore[arg-type]
        answers=len(answers),
        standard_errors={name: estimates[name][1] for name in MEASURES},
        samples=tuple(a for a in answers if a.tokens)[:samples],
    )


def mean_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sd / sqrt(n) with the n - 1 variance; no error from a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def ratio_of_sums(values: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """R = sum(values) / sum(counts) and its standard error by the delta method, answers independent::

        sqrt(sum (v_i - R n_i)^2 / (n (n - 1))) / mean(counts)

    Args:
        values: one number for each answer.
        counts: what each is divided over.

    Returns:
        R, which is 0 where nothing is counted, and its standard error, None where it is not defined.
    """
    n, total = len(values), math.fsum(counts)
    if total == 0:
        return 0.0, None
    ratio = math.fsum(values) / total
    if n < 2:
        return ratio, None
    spread = math.fsum((v - ratio * c) ** 2 for v, c in zip(values, counts, strict=True))
    return ratio, math.sqrt(spread / (n * (n - 1))) / (total / n)


def write_evaluation(
    folder: Path,
    before: PolicyEvaluation,
    after: PolicyEvaluation,
    *,
    settings: Mapping[str, Any] | None = None,
    on_the_way: Mapping[str, Any] | None = None,
) -> None:
    """Write evaluation.json and samples.jsonl of one PPO run, both aside and then renamed.

    Args:
        folder: of the run.
        before: the reference, evaluated.
        after: the trained policy.
        settings: of these two evaluations, where known.
        on_the_way: those of the evaluations during training, where they were others; the report does not draw the two
            as one curve then.
    """
    known = {} if settings is None else {"settings": settings, "on_the_way": on_the_way or settings}
    write_json(folder / "evaluation.json", {"before": before.to_json(), "after": after.to_json(), **known})
    lines = [answer.to_json("before") for answer in before.samples] + [a.to_json("after") for a in after.samples]
    with atomic_write(folder / "samples.jsonl") as aside:
        aside.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def _gold(scorer: Scorer | None, rollout: Rollout) -> list[float | None]:
    if scorer is None:
        return [None] * len(rollout.prompts)
    try:
        given = scorer(list(rollout.prompts), list(rollout.responses))
    except (Exception, SystemExit) as error:  # sys.exit() of a scorer would end the run with its code, 0 say
        raise DataError(
            f"the scorer raised {failure(error)}; it is called with the prompts and the responses, two lists of texts"
        ) from error
    if isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable):
        raise DataError(
            f"the scorer returned a {type(given).__name__}; it must return a list of one number for each answer, in "
            "their order"
        )
    scores = list(map(_number, given))
    if len(scores) != len(rollout.prompts):
        raise DataError(
            f"the scorer returned {len(scores)} scores for {len(rollout.prompts)} answers; "
            "it must return one for each, in their order"
        )
    for index, value in enumerate(scores):
        if not math.isfinite(value):
            raise DataError(
                f"the scorer returned {value} for the answer {rollout.responses[index][:80]!r}; "
                "it must return a finite number for every answer, an empty one too"
            )
    return list(scores)


def _number(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the scorer returned {str(score)[:80]!r} ({type(score).__name__}) for an answer; it must return a finite "
            "number for every answer, an empty one too"
        ) from error


def _answers(
    rollout: Rollout,
    scores: PolicyScores,
    scorer: Scorer | None,
    tokenizer: PreTrainedTokenizerBase,
    kept: int,
    detail: TokenDetail | None,
    word_gold: WordGold | None,
) -> list[EvaluatedAnswer]:
    gold_B, mask_BT = _gold(scorer, rollout), rollout.mask_BT
    if detail is not None:
        for name in ("proxy_BT", "rewards_BT", "advantages_BT", "confidence_BT"):
            values_BT = getattr(detail, name)
            shape = mask_BT.shape if values_BT is None else values_BT.shape
            if shape != mask_BT.shape:
                raise ShapeError(
                    f"{name} has shape {tuple(shape)}, the rollout {tuple(mask_BT.shape)}; give one value an action"
                )

    def rows(values_BT: Tensor) -> list[list[float]]:
        return [row[mask].tolist() for row, mask in zip(values_BT.double().cpu(), mask_BT.cpu(), strict=True)]

    kl = rows(scores.logprobs_BT - scores.ref_logprobs_BT)
    entropy, values = rows(scores.entropy_BT), rows(scores.values_BT)
    exact = rows(scores.kl_BT) if scores.kl_BT is not None else None
    proxy = rows(detail.proxy_BT) if detail is not None else None
    confidence = None if detail is None or detail.confidence_BT is None else rows(detail.confidence_BT)
    answers = []
    for b, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        answer = EvaluatedAnswer(
            prompt=prompt,
            response=response,
            gold=gold_B[b],
            proxy=math.fsum(proxy[b]) if proxy is not None else None,
            length=len(kl[b]),
            kl=math.fsum(kl[b]),
            exact_kl=math.fsum(exact[b]) if exact is not None else None,
            entropy=math.fsum(entropy[b]),
            ended=bool(rollout.ended_B[b]),
        )
        context = rollout.prompt_ids_BP[b][rollout.prompt_mask_BP[b]].tolist()
        if word_gold is not None and confidence is not None and rollout.messages_BT is None:
            judged = judge(
                word_gold(prompt, response),
                response,
                rollout.response_ids_BT[b][mask_BT[b]].tolist(),
                confidence[b],
                context=context,
                tokenizer=tokenizer,
            )
            answer = dataclasses.replace(answer, judged=judged)
        if b < kept:
            read_T = rollout.read_BT[b]
            ids, acted = rollout.response_ids_BT[b][read_T].tolist(), mask_BT[b][read_T].tolist()
            answer = dataclasses.replace(
                answer,
                tokens=tuple(compress(token_pieces(tokenizer, ids, context=context), acted)),
                prompt_cut=cut_beginning(tokenizer, prompt, len(context)),
                value=tuple(values[b]),
                token_kl=tuple(kl[b]),
                reward=tuple(rows(detail.rewards_BT)[b]) if detail is not None else (),
                advantage=tuple(rows(detail.advantages_BT)[b]) if detail is not None else (),
            )
        answers.append(answer)
    return answers

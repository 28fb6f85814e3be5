"""What the models and sources of a config hold, as far as their headers and first records show it.

No weights are read. Every check calls the code that the stage would call, so that both say the same sentence.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import DataConfig, EngineConfig, GeneratorConfig, RunConfig
from tlcr.config.trials import arms_of
from tlcr.data import embedded
from tlcr.data.readers import ReadResult, read_edits, read_preferences, read_prompts
from tlcr.engines import choose
from tlcr.engines.paged import fault_of
from tlcr.errors import TlcrError
from tlcr.experiment.architecture import Architecture, build_on_meta
from tlcr.experiment.frozen_models import check_value_start
from tlcr.experiment.memory import checkpoint_of, ppo_roles
from tlcr.experiment.preflight import Finding, engines_used, existing, makes_prompts, models_used, records, sources_used
from tlcr.experiment.refresh import check_refreshed
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.classifiers import new_class
from tlcr.models.ends import answer_notes, other_ends
from tlcr.models.faults import AUTO, Role
from tlcr.models.inspection import attention_for, model_faults, read_config
from tlcr.models.positions import (
    CONVERSATION_LIMITS,
    DATA_LIMITS,
    ROLLOUT_LIMITS,
    check_fits,
    check_positions,
    position_limit,
)
from tlcr.models.tokenizers import load_tokenizer
from tlcr.rewards.sources.frozen_model import same_tokenizer
from tlcr.rewards.sources.log_ratio import check_same_tokenizer
from tlcr.text.tokenization import encode_answers
from tlcr.text.turns import end_notes
from tlcr.training.disk import checkpoints_at_a_time, in_words
from tlcr.types import EditPair, PreferencePair

__all__ = ["FIRST_RECORDS", "contents"]

FIRST_RECORDS = 200
"""Records of each source that are read before a run."""

ROLES: dict[str, Role] = {
    "discriminator.path": "discriminator",
    "reward_model.path": "reward_model",
    "q_model.path": "reward_model",
}
"""What the models are wanted for, by their knob; all others are policies."""


def contents(cfg: RunConfig, stages: Collection[str], *, absent: Collection[str]) -> list[Finding]:
    """What blocks these stages, or should be known before them, in the models and sources that they read.

    Args:
        cfg: the whole config.
        stages: the stages that are to run.
        absent: knobs of models and sources that are not there, of which nothing more can be said.

    Returns:
        The findings.
    """
    return list(_contents(cfg, stages, absent))


def _contents(cfg: RunConfig, stages: Collection[str], absent: Collection[str]) -> Iterator[Finding]:
    if not stages:
        return
    faulty = set(absent)
    for knob, named in models_used(cfg, stages).items():
        section = knob.rpartition(".")[0]
        if {knob, f"{section}.tokenizer", f"{section}.gguf_file", f"{section}.chat_template"} & faulty:
            faulty.add(knob)
            continue
        for fault in model_faults(named, ROLES.get(knob, "policy")):
            faulty.add(knob)
            yield Finding("blocked", knob, fault.fact, fault.remedy)
    engines = engines_used(cfg, stages)
    if "reviser" in engines and cfg.reviser.engine != "generate" and "reviser.model.path" not in faulty:
        try:
            yield from _engine("reviser", cfg.reviser, cfg.reviser.model, build_on_meta(cfg.reviser.model))
        except TlcrError as error:
            yield Finding.of("reviser.model.path", error)
    if "model.path" in faulty or set(stages) <= {"revisions"}:
        return
    try:
        is_embedded = cfg.model.path == "embedded"
        tokenizer = embedded.build_tokenizer(cfg.seed) if is_embedded else load_tokenizer(cfg.model)
        model = build_on_meta(cfg.model)
    except TlcrError as error:
        yield Finding.of("model.path", error)
        return
    if not is_embedded:
        # Readers say what is unusual about prompts; PPO says other ends, unless SFT has saved the model with one alone.
        unsaid = {*end_notes(tokenizer), *(other_ends(tokenizer, cfg.model) if cfg.sft.enabled else ())}
        for note in answer_notes(tokenizer, cfg.model):
            yield Finding("note", "model.path", note, repeated=note not in unsaid)
    yield from _other_tokenizers(cfg, stages, tokenizer, faulty)
    yield from _classifiers(stages, model)
    yield from _bidirectional(cfg, stages, model)
    yield from _embedded_prompts(cfg, stages)
    examples = []
    for knob, source in sources_used(cfg, stages).items():
        if knob.startswith("data.") and knob not in faulty and source is not None:
            read = _first_records(knob, cfg, tokenizer)
            yield from read.findings
            examples.append(read)
    yield from _scorer(cfg, stages, examples)
    yield from _positions(cfg, stages, examples, tokenizer, model, faulty)
    if "rollout" in engines:
        yield from _engine("rollout", cfg.rollout, cfg.model, model)
    yield from _disk(cfg, stages, model)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without log lines: what a reader logs here, it logs again in its stage."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---- sources


@dataclass(frozen=True)
class _Read:
    """The first records of a source as (prompt, answers), and what was found on the way."""

    knob: str
    texts: tuple[tuple[str, tuple[str, ...]], ...]
    findings: tuple[Finding, ...]


def _first_records(knob: str, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> _Read:
    read: Callable[[DataConfig, PreTrainedTokenizerBase], ReadResult[PreferencePair | EditPair | str]] = {
        "data.preferences": read_preferences,
        "data.edits": read_edits,
        "data.prompts": read_prompts,
    }[knob]  # type: ignore[assignment]
    try:
        with _quietly():
            found = read(replace(cfg.data, limit=min(cfg.data.limit or FIRST_RECORDS, FIRST_RECORDS)), tokenizer)
    except TlcrError as error:
        return _Read(knob, (), (Finding.of(knob, error),))
    said = [Finding("note", knob, note, repeated=True) for note in found.notes]
    if found.malformed:
        count = len(found.malformed) + len(found.records)
        fact = f"{len(found.malformed)} of the first {count} records are malformed and skipped: {found.malformed[0]}"
        said.append(Finding("warning", knob, fact, "mend them, or let them be skipped", repeated=True))
    edits = [record for record in found.records if isinstance(record, EditPair)]
    is_all = len(found.records) + len(found.malformed) < FIRST_RECORDS
    if edits and is_all and all(edit.rejected == edit.revised for edit in edits):
        fact = f"none of the {len(edits)} pairs of {found.source} has an edited token, so there is nothing to learn"
        remedy = "name pairs of a rejected answer and its revision that differ in data.edits"
        said.append(Finding("blocked", knob, fact, remedy))
    return _Read(knob, tuple(map(_texts, found.records)), tuple(said))


def _texts(record: PreferencePair | EditPair | str) -> tuple[str, tuple[str, ...]]:
    if isinstance(record, str):
        return record, ()
    if isinstance(record, EditPair):
        return record.prompt, (record.rejected, record.revised)
    return record.prompt, (record.chosen, record.rejected)


def _prompts(cfg: RunConfig, stages: Collection[str], examples: Sequence[_Read]) -> list[str]:
    """Some prompts that PPO will answer; none where it is not to run or they cannot be read."""
    if not {"ppo", "evaluate"} & set(stages):
        return []
    wanted = "data.prompts" if cfg.data.prompts is not None else "data.preferences"
    own = [prompt for read in examples if read.knob == wanted for prompt, _ in read.texts]
    return embedded.prompts(FIRST_RECORDS, cfg.seed, words=cfg.data.embedded_words) if makes_prompts(cfg) else own


def _embedded_prompts(cfg: RunConfig, stages: Collection[str]) -> Iterator[Finding]:
    if makes_prompts(cfg) and {"ppo", "evaluate"} & set(stages):
        try:
            embedded.prompts(cfg.evaluation.prompts, cfg.seed, "held_out", cfg.data.embedded_words)
        except TlcrError as error:
            yield Finding.of("evaluation.prompts", error)


def _scorer(cfg: RunConfig, stages: Collection[str], examples: Sequence[_Read]) -> Iterator[Finding]:
    """The embedded task's scorer on prompts of the user, of which it knows nothing."""
    if cfg.model.path != "embedded" or cfg.evaluation.scorer is not None:
        return
    prompts = _prompts(cfg, stages, examples)
    try:
        embedded.score(prompts, [""] * len(prompts))
    except TlcrError:
        fact = "evaluation.scorer is not set, and the scorer of the embedded task does not know the prompts of the data"
        yield Finding("blocked", "evaluation.scorer", fact, "set evaluation.scorer, or model.path to a model of yours")


# ---- models


def _other_tokenizers(
    cfg: RunConfig, stages: Collection[str], tokenizer: PreTrainedTokenizerBase, faulty: Collection[str]
) -> Iterator[Finding]:
    """Models that read the policy's ids, and whose own tokenizer is another."""
    checks: dict[str, Callable[[PreTrainedTokenizerBase, PreTrainedTokenizerBase], None]] = {
        "dpo.path": check_same_tokenizer
    }
    if any(arm.reward.refresh.every for arm in arms_of(cfg)):
        checks["discriminator.path"] = check_refreshed
    if cfg.ppo.value_model == "separate":
        checks[f"{cfg.ppo.value_init}.path"] = partial(check_value_start, cfg)
    used = models_used(cfg, stages)
    for knob, check in checks.items():
        if knob not in used or knob in faulty:
            continue
        try:
            check(tokenizer, load_tokenizer(used[knob]))
        except TlcrError as error:
            yield Finding.of(knob, error)


def _classifiers(stages: Collection[str], model: PreTrainedModel) -> Iterator[Finding]:
    """A policy that no classifier can be made of."""
    for role in ("discriminator", "reward_model"):
        if role in stages:
            try:
                new_class(AUTO[role], model, model.config)
            except TlcrError as error:
                yield Finding.of("model.path", error)


def _bidirectional(cfg: RunConfig, stages: Collection[str], model: PreTrainedModel) -> Iterator[Finding]:
    if "discriminator" not in stages:
        return
    try:
        make_top_layers_bidirectional(model, cfg.discriminator.bidirectional_layers)
    except TlcrError as error:
        yield Finding.of("discriminator.bidirectional_layers", error)


def _positions(
    cfg: RunConfig,
    stages: Collection[str],
    examples: Sequence[_Read],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    faulty: Collection[str],
) -> Iterator[Finding]:
    """The longest of the first records against the positions of the model; then the longest that the config allows."""
    data = cfg.data
    cut = partial(
        encode_answers,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        max_answer_tokens=data.max_answer_tokens,
        end_of_sequence=False,
    )
    lengths: dict[str, tuple[int, str]] = {}
    for read in examples:
        pairs = [(prompt, answer) for prompt, answers in read.texts for answer in answers]
        encoded = cut([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        longest = max((len(answer.ids) for answer in encoded), default=0)
        lengths[read.knob] = (longest, "an answer with its prompt")
    prompts = _prompts(cfg, stages, examples)
    if prompts:
        encoded = cut(prompts, [""] * len(prompts))
        longest = max(len(prompt.ids) for prompt in encoded) + cfg.rollout.max_response_tokens
        what = "an answer" if cfg.rollout.environment is None else "a conversation"
        lengths["rollout.max_new_tokens"] = (longest, f"a prompt with {what} of full length")
        yield from _positions_of_others(cfg, stages, longest, tokenizer, faulty)
    blocked = False
    of_rollouts = ROLLOUT_LIMITS if cfg.rollout.environment is None else CONVERSATION_LIMITS
    for knob, (longest, what) in lengths.items():
        limits = of_rollouts if knob == "rollout.max_new_tokens" else DATA_LIMITS
        try:
            check_fits(model, longest, what, limits)
        except TlcrError as error:
            blocked = True
            yield Finding.of(knob, error)
    answer = max(data.max_answer_tokens, cfg.rollout.max_response_tokens)
    try:
        check_fits(
            model, data.max_prompt_tokens + answer, "a prompt with an answer, each as long as the config allows,"
        )
    except TlcrError as error:
        if not blocked and cfg.model.path != "embedded":
            yield replace(Finding.of("model.path", error), level="warning")


def _positions_of_others(
    cfg: RunConfig,
    stages: Collection[str],
    longest: int,
    tokenizer: PreTrainedTokenizerBase,
    faulty: Collection[str],
) -> Iterator[Finding]:
    """The models that a reward asks, which read the policy's ids uncut where they share its tokenizer."""
    for knob, named in models_used(cfg, stages).items():
        if knob not in ROLES or knob in faulty or not same_tokenizer(tokenizer, load_tokenizer(named)):
            continue
        what = "a prompt with an answer of full length"
        try:
            positions = _positions_of(named)
            check_positions(positions, longest, what, reader=repr(named.path), limits=ROLLOUT_LIMITS)
        except TlcrError as error:
            yield Finding.of(knob, error)


def _positions_of(named: GeneratorConfig) -> int | None:
    """As PPO counts them; where code of its own makes the model, which is not run here, as its config does."""
    if named.trust_remote_code:
        return getattr(read_config(named).get_text_config(), "max_position_embeddings", None)
    return position_limit(build_on_meta(named, headless=True))


def _engine(section: str, cfg: EngineConfig, named: GeneratorConfig, model: PreTrainedModel) -> Iterator[Finding]:
    """Which engine `auto` takes. Continuous batching does not run every architecture: a small model of this one tries
    it."""
    if cfg.engine not in ("auto", "paged"):
        return
    subject = f"{section}.engine"
    config = deepcopy(model.config)
    config._attn_implementation = attention_for(named, type(model), config)
    if cfg.engine == "auto":
        choice = choose(cfg, model, config)
        yield Finding("note", subject, f"{subject} auto takes {choice.engine!r}: {choice.why}")
    elif (fault := fault_of(config, type(model))) is not None:
        yield Finding("blocked", subject, f"{subject} is 'paged', and {fault}", f"set {subject}: generate")


def _disk(cfg: RunConfig, stages: Collection[str], model: PreTrainedModel) -> Iterator[Finding]:
    """A PPO run has up to keep_checkpoints + 1 checkpoints, weights and optimiser states, while one is saved; with
    save_every 0 the only one is that of a run that is stopped. When it ends it deletes them and leaves its models."""
    if "ppo" not in stages:
        return
    architecture = Architecture(model)
    roles = {role.name: role for role in ppo_roles(cfg, architecture)}
    trained = [role for role in roles.values() if role.optimizer]
    checkpoint = checkpoint_of("ppo", cfg, architecture)
    # An adapter is merged into a whole model at the end.
    merged = len(trained) * roles["reference"].weights if cfg.lora.trains("policy") else 0
    models = merged + sum(role.weights for role in trained)
    runs = sum(not path.exists() for path in records(cfg, "ppo"))
    at_a_time = min(cfg.parallel, runs)
    checkpoints = checkpoints_at_a_time(
        total_steps=cfg.ppo.updates, save_every=cfg.ppo.save_every, keep=cfg.ppo.keep_checkpoints
    )
    # with ppo.keep_best a policy more for each run, and two while a better one is written
    kept = (runs + at_a_time) * roles["reference"].weights if cfg.ppo.keep_best else 0
    need = at_a_time * checkpoints * checkpoint + runs * models + kept
    free = shutil.disk_usage(existing(Path(cfg.output_dir))).free
    if need > free:
        fact = (
            f"PPO may take {in_words(need)} (checkpoints of {at_a_time} runs at a time, models of {runs}), and "
            f"{in_words(free)} are free"
        )
        fewer = "lower ppo.keep_checkpoints, or " if checkpoints > 1 else ""
        yield Finding("blocked", "disk", fact, f"{fewer}name an output_dir on a larger disk")

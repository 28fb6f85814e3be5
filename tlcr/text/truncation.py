"""What length limits cut from prompts and answers, counted and said once for each stage, with an example."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

__all__ = ["Cut", "CutTexts", "Limits", "cut_beginning", "note_cut_prompts", "note_cuts"]

logger = logging.getLogger("tlcr")

SHOWN = 60
"""Characters of an example."""
CHUNK = 1024
"""Prompts tokenised in one call."""


class Limits(Protocol):
    """Numbers of tokens; a run's ``data`` section has them."""

    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def max_answer_tokens(self) -> int: ...


class Cut(Protocol):
    """An answer with its prompt, and how many tokens of each a limit cut."""

    @property
    def prompt_cut(self) -> int: ...
    @property
    def answer_cut(self) -> int: ...


@dataclass
class CutTexts:
    """Counts the prompts and answers of one stage that were cut. A prompt with several answers counts once.

    limits: what they were cut to. names: those of the limits for prompts and answers, where a user sets them.
    """

    limits: Limits
    names: tuple[str, str] = ("data.max_prompt_tokens", "data.max_answer_tokens")
    prompts: int = 0
    answers: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    first_prompt: tuple[int, str] = (0, "")
    """Tokens cut from the first prompt that was cut, and its text."""
    first_answer: int = 0

    def add(self, prompt: str, *answers: Cut) -> None:
        """Counts a prompt and its answers."""
        self.add_prompt(prompt, max(answer.prompt_cut for answer in answers))
        for answer in answers:
            self.answers += 1
            self.answers_cut += answer.answer_cut > 0
            self.first_answer = self.first_answer or answer.answer_cut

    def add_prompt(self, prompt: str, cut: int) -> None:
        """Counts a prompt without its answers."""
        self.prompts += 1
        if cut:
            self.prompts_cut += 1
            self.first_prompt = self.first_prompt if self.first_prompt[0] else (cut, prompt)

    def report(self, stage: str) -> None:
        """Logs what was cut, if anything was."""
        for note in self.notes():
            logger.warning("%s: %s", stage, note)

    def notes(self) -> list[str]:
        """One line for prompts and one for answers; none where nothing was cut."""
        found = []
        if self.prompts_cut:
            limit, (cut, text), name = self.limits.max_prompt_tokens, self.first_prompt, self.names[0]
            found.append(
                f"{self.prompts_cut} of {self.prompts} prompts are longer than {name} ({limit}) and are cut at the "
                f"beginning: the first of them loses the first {cut} of its {cut + limit} tokens, which begin "
                f"{text[:SHOWN]!r}; raise {name} if what stands there (a system message, say) is to be read"
            )
        if self.answers_cut:
            limit, cut = self.limits.max_answer_tokens, self.first_answer
            found.append(
                f"{self.answers_cut} of {self.answers} answers are longer than {self.names[1]} ({limit}) and are cut "
                f"at the end: the first of them loses the last {cut} of its {cut + limit} tokens"
            )
        return found


def note_cuts(texts: Iterable[tuple[str, Sequence[Cut]]], limits: Limits, *, stage: str) -> None:
    """Logs how many prompts and answers were cut.

    Args:
        texts: each prompt, with its answers.
        limits: what they were cut to.
        stage: who reads them, for the note.
    """
    cuts = CutTexts(limits)
    for prompt, answers in texts:
        cuts.add(prompt, *answers)
    cuts.report(stage)


def note_cut_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limits: Limits, *, stage: str) -> int:
    """Logs how many prompts a rollout will cut.

    Args:
        tokenizer: the policy's tokenizer.
        prompts: complete prompts.
        limits: what they are cut to.
        stage: who answers them, for the note.

    Returns:
        The tokens of the longest prompt, after the cut.
    """
    cuts, longest = CutTexts(limits), 0
    for first in range(0, len(prompts), CHUNK):
        some = list(prompts[first : first + CHUNK])
        for prompt, ids in zip(
            some, tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"], strict=True
        ):
            cuts.add_prompt(prompt, max(0, len(ids) - limits.max_prompt_tokens))
            longest = max(longest, min(len(ids), limits.max_prompt_tokens))
    cuts.report(stage)
    return longest


def cut_beginning(tokenizer: PreTrainedTokenizerBase, prompt: str, kept: int) -> str:
    """The beginning of a prompt that a model which reads its last tokens is not given.

    Args:
        tokenizer: a fast tokenizer.
        prompt: the complete prompt.
        kept: how many of its last tokens the model is given.

    Returns:
        The text before those tokens; empty where nothing was cut.
    """
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return prompt[: offsets[-kept][0]] if len(offsets) > kept else ""

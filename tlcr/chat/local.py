"""An instruction-tuned model on this machine, in batches. Its answers are stored like paid ones: they cost time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tlcr.chat.reading import with_opened_thoughts
from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, Deliver, NoAnswer, Question
from tlcr.config.schema import EngineConfig, GeneratorConfig
from tlcr.engines import Engine, Sampling, build_engine, resolved
from tlcr.engines.generate import Generate
from tlcr.models.ends import stop_ids
from tlcr.models.loading import load_causal_lm
from tlcr.models.positions import position_limit
from tlcr.models.tokenizers import load_tokenizer
from tlcr.text.tokenization import decode_text, render_question
from tlcr.training.distributed import process_device
from tlcr.training.interrupt import StopSignals

__all__ = ["LocalModel"]

BATCHES = 4
"""Batches that are given at a time to an engine which fills the places of answers that ended. What is under way is lost
when a run is killed, so not all of them (ours)."""


class LocalModel:
    """A ``ChatModel`` of transformers: chat template, batches of similar length, greedy at temperature 0.

    An engine samples. If a question has choices, it can answer only with one of them: then `generate` does, which alone
    holds a model to them. Schemas are ignored. The model is loaded at the first question.
    """

    def __init__(self, cfg: GeneratorConfig, store: AnswerStore, engine: EngineConfig) -> None:
        self._cfg, self._store, self._engine = cfg, store, engine
        self._weights = _weights(Path(cfg.path))
        self._loaded = False

    @property
    def identity(self) -> Mapping[str, Any]:
        decisive = ("path", "tokenizer", "gguf_file", "dtype", "chat_template")
        return {"local": {name: getattr(self._cfg, name) for name in decisive} | {"weights": self._weights}}

    @property
    def spent(self) -> float | None:
        return None

    @torch.no_grad()
    def answer_all(self, questions: Sequence[Question], deliver: Deliver) -> None:
        """See ``ChatModel``. A question that leaves no room for its answer in the model's context gets none."""
        self._load()
        positions = position_limit(self._model)
        ids: dict[int, list[int]] = {}
        texts: dict[int, str] = {}
        for index, question in enumerate(questions):
            texts[index] = text = render_question(self._tokenizer, [asdict(message) for message in question.messages])
            ids[index] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            longest_way = max(map(len, self._ways(question.choices)), default=question.max_new_tokens)
            longest = len(ids[index]) + min(longest_way, question.max_new_tokens)
            if positions is not None and longest > positions:
                del ids[index]
                deliver(index, NoAnswer(f"prompt and answer of {longest} tokens, the model reads {positions}", True))
        if not ids:
            return
        # Beside the answers: servers may share that disk alone. The store's lock keeps others out.
        weights = self._store.path.with_name(f"{self._store.path.name}.server_weights")
        with StopSignals() as signals, closing(build_engine(self._engine, self._model, weights)) as engine:
            engine.refresh()
            for rows in self._batches(questions, ids):
                if signals.received():
                    raise KeyboardInterrupt("told to stop; what was answered is kept")
                answers = self._sample(engine, [ids[row] for row in rows], questions[rows[0]])
                for row, answer in zip(rows, answers, strict=True):
                    if answer.finish == "length":
                        answer = replace(answer, text=with_opened_thoughts(texts[row], answer.text))
                    key = questions[row].key(self.identity)
                    self._store.put(key, answer, template=questions[row].template, model=self._cfg.path)
                    deliver(row, answer)

    def _load(self) -> None:
        if self._loaded:
            return
        self._tokenizer = load_tokenizer(self._cfg)
        self._model = load_causal_lm(self._cfg, device=process_device())
        self._ends = stop_ids(self._model, self._tokenizer)
        self._loaded = True

    def _batches(self, questions: Sequence[Question], ids: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
        """Rows of one batch have the same settings; the longest come first, so that a lack of memory shows early."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for row in sorted(ids, key=lambda row: -len(ids[row])):
            question = questions[row]
            settings = (question.temperature, question.top_p, question.max_new_tokens, question.choices)
            groups.setdefault(settings, []).append(row)
        waits = resolved(self._engine, self._model).engine in ("generate", "static")
        size = self._engine.batch_size * (1 if waits else BATCHES)
        for rows in groups.values():
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _sample(self, engine: Engine, prompts: Sequence[Sequence[int]], question: Question) -> list[Answer]:
        if question.choices:
            engine = Generate(self._model, choices=self._ways(question.choices))
        sampling = Sampling(
            max_new_tokens=question.max_new_tokens,
            temperature=question.temperature or 0.0,
            top_p=question.top_p,
            top_k=0,
            end_ids=tuple(self._ends),
            pad_id=self._tokenizer.pad_token_id,
            batch_size=self._engine.batch_size,
        )
        # The seed depends on the first question: a resumed run has other batches, but equal batches get equal answers.
        generator = torch.Generator().manual_seed(int(question.key(self.identity)[:15], 16))
        answers = engine.sample(prompts, sampling, generator)
        return [self._answer(prompt, found.ids_T.tolist()) for prompt, found in zip(prompts, answers, strict=True)]

    def _ways(self, choices: Sequence[str]) -> list[list[int]]:
        """The ids of each choice, with the end of sequence."""
        if not choices:
            return []
        return [
            [*ids, self._tokenizer.eos_token_id]
            for ids in self._tokenizer(list(choices), add_special_tokens=False)["input_ids"]
        ]

    def _answer(self, prompt: Sequence[int], sampled: Sequence[int]) -> Answer:
        end = next((place for place, token in enumerate(sampled) if token in self._ends), None)
        text = decode_text(self._tokenizer, sampled[:end], context=prompt)
        length = len(sampled) if end is None else end + 1
        return Answer(text, "length" if end is None else "stop", prompt_tokens=len(prompt), answer_tokens=length)


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files that hold the weights: a policy that was trained again in the same folder
    counts as another model. Empty for a hub name."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]

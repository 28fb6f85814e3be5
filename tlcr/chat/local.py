"""An instruction-tuned model on this machine, in batches. Its answers are stored like paid ones: they cost time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, Deliver, NoAnswer, Question
from tlcr.config.schema import GeneratorConfig
from tlcr.models.loading import generating_with, load_causal_lm, load_tokenizer, position_limit, stop_ids
from tlcr.text.padding import pad_left
from tlcr.text.tokenization import decode_text, render_question
from tlcr.training.distributed import process_device
from tlcr.training.interrupt import StopSignals

__all__ = ["LocalModel"]


class LocalModel:
    """A ``ChatModel`` of transformers: chat template, batches of similar length, greedy at temperature 0.

    If a question has choices, it can answer only with one of them; it ignores schemas. The model is loaded at the first
    question.
    """

    def __init__(self, cfg: GeneratorConfig, store: AnswerStore, *, batch_size: int) -> None:
        self._cfg, self._store, self._batch_size = cfg, store, batch_size
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
        for index, question in enumerate(questions):
            text = render_question(self._tokenizer, [asdict(message) for message in question.messages])
            ids[index] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            longest_way = max(map(len, self._ways(question.choices)), default=question.max_new_tokens)
            longest = len(ids[index]) + min(longest_way, question.max_new_tokens)
            if positions is not None and longest > positions:
                del ids[index]
                deliver(index, NoAnswer(f"prompt and answer of {longest} tokens, the model reads {positions}", True))
        with StopSignals() as signals:
            for rows in self._batches(questions, ids):
                if signals.received():
                    raise KeyboardInterrupt("told to stop; what was answered is kept")
                answers = self._generate([ids[row] for row in rows], questions[rows[0]])
                for row, answer in zip(rows, answers, strict=True):
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
        for rows in groups.values():
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size]

    def _generate(self, prompts: Sequence[Sequence[int]], question: Question) -> list[Answer]:
        sampling = GenerationConfig(
            do_sample=bool(question.temperature),
            temperature=question.temperature or None,
            top_p=question.top_p if question.temperature else None,
            top_k=0 if question.temperature else None,
            max_new_tokens=question.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
        )
        ids_BP, mask_BP = pad_left(prompts, self._tokenizer.pad_token_id)
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        with generating_with(self._model, sampling), torch.random.fork_rng(devices=devices):
            # The seed depends on the first question: a resumed run has other batches, but equal batches get equal
            # answers.
            torch.manual_seed(int(question.key(self.identity)[:15], 16))
            sampled_BL: torch.Tensor = self._model.generate(  # type: ignore[operator]
                input_ids=ids_BP.to(device),
                attention_mask=mask_BP.long().to(device),
                prefix_allowed_tokens_fn=self._holding_to(question.choices, ids_BP.shape[1]),
            )
        return [
            self._answer(prompt, answer)
            for prompt, answer in zip(prompts, sampled_BL[:, ids_BP.shape[1] :].tolist(), strict=True)
        ]

    def _ways(self, choices: Sequence[str]) -> list[list[int]]:
        """The ids of each choice, with the end of sequence."""
        if not choices:
            return []
        return [
            [*ids, self._tokenizer.eos_token_id]
            for ids in self._tokenizer(list(choices), add_special_tokens=False)["input_ids"]
        ]

    def _holding_to(self, choices: Sequence[str], width: int) -> Callable[[int, torch.Tensor], list[int]] | None:
        """For ``generate``: the tokens that may follow an answer's first ones, of a row with a prompt of ``width``."""
        ways = self._ways(choices)
        if not ways:
            return None

        def allowed(row: int, ids_L: torch.Tensor) -> list[int]:
            begun = ids_L[width:].tolist()
            following = {way[len(begun)] for way in ways if way[: len(begun)] == begun and len(way) > len(begun)}
            return sorted(following) or [
                self._tokenizer.eos_token_id
            ]  # a finished row repeats its end until the others finish

        return allowed

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

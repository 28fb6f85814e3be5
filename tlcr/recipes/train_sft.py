"""Recipe: preferred answers to a supervised fine-tuned policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.loading import check_fits, save_model
from tlcr.models.sft import completion_loss
from tlcr.text.padding import collate_completions
from tlcr.text.tokenization import encode_answers
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.supervised import FitResult, fit, mean_loss
from tlcr.types import EncodedAnswer, PreferencePair

__all__ = ["train_sft"]


def train_sft(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    pairs_train: Sequence[PreferencePair],
    pairs_held_out: Sequence[PreferencePair],
    folder: str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Trains the causal LM ``model``, in place, on the chosen answers and writes it with its tokenizer to ``folder``.

    The loss is the mean over all answer tokens of a batch; prompts carry none. Errors: see ``fit``.
    """
    # 1. prompt and preferred answer as one text; an answer that was not cut ends with the end-of-sequence token
    train, held_out = (_encode(pairs, tokenizer, cfg) for pairs in (pairs_train, pairs_held_out))
    check_fits(model, max((len(answer.ids) for answer in train + held_out), default=0), "an answer with its prompt")

    # 2. maximise the likelihood of the answers, and watch those held out
    collate = partial(collate_completions, pad_token_id=tokenizer.pad_token_id)

    def held_out_likelihood(model: PreTrainedModel) -> dict[str, float]:
        figures = mean_loss(
            model,
            held_out,
            collate=collate,
            loss=completion_loss,
            batch_size=cfg.sft.micro_batch_size or cfg.sft.batch_size,
        )
        return figures | {"perplexity": math.exp(figures["loss"])}

    with open_accelerator(cfg, Path(folder)) as accelerator:
        result = fit(
            model=model,
            examples=train,
            collate=collate,
            loss=completion_loss,
            cfg=cfg.sft,
            folder=folder,
            seed=cfg.seed,
            resume=resume,
            evaluate=held_out_likelihood if held_out else None,
            callbacks=callbacks,
            accelerator=accelerator,
            length=lambda answer: len(answer.ids),
            config=cfg,
        )

    # 3. a model folder that loads anywhere
    save_model(model, tokenizer, folder)
    return result


def _encode(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, cfg: RunConfig) -> list[EncodedAnswer]:
    return encode_answers(
        tokenizer,
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_answer_tokens=cfg.data.max_answer_tokens,
    )

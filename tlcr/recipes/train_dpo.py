"""Recipe: preference pairs to a policy trained by DPO, whose log-ratio is a rival's reward for each token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.dpo import collate_referenced, dpo_loss, with_reference
from tlcr.models.loading import check_fits, save_model
from tlcr.text.tokenization import encode_comparisons
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.supervised import FitResult, fit, mean_loss
from tlcr.types import PreferencePair

__all__ = ["train_dpo"]


def train_dpo(
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
    """Trains the causal LM ``model``, in place, with itself as it comes for the reference; writes it to ``folder``.

    The evaluation has the loss, the accuracy, the margin and both rewards on held-out pairs. Errors: see ``fit``.
    """
    # 1. both answers to each prompt, tokenised in context
    train, held_out = (encode_comparisons(tokenizer, pairs, cfg.data) for pairs in (pairs_train, pairs_held_out))
    check_fits(model, max((pair.length for pair in train + held_out), default=0), "an answer with its prompt")

    # 2. how likely they are to the reference, before the first step (also of a resumed run: its weights come later)
    batch_size = cfg.dpo.micro_batch_size or cfg.dpo.batch_size
    train_referenced, held_out_referenced = (
        with_reference(model, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
        for pairs in (train, held_out)
    )

    # 3. maximise the likelihood of people's choices under the log-ratio, and watch the held-out pairs
    collate = partial(collate_referenced, pad_token_id=tokenizer.pad_token_id)
    loss = partial(dpo_loss, beta=cfg.dpo.beta)

    def held_out_ranking(model: PreTrainedModel) -> dict[str, float]:
        return mean_loss(model, held_out_referenced, collate=collate, loss=loss, batch_size=batch_size)

    with open_accelerator(cfg, Path(folder)) as accelerator:
        result = fit(
            model=model,
            examples=train_referenced,
            collate=collate,
            loss=loss,
            cfg=cfg.dpo,
            folder=folder,
            seed=cfg.seed,
            resume=resume,
            evaluate=held_out_ranking if held_out else None,
            callbacks=callbacks,
            accelerator=accelerator,
            length=lambda pair: pair.length,
            config=cfg,
        )

    # 4. a model folder that loads anywhere
    save_model(model, tokenizer, folder)
    return result

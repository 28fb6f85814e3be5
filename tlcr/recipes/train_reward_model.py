"""Recipe: preference pairs to a sequence-level reward model, the baseline that token rewards are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.loading import check_fits, load_sequence_classifier, save_model
from tlcr.models.reward_model import bradley_terry_loss, collate_comparisons
from tlcr.text.tokenization import encode_comparisons
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.supervised import FitResult, fit, mean_loss
from tlcr.types import PreferencePair

__all__ = ["train_reward_model"]


def train_reward_model(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    causal_lm: PreTrainedModel,
    pairs_train: Sequence[PreferencePair],
    pairs_held_out: Sequence[PreferencePair],
    folder: str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Trains a score on a copy of ``causal_lm``'s backbone (the SFT model's) and writes it to ``folder``.

    ``load_sequence_classifier(folder, cfg.model)`` loads it; ``causal_lm`` stays as it is. The evaluation has the loss,
    the pairwise accuracy and the margin on held-out pairs. Errors: see ``fit``.
    """
    # 1. both answers to each prompt, tokenised in context
    train, held_out = (encode_comparisons(tokenizer, pairs, cfg.data) for pairs in (pairs_train, pairs_held_out))
    check_fits(causal_lm, max((pair.length for pair in train + held_out), default=0), "an answer with its prompt")

    # 2. the classifier: the causal LM's backbone under one output
    model = load_sequence_classifier(causal_lm, cfg.model)
    model.config.pad_token_id = tokenizer.pad_token_id

    # 3. maximise the likelihood of people's choices (Bradley-Terry), and watch the held-out pairs
    collate = partial(collate_comparisons, pad_token_id=tokenizer.pad_token_id)

    def held_out_ranking(model: PreTrainedModel) -> dict[str, float]:
        return mean_loss(
            model,
            held_out,
            collate=collate,
            loss=bradley_terry_loss,
            batch_size=cfg.reward_model.micro_batch_size or cfg.reward_model.batch_size,
        )

    with open_accelerator(cfg, Path(folder)) as accelerator:
        result = fit(
            model=model,
            examples=train,
            collate=collate,
            loss=bradley_terry_loss,
            cfg=cfg.reward_model,
            folder=folder,
            seed=cfg.seed,
            resume=resume,
            evaluate=held_out_ranking if held_out else None,
            callbacks=callbacks,
            accelerator=accelerator,
            length=lambda comparison: comparison.length,
            config=cfg,
        )

    # 4. a model folder that loads anywhere
    save_model(model, tokenizer, folder)
    return result

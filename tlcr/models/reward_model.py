"""The sequence-level baseline: a score for a whole answer, learned from comparisons (Bradley and Terry 1952).

The score is read at the last counted token, where the model has seen the whole answer. The mask gives that place. The
classifiers of transformers look for the padding id instead, and miss the end where that id is also the
end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError
from tlcr.models.heads import classification_head
from tlcr.models.loading import backbone
from tlcr.text.padding import pad_right
from tlcr.training.supervised import LossParts, ranking_loss
from tlcr.types import EncodedComparison

ATTENTION_MODULES = ("self_attn", "attn", "attention", "self_attention")
"""Names of the attention module in the decoders of transformers; the last module of such a name is the last layer's."""


def collate_comparisons(comparisons: Sequence[EncodedComparison], *, pad_token_id: int) -> dict[str, Tensor]:
    """The chosen answers, then the rejected ones, as rows padded on the right: ids (2B, L), attention_mask (2B, L)."""
    rows = [c.chosen.ids for c in comparisons] + [c.rejected.ids for c in comparisons]
    ids_BL, attention_mask_BL = pad_right(rows, pad_token_id)
    return {"ids": ids_BL, "attention_mask": attention_mask_BL}


def bradley_terry_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """`ranking_loss` of the scores s: the margin of a pair is s_chosen - s_rejected."""
    chosen_B, rejected_B = _scores(model, batch["ids"], batch["attention_mask"]).chunk(2)
    return ranking_loss(chosen_B - rejected_B)


@torch.no_grad()
def sequence_scores(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> Tensor:
    """The score of each row, read at its last True column.

    Args:
        model: the sequence reward model.
        ids_BL: integers (B, L), padded on either side or both.
        attention_mask_BL: bool (B, L), True where a token counts.
        micro_batch_size: rows in one forward pass; None: all.

    Returns:
        (B,) float32 without gradient. A row with nothing counted scores 0.
    """
    with _evaluating(model):
        return torch.cat([_scores(model, *part) for part in _parts(ids_BL, attention_mask_BL, micro_batch_size)])


@torch.no_grad()
def prefix_scores(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> Tensor:
    """The score of every prefix: in column j, that of the row cut after column j.

    One pass is enough, because a causal model's state in column j does not depend on later columns.

    Args:
        model: the sequence reward model.
        ids_BL: integers (B, L), padded on either side or both.
        attention_mask_BL: bool (B, L), True where a token counts.
        micro_batch_size: rows in one forward pass; None: all.

    Returns:
        (B, L) float32 without gradient; 0 where not counted.
    """
    with _evaluating(model):
        parts = []
        for ids_bL, mask_bL in _parts(ids_BL, attention_mask_BL, micro_batch_size):
            scores_bL = classification_head(model)(_hidden_states(model, ids_bL, mask_bL)).squeeze(-1).float()
            parts.append(torch.where(mask_bL.bool(), scores_bL, 0.0))
        return torch.cat(parts)


@torch.no_grad()
def scores_and_attention(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The score of each row, and the attention of the position where it is read.

    The model runs in transformers' "eager" implementation, the only one that forms these weights, and gets its
    own implementation back afterwards. The weights of all other layers are dropped at once.

    Args:
        model: the sequence reward model.
        ids_BL: integers (B, L), padded on either side or both.
        attention_mask_BL: bool (B, L), True where a token counts.
        micro_batch_size: rows in one forward pass; None: all.

    Returns:
        The scores (B,), and the last layer's attention (B, L), the mean over its heads, from the column that the score
        is read at to every column. It is at least 0 and sums to 1 over the counted columns. Both float32 without
        gradient.

    Raises:
        ConfigError: the last layer's attention module is not found in this architecture.
    """
    with _evaluating(model), _last_attention(model) as weights:
        parts = []
        for ids_bL, mask_bL in _parts(ids_BL, attention_mask_BL, micro_batch_size):
            scores_b, rows = _scores(model, ids_bL, mask_bL), torch.arange(len(ids_bL), device=ids_bL.device)
            attention_bKL = weights.pop().float().mean(dim=1)
            parts.append((scores_b, attention_bKL[rows, _last_columns(mask_bL.bool())]))
    scores, attention = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(attention)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _last_attention(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list to which every forward pass appends the last layer's attention weights (B, heads, L, L)."""
    found = [m for name, m in backbone(model).named_modules() if name.rpartition(".")[2] in ATTENTION_MODULES]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no module named {' or '.join(ATTENTION_MODULES)}, so its attention cannot be "
            "read; use a decoder such as Llama, Qwen, Mistral, Gemma or GPT-2, or another reward.kind than 'attention'"
        )
    weights: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        given = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(given, Tensor) or given.ndim != 4:
            raise ConfigError(
                f"{type(module).__name__} of {type(model).__name__} does not return its attention weights; use a "
                "decoder such as Llama, Qwen, Mistral, Gemma or GPT-2, or another reward.kind than 'attention'"
            )
        weights.append(given)

    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hook = found[-1].register_forward_hook(keep)
    try:
        yield weights
    finally:
        hook.remove()
        model.set_attn_implementation(own)


def _parts(ids_BL: Tensor, attention_mask_BL: Tensor, micro_batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    size = micro_batch_size or max(len(ids_BL), 1)
    return zip(ids_BL.split(size), attention_mask_BL.split(size), strict=True)


def _scores(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    counted_BL = attention_mask_BL.bool()
    hidden_BLH = _hidden_states(model, ids_BL, counted_BL)
    hidden_BH = hidden_BLH[torch.arange(len(ids_BL), device=ids_BL.device), _last_columns(counted_BL)]
    scores_B = classification_head(model)(hidden_BH).squeeze(-1).float()
    return torch.where(counted_BL.any(dim=1), scores_B, 0.0)


def _hidden_states(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    counted_BL = attention_mask_BL.long()
    return backbone(model)(
        input_ids=ids_BL,
        attention_mask=counted_BL,
        position_ids=(counted_BL.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state


def _last_columns(counted_BL: Tensor) -> Tensor:
    """(B,) the last True column of each row."""
    return counted_BL.shape[1] - 1 - counted_BL.flip(1).int().argmax(dim=1)

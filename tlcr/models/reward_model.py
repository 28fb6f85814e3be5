"""The sequence-level baseline: a score for a whole answer, learned from comparisons (Bradley and Terry 1952).

A decoder's score is read at the last counted token, where the model has seen the whole answer. The mask gives that
place. The classifiers of transformers look for the padding id instead, and miss the end where that id is also the
end-of-sequence token. Any other classifier, such as an encoder, reads its score where it was trained to: it is run as
it is. `tlcr/models/probes.py` finds out which of both a model is.

Each row's counted tokens are moved to the left before a model reads them, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError
from tlcr.models.heads import backbone, classification_head, evaluating
from tlcr.models.probes import reads_last_token
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
    """The score of each row: a decoder's is read at the last True column, any other model pools as it was trained to.

    Args:
        model: the sequence reward model.
        ids_BL: integers (B, L), padded on either side or both.
        attention_mask_BL: bool (B, L), True where a token counts.
        micro_batch_size: rows in one forward pass; None: all.

    Returns:
        (B,) float32 without gradient. A row with nothing counted scores 0.
    """
    with evaluating(model):
        scores = [_scores(model, *part) for part in _parts(ids_BL, attention_mask_BL, micro_batch_size)]
        return torch.cat(scores).float()


@torch.no_grad()
def prefix_scores(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> Tensor:
    """The score of every prefix: in column j, that of the row cut after column j.

    One pass is enough, because a causal model's state in column j does not depend on later columns.

    Args:
        model: the sequence reward model, a decoder.
        ids_BL: integers (B, L), padded on either side or both.
        attention_mask_BL: bool (B, L), True where a token counts.
        micro_batch_size: rows in one forward pass; None: all.

    Returns:
        (B, L) float32 without gradient; 0 where not counted.
    """
    with evaluating(model):
        parts = []
        for ids_bL, mask_bL in _parts(ids_BL, attention_mask_BL, micro_batch_size):
            row = _moved_left(ids_bL, mask_bL)
            scores_bL = classification_head(model)(_hidden_states(model, row)).squeeze(-1).float()
            parts.append(torch.where(mask_bL.bool(), row.back(scores_bL), 0.0))
        return torch.cat(parts)


@torch.no_grad()
def scores_and_attention(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The score of each row, and the attention of the position where it is read.

    The model runs in transformers' "eager" implementation, the only one that forms these weights, and gets its
    own implementation back afterwards. The weights of all other layers are dropped at once.

    Args:
        model: the sequence reward model, a decoder.
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
    with evaluating(model), _last_attention(model) as weights:
        parts = []
        for ids_bL, mask_bL in _parts(ids_BL, attention_mask_BL, micro_batch_size):
            row = _moved_left(ids_bL, mask_bL)
            scores_b = _decoder_scores(model, row)
            attention_bKL = weights.pop().float().mean(dim=1)
            parts.append((scores_b, row.back(row.at_last(attention_bKL))))
    scores, attention = zip(*parts, strict=True)
    return torch.cat(scores).float(), torch.cat(attention)


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


class _Rows(NamedTuple):
    """Rows whose counted tokens stand on the left, in their order, and where each column came from."""

    ids_BL: Tensor
    counted_BL: Tensor
    source_BL: Tensor

    def at_last(self, values_BLX: Tensor) -> Tensor:
        """The values (B, ...) of each row's last counted column; of column 0 where nothing is counted."""
        last_B = (self.counted_BL.sum(dim=1) - 1).clamp(min=0)
        return values_BLX[torch.arange(len(last_B), device=last_B.device), last_B]

    def back(self, values_BL: Tensor) -> Tensor:
        """The values (B, L) in the columns that their tokens came from."""
        return values_BL.gather(1, self.source_BL.argsort(dim=1))


def _moved_left(ids_BL: Tensor, attention_mask_BL: Tensor) -> _Rows:
    counted_BL = attention_mask_BL.bool()
    source_BL = counted_BL.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return _Rows(ids_BL.gather(1, source_BL), counted_BL.gather(1, source_BL), source_BL)


def _scores(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """(B,) float32, or float64 where the model's scores are: the loss keeps their digits."""
    rows = _moved_left(ids_BL, attention_mask_BL)
    if reads_last_token(model):
        return _decoder_scores(model, rows)
    scores_B = model(input_ids=rows.ids_BL, attention_mask=rows.counted_BL.long()).logits.squeeze(-1)
    return torch.where(rows.counted_BL.any(dim=1), _at_least_float32(scores_B), 0.0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _decoder_scores(model: PreTrainedModel, rows: _Rows) -> Tensor:
    scores_B = classification_head(model)(rows.at_last(_hidden_states(model, rows))).squeeze(-1)
    return torch.where(rows.counted_BL.any(dim=1), _at_least_float32(scores_B), 0.0)


def _hidden_states(model: PreTrainedModel, rows: _Rows) -> Tensor:
    inputs = {"input_ids": rows.ids_BL, "attention_mask": rows.counted_BL.long(), "use_cache": False}
    states_BLH: Tensor = backbone(model)(**inputs).last_hidden_state
    return states_BLH

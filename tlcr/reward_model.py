"""The sequence-level baseline: a score for a whole answer, learned from comparisons (Bradley and Terry 1952).

The score is read where the model has seen everything, at the last counted token. That place comes from the mask: the
pooling of transformers' own classifiers looks for the padding id instead, and where that is also the end-of-sequence
token it misses the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from tlcr.models import backbone, classification_head
from tlcr.padding import pad_right
from tlcr.supervised import LossParts
from tlcr.types import EncodedAnswer


@dataclass(frozen=True)
class EncodedComparison:
    """A preference pair, tokenised."""

    chosen: EncodedAnswer
    rejected: EncodedAnswer

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


def collate_comparisons(comparisons: Sequence[EncodedComparison], *, pad_token_id: int) -> dict[str, Tensor]:
    """The chosen answers, then the rejected ones, as rows padded on the right: ids (2B, L), attention_mask (2B, L)."""
    rows = [c.chosen.ids for c in comparisons] + [c.rejected.ids for c in comparisons]
    ids_BL, attention_mask_BL = pad_right(rows, pad_token_id)
    return {"ids": ids_BL, "attention_mask": attention_mask_BL}


def bradley_terry_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """The sum over pairs of -log sigmoid(s_chosen - s_rejected), and the number of pairs.

    Statistics: accuracy, the share of pairs ranked as people did (a tie is half right); margin, s_chosen - s_rejected.
    """
    chosen_B, rejected_B = _scores(model, batch["ids"], batch["attention_mask"]).chunk(2)
    margin_B = chosen_B - rejected_B
    pairs = len(margin_B)
    right = (margin_B > 0).sum() + 0.5 * (margin_B == 0).sum()
    return LossParts(
        softplus(-margin_B).sum(), pairs, {"accuracy": (right, pairs), "margin": (margin_B.sum().detach(), pairs)}
    )


@torch.no_grad()
def sequence_scores(
    model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, *, micro_batch_size: int | None = None
) -> Tensor:
    """The score of each row, (B,) float32 without gradient, read at its last True column.

    ids_BL, attention_mask_BL: (B, L), padded on either side or both; True counts. A row with nothing counted scores 0.
    micro_batch_size: rows in one forward pass; default: all.
    """
    training = model.training
    model.eval()
    size = micro_batch_size or max(len(ids_BL), 1)
    parts = [_scores(model, *part) for part in zip(ids_BL.split(size), attention_mask_BL.split(size), strict=True)]
    model.train(training)
    return torch.cat(parts)


def _scores(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    counted_BL = attention_mask_BL.bool()
    hidden_BLH = (
        backbone(model)(
            input_ids=ids_BL,
            attention_mask=counted_BL.long(),
            position_ids=(counted_BL.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
    ).last_hidden_state
    last_B = ids_BL.shape[1] - 1 - counted_BL.flip(1).int().argmax(dim=1)
    hidden_BH = hidden_BLH[torch.arange(len(ids_BL), device=ids_BL.device), last_B]
    scores_B = classification_head(model)(hidden_BH).squeeze(-1).float()
    return torch.where(counted_BL.any(dim=1), scores_B, 0.0)

"""How many tokens a model reads in one row, and what is refused because it has more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from tlcr.errors import DataError

LIMITS = ("data.max_prompt_tokens", "data.max_answer_tokens", "rollout.max_new_tokens")
"""What limits the texts of a run."""
DATA_LIMITS = ("data.max_prompt_tokens", "data.max_answer_tokens")
"""What limits the texts that a stage is trained on."""
ROLLOUT_LIMITS = ("data.max_prompt_tokens", "rollout.max_new_tokens")
"""What limits a prompt with an answer of the policy."""
CONVERSATION_LIMITS = (*ROLLOUT_LIMITS, "rollout.max_turns", "rollout.max_message_tokens")
"""The same where an environment answers the policy."""


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read in one row.

    Args:
        model: any model; it may be on the meta device.

    Returns:
        ``max_position_embeddings`` of its config, without the rows that models of RoBERTa's kind keep for padding;
        None where the config names no limit.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # their positions count from the padding's row on
    return limit


def check_fits(model: PreTrainedModel, tokens: int, what: str, limits: Sequence[str] = LIMITS) -> None:
    """Refuses a text that is longer than the model has positions.

    Args:
        model: the model that is to read it.
        tokens: how many tokens the text has.
        what: what the text is, as the beginning of a sentence.
        limits: the knobs or flags that keep it shorter, for the error's text.

    Raises:
        DataError: the text is longer.
    """
    check_positions(position_limit(model), tokens, what, reader="the model", limits=limits)


def check_positions(
    positions: int | None, tokens: int, what: str, *, reader: str, limits: Sequence[str] = LIMITS
) -> None:
    """``check_fits`` for a model whose positions are known.

    Args:
        positions: how many tokens it reads in one row; None: there is no limit.
        tokens: how many tokens the text has.
        what: what the text is, as the beginning of a sentence.
        reader: the model, as the error calls it.
        limits: as for ``check_fits``.

    Raises:
        DataError: the text is longer.
    """
    if positions is not None and tokens > positions:
        raise DataError(
            f"{what} has {tokens} tokens, and {reader} reads at most {positions} (max_position_embeddings); lower "
            f"{', '.join(limits[:-1])} or {limits[-1]}"
        )

"""A discriminator in the trainer's own process, where its versions of torch and transformers are tlcr's too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcr.errors import HostError
from tlcr.hosts.client import vocabulary_fingerprint
from tlcr.hosts.contract import Item, checked

if TYPE_CHECKING:
    import torch

__all__ = ["LocalScorer"]


class LocalScorer:
    """A ``Scorer`` on a discriminator's folder. The model is loaded once, and is not trained."""

    def __init__(
        self, folder: str | Path, *, device: str | torch.device | None = None, batch_tokens: int = 16384
    ) -> None:
        """Loads the discriminator.

        Args:
            folder: where ``tlcr train discriminator`` saved it, or any token classifier with its labels.
            device: where it computes; None: the CPU.
            batch_tokens: the most cells, padding included, of one forward pass; a longer row has one of its own.

        Raises:
            ConfigError: the folder does not hold a discriminator.
        """
        import torch

        from tlcr.config.schema import ModelConfig
        from tlcr.models.discriminator import load_discriminator
        from tlcr.models.positions import position_limit

        self.folder, self.batch_tokens = str(folder), batch_tokens
        self.model, self.tokenizer = load_discriminator(
            folder, ModelConfig(), device=torch.device(device) if device is not None else None
        )
        self.positions = position_limit(self.model)
        self.vocabulary = int(self.model.config.get_text_config().vocab_size)

    def token_rewards(self, items: Sequence[Item]) -> list[list[float]]:
        """The rewards of each answer's tokens, as ``tlcr.hosts.contract`` defines them.

        Tokens that do not count are read like all others, and paid 0.

        Args:
            items: the answers.

        Returns:
            One list for each item.

        Raises:
            HostError: an id is outside the vocabulary, a prompt with its answer is longer than the model reads, or the
                logits are not finite.
        """
        self._require_readable(items)
        rewards: list[list[float]] = [[] for _ in items]
        for batch in self._batches(items):
            for number, row in zip(batch, self._score([items[i] for i in batch]), strict=True):
                rewards[number] = row
        return checked(rewards, items)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a policy whose ids mean other tokens than the discriminator's.

        Args:
            tokenizer: the policy's, of transformers.

        Raises:
            HostError: vocabularies or ends of sequence differ.
        """
        theirs, ours = vocabulary_fingerprint(self.tokenizer), vocabulary_fingerprint(tokenizer)
        if theirs != ours:
            raise HostError(
                f"the policy's tokenizer ({ours}) is not that of the discriminator {self.folder!r} ({theirs}): its ids "
                "would mean other tokens; train a discriminator with the policy's tokenizer"
            )

    def _score(self, items: Sequence[Item]) -> list[list[float]]:
        """One forward pass."""
        from tlcr.models.discriminator import token_opinions
        from tlcr.types import EncodedAnswer

        rows = [
            EncodedAnswer(tuple(map(int, [*item.prompt_ids, *item.response_ids])), len(item.prompt_ids), complete=True)
            for item in items
        ]
        opinions = token_opinions(self.model, rows, pad_token_id=self.tokenizer.pad_token_id or 0, batch_size=len(rows))
        return [opinion.rewards_T.tolist() for opinion in opinions]

    def _batches(self, items: Sequence[Item]) -> Iterator[list[int]]:
        """Indices of answers of like length, the longest first; answers without tokens have nothing to score."""
        lengths = [len(item.prompt_ids) + len(item.response_ids) for item in items]
        waiting = sorted((i for i, item in enumerate(items) if len(item.response_ids)), key=lambda i: -lengths[i])
        while waiting:
            rows = max(self.batch_tokens // lengths[waiting[0]], 1)
            yield waiting[:rows]
            del waiting[:rows]

    def _require_readable(self, items: Sequence[Item]) -> None:
        for number, item in enumerate(items):
            largest = max([*item.prompt_ids, *item.response_ids], default=0)
            if largest >= self.vocabulary:
                raise HostError(
                    f"answer {number} has the token id {largest}, and the discriminator {self.folder!r} has "
                    f"{self.vocabulary} tokens; it was trained with another tokenizer: send it text"
                )
            length = len(item.prompt_ids) + len(item.response_ids)
            if self.positions is not None and length > self.positions:
                raise HostError(
                    f"answer {number} has {length} tokens with its prompt, and the discriminator {self.folder!r} reads "
                    f"at most {self.positions} (max_position_embeddings); make the trainer's prompts or answers shorter"
                )

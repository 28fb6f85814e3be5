"""Recipe: the policy's own answers to a discriminator that keeps up with it (TLCR with self-training; ours).

A discriminator learns from edits of answers that others wrote. As PPO moves the policy, its answers leave that
distribution, and the rewards go stale. A refresh has the answers of one round revised by whoever revised the first
ones, labels them by the same alignment, and trains the discriminator on from where it is:

    answers of the round -> revisions -> token labels -> a pass over them, mixed with pairs of the first training
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.data.labels import label_pair
from tlcr.errors import TrainingDiverged
from tlcr.evaluation.discriminator_metrics import evaluate_predictions
from tlcr.models.discriminator import collate_pairs, label_loss, load_discriminator, predict_tokens, temperature_of
from tlcr.models.lora.files import save_trained
from tlcr.recipes.fitting import micro_batch_size
from tlcr.training.optim import (
    begin_again,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    parameter_groups,
    scale_gradients,
)
from tlcr.types import EditPair, LabelledPair, Rollout

__all__ = ["FOLDER", "DiscriminatorRefresh", "Revise"]

FOLDER = "discriminator"
"""Of a PPO run: the discriminator as its last refresh left it."""
MEASURED_OF = 4
"""Every so many-th answer of a refresh is measured on and never trained on."""
RATE_SHARE = 0.1
"""The rate of a refresh, as a share of the first training's, unless it is named."""

Revise = Callable[[Sequence[tuple[str, str]], int], Sequence[EditPair | None]]
"""(prompt, answer) pairs and the updates done, to the edit of each answer; None where a reviser settled none."""


class DiscriminatorRefresh:
    """Trains a discriminator, in place, on revisions of what the policy says now.

    Attributes:
        model: the discriminator. It is a part of PPO's checkpoints.
        optimizer: begins again at each refresh, with the bits that rounding took from the weights in the one before.
    """

    def __init__(
        self,
        cfg: RunConfig,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        original: Callable[[], Sequence[LabelledPair]],
        revise: Revise,
        seed: int,
    ) -> None:
        """Takes what does not change from one refresh to the next.

        Args:
            cfg: its ``reward.refresh`` says how often and how; ``discriminator`` targets, batch and weight decay;
                ``data`` and ``labels`` how texts are cut and labelled.
            model: the discriminator that the reward source reads.
            tokenizer: the discriminator's, which is the policy's.
            original: gives the pairs that it was first trained on; called once, at the first refresh that mixes them
                in.
            revise: edits answers.
            seed: of the PPO run; with the number of updates it decides what is drawn, so that a resumed run repeats it.
        """
        self.cfg, self.model, self.tokenizer, self.seed = cfg, model, tokenizer, seed
        self._original, self._revise = original, revise
        self._pairs: Sequence[LabelledPair] | None = None
        rate = cfg.reward.refresh.learning_rate or RATE_SHARE * cfg.discriminator.learning_rate
        self.optimizer = build_optimizer(
            parameter_groups(model, learning_rate=rate, weight_decay=cfg.discriminator.weight_decay)
        )

    def due(self, updates: int) -> bool:
        """Whether a refresh follows after this many updates; none follows the last, which no reward would see.

        Args:
            updates: how many updates are done.

        Returns:
            True where ``__call__`` is to be called.
        """
        return updates % self.cfg.reward.refresh.every == 0 and updates < self.cfg.ppo.updates

    def __call__(self, rollout: Rollout, updates: int) -> dict[str, float]:
        """One refresh.

        Args:
            rollout: the answers of the round.
            updates: how many updates are done, this round's included.

        Returns:
            Figures by name, documented in docs/metrics.md. Areas under the curve are over edited tokens, positive
            against negative; one that is undefined is left out.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite.
        """
        answers = list(zip(rollout.prompts, rollout.responses, strict=True))
        # By place: two answers may be one text, of which one ended and the limit cut the other.
        settled = [
            (edit, ended)
            for edit, ended in zip(self._revise(answers, updates), rollout.ended_B.tolist(), strict=True)
            if edit is not None
        ]
        fresh = [self._labelled(edit, ended=ended) for edit, ended in settled]
        measured = fresh[::MEASURED_OF]
        trained = [pair for number, pair in enumerate(fresh) if number % MEASURED_OF]
        rng = random.Random(f"refresh {self.seed} {updates}")
        mixed = [*trained, *self._replayed(len(trained), rng)]
        rng.shuffle(mixed)
        figures = {
            "refresh/pairs": float(len(fresh)),
            "refresh/revised_share": sum(edit.rejected != edit.revised for edit, _ in settled) / max(len(settled), 1),
            **self._auc("before", measured),
        }
        if mixed:
            figures["refresh/loss"] = self._train(mixed, updates)
        return {**figures, **self._auc("after", measured)}

    def save(self, folder: Path) -> None:
        """Writes the discriminator as a model folder.

        Args:
            folder: of the PPO run.
        """
        save_trained(self.model, self.tokenizer, folder / FOLDER)

    def restore(self, folder: Path) -> None:
        """Loads the weights that ``save`` wrote.

        Args:
            folder: of the PPO run.
        """
        saved, _ = load_discriminator(folder / FOLDER, self.cfg.model, device=self.model.device)
        self.model.load_state_dict(saved.state_dict())

    def _labelled(self, edit: EditPair, *, ended: bool) -> LabelledPair:
        data = self.cfg.data
        pair = label_pair(
            edit,
            self.tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_answer_tokens=min(data.max_answer_tokens, self.cfg.rollout.max_new_tokens),
            end_of_sequence=self.cfg.labels.end_of_sequence,
        )
        if ended or not pair.rejected.encoded.complete:
            return pair
        # The policy chose no end for an answer that its limit cut. Its text may take fewer tokens than were sampled,
        # and then an end has been put behind it.
        return replace(pair, rejected=replace(pair.rejected, counted=(*pair.rejected.counted[:-1], False)))

    def _replayed(self, fresh: int, rng: random.Random) -> list[LabelledPair]:
        """As many pairs of the first training as make up ``refresh.share`` of all."""
        share = self.cfg.reward.refresh.share
        if share == 0:
            return []
        if self._pairs is None:
            self._pairs = self._original()
        return rng.sample(self._pairs, min(round(fresh * share / (1 - share)), len(self._pairs)))

    def _auc(self, when: str, pairs: Sequence[LabelledPair]) -> dict[str, float]:
        if not pairs:
            return {}
        settings = self.cfg.discriminator
        predictions = predict_tokens(
            self.model,
            pairs,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=2 * micro_batch_size(settings),
        )
        found = evaluate_predictions(
            predictions, temperature=temperature_of(self.model), targets=settings.targets, calibrated=False
        )
        kept = {"auc_positive_negative": "auc", "nll": "nll"}
        return {f"refresh/{kept[name]}_{when}": value for name, value in found.defined.items() if name in kept}

    def _train(self, pairs: Sequence[LabelledPair], updates: int) -> float:
        """One pass over the pairs; returns the mean loss of its steps."""
        settings, optimizer = self.cfg.discriminator, self.optimizer
        collate = partial(collate_pairs, pad_token_id=self.tokenizer.pad_token_id, targets=settings.targets)
        size, losses = micro_batch_size(settings), []
        self.model.train()
        for first in range(0, len(pairs), settings.batch_size):
            batch = pairs[first : first + settings.batch_size]
            optimizer.zero_grad()
            total = weight = 0.0
            for start in range(0, len(batch), size):
                tensors = {name: x.to(self.model.device) for name, x in collate(batch[start : start + size]).items()}
                parts = label_loss(self.model, tensors)
                parts.total.backward()
                total, weight = total + float(parts.total.detach()), weight + float(parts.weight)
            if weight == 0:  # hard targets, and nothing of the batch was edited
                continue
            scale_gradients(self.model.parameters(), 1 / weight)
            norm = gradient_norm(self.model.parameters()).item()
            if not math.isfinite(total) or not math.isfinite(norm):
                rate = optimizer.param_groups[0]["lr"]
                raise TrainingDiverged(
                    f"the refresh of the discriminator after {updates} updates has the loss {total / weight} and "
                    f"gradient norm {norm}; lower reward.refresh.learning_rate (now {rate:g})"
                )
            clip_gradients(self.model.parameters(), norm, settings.max_grad_norm)
            optimizer.step()
            losses.append(total / weight)
        optimizer.zero_grad()
        begin_again(optimizer)
        self.model.eval()
        return sum(losses) / max(len(losses), 1)

"""Rewards from a function of the user."""

from __future__ import annotations

import numbers

import numpy as np
import torch
from torch import Tensor

from tlcr.config.functions import REWARD_KEYWORDS, failure, import_reward
from tlcr.errors import ConfigError, DataError, ShapeError
from tlcr.rewards.sources.frozen_model import counted
from tlcr.rewards.sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class CallableSource(Stateless):
    """A function of the user, named 'package.module:function'.

    It is called with keywords, once for each rollout of a process:

        prompts         list of B strings, complete (template and special tokens in them)
        responses       list of B strings, of a conversation with its messages
        response_ids    list of B lists: the ids of the counted tokens, the end of sequence among them
        mask            (B, T) bool tensor on the CPU, True where a response token counts
        ended           list of B bools: False where the length limit cut the answer off

    and returns one of: B numbers (list, array or tensor), a score for each answer; B lists of numbers, as long as that
    row's `response_ids`, a reward for each token; a (B, T) array or tensor, the same padded; or a `RewardSignal`, whose
    `sequence_B` is the reward model's.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = import_reward(path)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        mask_BT = rollout.mask_BT.cpu()
        try:
            result = self.function(
                prompts=list(rollout.prompts),
                responses=list(rollout.responses),
                response_ids=counted(rollout.response_ids_BT, mask_BT),
                mask=mask_BT.clone(),  # a function may write into what it is given
                ended=rollout.ended_B.tolist(),
            )
        except (Exception, SystemExit) as error:  # sys.exit() of a function would end the run with its code, 0 say
            raise DataError(
                f"reward.callable {self.path!r} raised {failure(error)}; it is called with the keywords "
                f"{', '.join(REWARD_KEYWORDS)}"
            ) from error
        signal = self._signal(result, mask_BT)
        device = rollout.mask_BT.device
        given = {name: value.to(device) for name, value in vars(signal).items() if value is not None}
        return RewardSignal(**given)

    def _signal(self, result: object, mask_BT: Tensor) -> RewardSignal:
        if isinstance(result, RewardSignal) and result.sequence_B is not None:
            raise ConfigError(
                f"reward.callable {self.path!r} set sequence_B, which is the sequence reward model's score "
                "(reward.sequence_coef); give a score of whole answers as terminal_B"
            )
        if isinstance(result, RewardSignal):
            return result
        B, T = mask_BT.shape
        if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
            result = torch.as_tensor(result)
        if isinstance(result, Tensor) and result.is_complex():
            raise self._wrong(f"a {str(result.dtype).removeprefix('torch.')} Tensor", mask_BT)
        if isinstance(result, Tensor):
            if result.shape == (B,):
                return RewardSignal(terminal_B=result.detach().float())
            if result.shape == (B, T):
                return RewardSignal(dense_BT=result.detach().float())
            raise self._wrong(f"a {type(result).__name__} of shape {tuple(result.shape)}", mask_BT)
        if not isinstance(result, (list, tuple)):
            raise self._wrong(f"a {type(result).__name__}", mask_BT)
        rows = [row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row for row in result]
        if len(rows) != B:
            raise self._wrong(f"a {type(result).__name__} of {len(rows)}", mask_BT)
        if all(isinstance(row, numbers.Real) for row in rows):
            return RewardSignal(terminal_B=torch.tensor(rows, dtype=torch.float32))
        dense_BT = torch.zeros(B, T)
        for b, row in enumerate(rows):
            if not isinstance(row, (list, tuple)):
                raise self._wrong(f"a {type(row).__name__} for answer {b}", mask_BT)
            values = [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in row]
            wrong = [value for value in values if not isinstance(value, numbers.Real)]
            if wrong:
                raise self._wrong(f"a {type(wrong[0]).__name__} among the rewards of answer {b}", mask_BT)
            if len(values) != int(mask_BT[b].sum()):
                raise self._wrong(
                    f"{len(values)} rewards for answer {b}, which has {int(mask_BT[b].sum())} tokens", mask_BT
                )
            dense_BT[b, mask_BT[b]] = torch.tensor(values, dtype=torch.float32)
        return RewardSignal(dense_BT=dense_BT)

    def _wrong(self, got: str, mask_BT: Tensor) -> ShapeError:
        B, T = mask_BT.shape
        return ShapeError(
            f"reward.callable {self.path!r} returned {got}; wanted {B} numbers (a score for each answer), {B} lists of "
            f"numbers as long as the lists in response_ids (a reward for each token), or an array or tensor of shape "
            f"({B},) or ({B}, {T}) as the mask has it"
        )

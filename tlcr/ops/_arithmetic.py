"""The dtype in which the ops compute."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the operands' own dtype: autocast would quietly round them to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

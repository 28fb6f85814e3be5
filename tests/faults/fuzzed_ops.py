"""Every op by its C++ and by torch's own, forward and backward, with arguments that mostly do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.faults.drawn import Draw
from tlcr import ops

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), max_size=4)
TYPES = st.sampled_from(
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.float8_e4m3fn,
    ]
)


def _tensor(draw: Draw, shape: list[int] | None = None, dtype: torch.dtype | None = None) -> Any:
    if not draw(st.integers(0, 12)):
        return draw(st.sampled_from([None, 1.0, [1.0], "a", float("nan")]))
    if shape is None or not draw(st.integers(0, 6)):
        shape = draw(SHAPES)
    dtype = draw(TYPES) if dtype is None or not draw(st.integers(0, 6)) else dtype
    made = torch.rand(shape).mul(9).sub(2).to(dtype)
    way = draw(st.sampled_from(["", "", "", "", "transposed", "strided", "sparse", "grad", "expanded", "meta"]))
    if way == "transposed" and made.dim() > 1:
        made = made.transpose(0, -1).contiguous().transpose(0, -1)
    elif way == "strided" and made.dim():
        made = torch.stack([made, made], -1)[..., 0]
    elif way == "sparse" and dtype == torch.float32:
        made = made.to_sparse()
    elif way == "grad" and made.is_floating_point() and dtype != torch.float8_e4m3fn:
        made.requires_grad_()
    elif way == "expanded" and made.dim() and made.shape[0]:
        made = made[:1].expand(made.shape)
    elif way == "meta":
        made = made.to("meta")
    return made


def arguments_of_the_ops(draw: Draw) -> None:
    """One op, and the backward of what came out of it."""
    B, T, V = draw(st.tuples(*(st.sampled_from([0, 1, 2, 3, 7]) for _ in range(3))))
    f32, bf16, mask, ids = torch.float32, torch.bfloat16, torch.bool, torch.int64
    pair = lambda: _tensor(draw, [B, T], f32)  # noqa: E731
    number = lambda: draw(st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e-30, float("nan"), float("inf"), None]))  # noqa: E731
    impl = draw(st.sampled_from(["cpp", "reference"]))
    calls: dict[str, Callable[[], Any]] = {
        "reward": lambda: ops.fused_reward(
            _tensor(draw, [B, T, 2], f32),
            _tensor(draw, [B, T], mask),
            kl=pair(),
            kl_coef=number(),
            clip=number(),
            impl=impl,
        ),
        "gae": lambda: ops.fused_gae(
            pair(),
            pair(),
            _tensor(draw, [B, T], mask),
            gamma=number(),
            lam=number(),
            whiten=draw(st.booleans()),
            impl=impl,
        ),
        "ppo": lambda: ops.ppo_loss(
            pair(),
            pair(),
            pair(),
            _tensor(draw, [B, T], mask),
            values=pair(),
            old_values=pair(),
            returns=pair(),
            impl=impl,
        ),
        "score": lambda: ops.score_tokens(
            _tensor(draw, [B, T, V], f32),
            _tensor(draw, [B, T], ids),
            ref_logits=_tensor(draw, [B, T, V], f32),
            temperature=number(),
            impl=impl,
        ),
        "hidden": lambda: ops.score_hidden(
            _tensor(draw, [B, T, 4], f32),
            _tensor(draw, [V, 4], f32),
            _tensor(draw, [B, T], ids),
            temperature=number(),
            impl=impl,
        ),
        "hidden reward": lambda: ops.reward_from_hidden(
            _tensor(draw, [B, T, 4], f32), _tensor(draw, [2, 4], f32), _tensor(draw, [B, T], mask), impl=impl
        ),
        "rms": lambda: ops.rms_norm(_tensor(draw, [B, T], f32), _tensor(draw, [T], f32), eps=number(), impl=impl),
        "silu": lambda: ops.gated_silu(pair(), pair(), impl=impl),
        "adamw": lambda: ops.adamw_step(
            *([_tensor(draw, [T], kind)] * draw(st.integers(0, 2)) for kind in (bf16, bf16, f32, f32, torch.int16)),
            learning_rate=number(),
            betas=draw(st.sampled_from([(0.9, 0.99), (0.9,), (0.9, 0.9, 0.9), 0.9, (2.0, None)])),
            step=draw(st.sampled_from([1, 0, -1, 2**70, 1.5, None])),
            impl=impl,
        ),
        "labels": lambda: ops.token_labels(
            draw(st.lists(st.integers(-1, 3), max_size=5)), draw(st.lists(st.integers(), max_size=5))
        ),
    }
    found = calls[draw(st.sampled_from(sorted(calls)))]()
    leaves = [
        t for t in (found if isinstance(found, tuple) else [found]) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if leaves:
        sum(t.float().sum() for t in leaves).backward()

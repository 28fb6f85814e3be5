"""The functions of tlcr's arithmetic. Code outside this package calls an implementation only through them.

Axes: B batch, T response tokens, V vocabulary, H hidden, C classes, N packed tokens. Index t of every (B, T) value
belongs to the action that emitted response token t. A mask is True where a token counts (an integer mask counts where
it is not 0); a value at a token that does not count, NaN included, never changes a result or a gradient. B = 0, T = 0,
any strides and rows with nothing counted are legal. KL, entropy and log-probabilities are in nats.

Arithmetic and results are float64 where any input is float64 (of a reward: the logits, or what makes them), else
float32; gradients come back in the dtype of their input. The ops do not wait for the device. `impl` names an
implementation: "auto" takes the best one that can run, "reference" is the specification in plain torch, and
`available()` lists the rest. Every op raises, beside what its own docstring says, `ShapeError` for a tensor of the
wrong shape, dtype or device, `ConfigError` for an option out of bounds or one that does not apply, and
`BackendUnavailable` for a named implementation that cannot run. Kernels have first derivatives of torch.autograd only,
and raise `NoDerivative` where another is asked for.
"""

from tlcr.ops._extension import build_info
from tlcr.ops._registry import OpStatus, devices, register, status
from tlcr.ops.adamw import ADAMW_STEP, adamw_step
from tlcr.ops.alignment import token_labels
from tlcr.ops.gae import FUSED_GAE, fused_gae
from tlcr.ops.layers import GATED_SILU, RMS_NORM, gated_silu, rms_norm
from tlcr.ops.ppo import PPO_LOSS, ppo_loss
from tlcr.ops.reward import FUSED_REWARD, REWARD_FROM_HIDDEN, fused_reward, reward_from_hidden
from tlcr.ops.scoring import SCORE_HIDDEN, SCORE_TOKENS, score_hidden, score_tokens
from tlcr.ops.types import PPOLoss, TokenLabel, TokenScores

__all__ = [
    "OpStatus",
    "PPOLoss",
    "TokenLabel",
    "TokenScores",
    "adamw_step",
    "available",
    "build_info",
    "fused_gae",
    "fused_reward",
    "gated_silu",
    "ppo_loss",
    "reward_from_hidden",
    "rms_norm",
    "score_hidden",
    "score_tokens",
    "token_labels",
]

# The spec of every op. An op is registered by being listed here.
OPS = (
    FUSED_REWARD,
    REWARD_FROM_HIDDEN,
    FUSED_GAE,
    PPO_LOSS,
    SCORE_TOKENS,
    SCORE_HIDDEN,
    ADAMW_STEP,
    RMS_NORM,
    GATED_SILU,
)
register(OPS)


def available() -> list[OpStatus]:
    """For every op and kind of device: the choice of "auto", the usable names, and why each other one cannot run.

    Where there are GPUs, CUDA is initialised in this process, because what they can run is asked of them.
    """
    return [status(op, device) for op in OPS for device in devices()]

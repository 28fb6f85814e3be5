"""What an advantage says about its own token: a reward at every token, and the same rewards as a sum at the end.

Let d_t be the true one-step advantage of token t: its reward and the change of the true value. The d_t of an answer of
T tokens are uncorrelated, each of variance s^2. With the exact value function the temporal differences of both
placements are d_t, so the placement of a reward changes nothing. It matters by what the value model does not know.

*Reward at every token.* The value model has to know the rewards to come. With an error e_t, the advantage is

    A_t = sum over k >= t of lam^(k-t) (d_k + e_(k+1) - e_k)

*Sum at the end.* The value model must also know the sum of the rewards before t, which the prefix decides but nobody
tells. Let it follow that sum by a share q, between 0 (it knows nothing of it) and 1 (exact). The temporal differences
are q d_t, and at the last token q d_T + (1 - q) (d_1 + ... + d_T). So

    A_t = q * sum over k >= t of lam^(k-t) d_k  +  (1 - q) lam^(T-t) * sum over all k of d_k

`squared_correlation` is corr(A_t, d_t)^2 over all tokens t: the share of the advantage's variance that is about its
token. The smaller it is, the more tokens have to be sampled, in proportion. Ours; the advantage is that of Schulman et
al. 2016 with gamma 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["loading", "squared_correlation"]


def loading(length: int, lam: float, *, known: float = 1.0) -> np.ndarray:
    """How much of d_k is in A_t: row t, column k of an answer.

    Args:
        length: tokens of the answer, T.
        lam: lambda of GAE, in [0, 1].
        known: the share q of the rewards before a token that the value model knows; 1: the reward at every token.

    Returns:
        (T, T) float64.
    """
    place = np.arange(length)
    ahead_TT = place[None, :] - place[:, None]
    discounted_TT = np.where(ahead_TT >= 0, float(lam) ** np.maximum(ahead_TT, 0), 0.0)
    to_the_end_T = float(lam) ** (length - 1 - place)
    return known * discounted_TT + (1 - known) * to_the_end_T[:, None]


def squared_correlation(
    lengths: Sequence[int], lam: float, *, known: float = 1.0, error: float = 0.0, persistence: float = 1.0
) -> float:
    """corr(A_t, d_t)^2, pooled over the tokens of answers of these lengths.

    Args:
        lengths: tokens of each answer.
        lam: lambda of GAE, in [0, 1].
        known: the share q of the rewards before a token that the value model knows; 1 for a reward at every token.
        error: variance of the value's further error e_t, in units of s^2.
        persistence: its correlation from one token to the next, in [0, 1]; 1 is an error that stays over the answer.

    Returns:
        Between 0 and 1.
    """
    own = total = 0.0
    tokens = 0
    for length in lengths:
        loading_TT = loading(length, lam, known=known)
        own += float(np.trace(loading_TT))
        total += float(np.square(loading_TT).sum())
        tokens += length
        if error:
            place = np.arange(length)
            covariance_TT = persistence ** np.abs(place[:, None] - place[None, :])
            # -e_t + (1 - lam) * sum over k > t of lam^(k-t-1) e_k; there is no value after the last token
            ahead_TT = place[None, :] - place[:, None]
            weights_TT = np.where(ahead_TT > 0, (1 - lam) * float(lam) ** np.maximum(ahead_TT - 1, 0), 0.0) - np.eye(
                length
            )
            total += error * float(np.einsum("tk,kl,tl->", weights_TT, covariance_TT, weights_TT))
    return (own / tokens) ** 2 / (total / tokens)

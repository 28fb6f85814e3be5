"""Tokens in the colours of their rewards, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

NEGATIVE_RGB, POSITIVE_RGB = (214, 39, 40), (44, 160, 44)


def coloured(tokens: Sequence[str], rewards: Sequence[float], underlined: Sequence[bool] | None = None) -> Text:
    """The tokens on a background from red (-1) over none (0) to green (1); line breaks are kept and made visible."""
    text = Text()
    lines = underlined if underlined is not None else [False] * len(tokens)
    for token, reward, line in zip(tokens, rewards, lines, strict=True):
        hue, strength = (POSITIVE_RGB if reward > 0 else NEGATIVE_RGB), min(abs(reward), 1.0)
        red, green, blue = (round(255 + (channel - 255) * strength) for channel in hue)
        text.append(token.replace("\n", "\u23ce\n"), style=f"{'underline ' * line}black on rgb({red},{green},{blue})")
    return text

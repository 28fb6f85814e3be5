"""The colours of token rewards: orange below 0, blue above, told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

NEGATIVE_RGB, POSITIVE_RGB = (230, 130, 14), (47, 126, 216)
"""In the terminal and on the page."""
FULL = 215 / 255
"""How much of the full colour covers the ground where |reward| is 1: the text must still be read on it."""


def coloured(tokens: Sequence[str], rewards: Sequence[float], underlined: Sequence[bool] | None = None) -> Text:
    """The tokens on a background from orange (-1) over none (0) to blue (1); line breaks are kept and made visible."""
    text = Text()
    lines = underlined if underlined is not None else [False] * len(tokens)
    for token, reward, line in zip(tokens, rewards, lines, strict=True):
        hue, strength = (POSITIVE_RGB if reward > 0 else NEGATIVE_RGB), FULL * min(abs(reward), 1.0)
        red, green, blue = (round(255 + (channel - 255) * strength) for channel in hue)
        text.append(token.replace("\n", "\u23ce\n"), style=f"{'underline ' * line}black on rgb({red},{green},{blue})")
    return text


def css(share: float) -> str:
    """The background of a token as a CSS colour, as strong as |share|, over light and dark grounds."""
    red, green, blue = POSITIVE_RGB if share > 0 else NEGATIVE_RGB
    return f"#{red:02x}{green:02x}{blue:02x}{round(min(abs(share), 1.0) * 255 * FULL):02x}"

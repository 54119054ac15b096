"""Losses of our own runs after so many tokens, as shares of the loss of guessing."""

# task -> (tokens of rows that ask it, lowest, highest), ascending
REFERENCE: dict[str, tuple[tuple[float, float, float], ...]] = {}

"""Compares two commits of tlcr: `commits` installs them, `rounds` times the `cases`, `ratios` does the statistics."""

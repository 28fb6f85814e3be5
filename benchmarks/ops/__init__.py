"""Compares every op with its rivals: `cases` has the inputs and correct results, `runs` measures tlcr and `rivals`."""

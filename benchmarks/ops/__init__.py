"""Every op against what else computes it: `cases` and their truth, the `rivals`, and `runs` over them."""

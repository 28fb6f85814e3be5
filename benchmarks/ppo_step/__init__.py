"""Whole PPO rounds: the `task`, and it done `with_tlcr` and `with_trl`, each in a process of its own."""

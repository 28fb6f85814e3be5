"""Measures whole PPO rounds of one `task`, done `with_tlcr` and `with_trl`, each in a separate process."""

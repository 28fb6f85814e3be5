"""Benchmarks: `ops` compares ops with rivals, `ppo_step` compares PPO rounds with TRL, `compare` compares two commits.
`attention`, `optimizer`, `host_time`, `score_hidden` and `kernel_resources` measure single parts. `report` writes the
page of results. Each is run by `python -m`."""

"""Benchmarks: ops beside rivals (`ops`), PPO rounds beside TRL (`ppo_step`), two commits (`compare`), single
parts (`attention`, `optimizer`, `kernel_resources`), and the page on them (`report`). Each is run by `python -m`."""

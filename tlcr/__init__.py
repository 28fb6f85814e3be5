"""Token-Level Continuous Reward: dense preference rewards for RLHF."""

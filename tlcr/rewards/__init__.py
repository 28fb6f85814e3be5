"""From a rollout to the reward of every token: the reward sources, and the composition with KL and penalties.

May touch all before it up to models; the composition does not use text, the sources do not use a policy update.
"""

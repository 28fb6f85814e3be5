"""From a rollout to the reward of every token: the sources that speak of it, and the composition with KL and penalties.

May touch all before it up to models; the composition never sees text, the sources never see a policy update.
"""

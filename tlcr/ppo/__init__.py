"""Proximal policy optimisation, stage by stage: rollout, scores, advantages, update; and what a run keeps.

May touch all before it up to rewards; the update does not depend on the source of the rewards.
"""

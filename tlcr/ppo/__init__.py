"""Proximal policy optimisation, stage by stage: rollout, scores, advantages, update; and what a run keeps.

May touch all before it up to rewards; the update never knows where rewards came from.
"""

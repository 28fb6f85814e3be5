"""Language models and what is built on them: loading, saving, actor-critic, discriminator, reward model, losses.

May touch all before it up to data; imports no reward, no rollout and no recipe.
"""

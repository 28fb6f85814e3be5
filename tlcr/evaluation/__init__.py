"""How good a policy or a discriminator is: metrics, analyses, and intervals by bootstrap.

May touch all before it up to models; trains nothing.
"""

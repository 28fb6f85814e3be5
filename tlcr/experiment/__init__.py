"""A whole comparison: the recipes for every arm, KL coefficient and seed, in one folder from which it can resume.

May touch all before it; imports no command line.
"""

"""A whole comparison: the recipes for every arm, KL coefficient and seed, in one folder that resumes.

May touch all before it; knows no command line.
"""

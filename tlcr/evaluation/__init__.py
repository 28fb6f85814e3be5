"""Evaluation of policies and discriminators: metrics, analyses, and intervals by bootstrap.

May touch all before it up to models; trains nothing.
"""

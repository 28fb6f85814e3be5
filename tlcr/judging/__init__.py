"""Judged evaluation: answers to the prompts of benchmarks, and a language model that compares or grades them.

May touch all before it up to evaluation; uses no run folder.
"""

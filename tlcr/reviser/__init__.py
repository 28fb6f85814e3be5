"""The reviser: minimal edits of the rejected answers, by a language model or from files.

May touch all before it up to chat; trains nothing, and uses no reward.
"""

"""Preferences, edits and prompts: readers, formats, splits, token labels, the embedded task.

May touch all before it up to training; uses no model except the small one of the embedded task.
"""

"""Where preferences, edits and prompts come from: readers, formats, splits, token labels, the embedded task.

May touch all before it up to training; knows no model but the small one that the embedded task makes.
"""

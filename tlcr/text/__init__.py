"""Text to token ids and back, aligned by character offsets; rows of different lengths as one rectangle.

May touch errors, types and config; uses no model and no file.
"""

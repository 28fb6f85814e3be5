"""Text to token ids and back, aligned by character offsets; rows of different lengths as one rectangle.

May touch errors, types and config; knows no model and no file.
"""

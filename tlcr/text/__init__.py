"""Text to token ids and back, aligned by character offsets; rows of different lengths as one rectangle; text files.

May touch errors, types and config; uses no model.
"""

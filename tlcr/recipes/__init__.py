"""One function a stage of the method: it calls the stages below in the order of the paper, and computes nothing itself.

May touch all before it; a recipe never imports another.
"""

"""One function per stage of the method. It calls the functions of other folders in the paper's order.

May touch all before it; a recipe never imports another.
"""

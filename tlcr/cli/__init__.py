"""The command `tlcr`: from what was typed to the function that does it, and from errors to what a person reads.

May touch everything; nothing imports it.
"""

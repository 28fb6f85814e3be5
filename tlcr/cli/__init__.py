"""The command `tlcr`: parses the command line, calls the function of the command, and prints errors.

May touch everything; nothing imports it.
"""

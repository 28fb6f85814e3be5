"""What every training shares: the supervised loop, optimiser, checkpoints, metrics, processes, progress, interrupts.

May touch errors, types, config and ops; imports neither data nor models.
"""

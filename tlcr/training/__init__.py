"""What every training shares: the supervised loop, optimiser, checkpoints, metrics, processes, progress, interrupts.

May touch errors, types, config and ops; knows neither data nor what is trained.
"""

"""A run's files to figures, tables and plots: results.json, report.html, results.md.

May touch all before it up to evaluation; reads what runs wrote, and runs nothing.
"""

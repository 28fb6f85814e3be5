"""The reviser: a language model, or files of others, minimally edits the answers that people liked less.

May touch all before it up to chat; trains nothing, and knows no reward.
"""

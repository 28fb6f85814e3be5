"""The reviser: a language model, or files of others, minimally edits the answers that people liked less."""

"""Where preferences, edits and prompts come from."""

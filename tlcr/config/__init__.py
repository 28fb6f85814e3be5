"""Every knob, as frozen dataclasses; YAML and flags to them and back; the trials that a config asks for.

Imports errors only, and nothing heavy: `tlcr --help` answers without torch.
"""

"""Every knob, as frozen dataclasses; conversion from and to YAML and flags; the trials of a config.

Imports errors only, and no large package: `tlcr --help` works without torch.
"""

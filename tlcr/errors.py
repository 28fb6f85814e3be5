"""The exceptions of tlcr, and its warnings. Each is also a subclass of a matching standard exception.

They carry only their message, so that they can be pickled between processes.
"""

__all__ = [
    "AnotherProcessFailed",
    "BackendUnavailable",
    "BudgetExhausted",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EndpointError",
    "ExtensionWarning",
    "HostError",
    "HostWarning",
    "NoDerivative",
    "ShapeError",
    "TlcrError",
    "TrainingDiverged",
]


class TlcrError(Exception):
    """Base of every error that tlcr raises on purpose; its message ends with what to do."""


class ConfigError(TlcrError, ValueError):
    """An option has a value that it cannot have, or does not apply where it was given."""


class ShapeError(TlcrError, ValueError):
    """A tensor has the wrong shape, dtype or device for the argument it was given as."""


class DataError(TlcrError, ValueError):
    """A record, a file or a label cannot be read as what it should be."""


class BackendUnavailable(TlcrError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class NoDerivative(TlcrError, NotImplementedError):
    """A derivative was asked for that an op does not have."""


class EndpointError(TlcrError, ConnectionError):
    """A server cannot be reached, or will not serve us."""


class BudgetExhausted(TlcrError, RuntimeError):
    """One more request could cross a cap on money or requests."""


class CheckpointError(TlcrError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to something else."""


class HostError(TlcrError, RuntimeError):
    """A trainer that uses tlcr's rewards, or a scorer that gives them, does not keep to what both agreed on."""


class TrainingDiverged(TlcrError, RuntimeError):
    """Training met NaN, infinity or an exploding ratio and stopped, with its state saved."""


class AnotherProcessFailed(TlcrError, RuntimeError):
    """This process is in order, and one that works with it is not; the other one says why."""


class ExtensionWarning(RuntimeWarning):
    """The installed compiled kernels do not fit the running torch; the message has the command that fixes it."""


class HostWarning(RuntimeWarning):
    """A trainer that uses tlcr's rewards is newer than what was tested, or turns them into something else."""

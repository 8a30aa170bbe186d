"""The exceptions that a command prints in a line or two, without a stack trace."""


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key, the value and what was expected."""


class UntestedError(ConfigError):
    """A module without a test_step, or data without a test_dataloader; the message names it."""


class CheckpointError(Exception):
    """A file that is no checkpoint, or a damaged one; the message names it."""


class SweepError(Exception):
    """A sweep that cannot start, or whose jobs have failed; the message says which and why, a line a job."""


class DataError(ValueError):
    """Data that are missing, damaged or not what they should be; the message names the file and the remedy."""


class ReproductionError(Exception):
    """A run that could not be trained again, or came out otherwise; the message says where the two part."""


class SkippedError(Exception):
    """Files that were skipped while the rest was done; the message names them."""


class DivergenceError(ArithmeticError):
    """The loss is no longer finite; the message says since when, and what to try."""

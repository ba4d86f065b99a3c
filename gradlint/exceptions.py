"""Errors a user can act on. Each message is one line: what, where, what to do. Each carries its exit code."""


class GradlintError(Exception):
    """Base of every error gradlint raises on purpose; the command line prints it as one line and exits with
    `exit_code`.
    """

    exit_code = 2


class ModelError(GradlintError):
    """The model file can't be read, or is not a valid ONNX graph."""


class DataError(GradlintError):
    """Data for the probe doesn't fit the model: a wrong name, shape, dtype, or non-finite values."""


class UsageError(GradlintError):
    """An option, a rule page or a configuration key is wrong."""

"""Errors that a user can mend: one line that names the culprit and says what to do."""


class DagerError(ValueError):
    """A mistake in what the user gave: a file, a tensor, a name or an option."""


class ModelError(DagerError):
    """A model cannot be found, fetched or read."""


class UpdateError(DagerError):
    """An update file is malformed or does not belong to the model."""

"""The one exception that users are meant to read."""


class AHNError(ValueError):
    """Bad input, said in one sentence that names the file or flag, the field, and what was expected."""

"""The one exception that users are meant to read."""


class AHNError(ValueError):
    """Bad input, said in one sentence that names the file or flag, the field, and what was expected."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its class where it says nothing, for a sentence of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""Error messages of other libraries as one line."""


def one_line(error: BaseException) -> str:
    """Returns the message of an error, of many lines or empty, as one line of at most 300 characters."""
    return (" ".join(str(error).split()) or repr(error))[:300]

"""The error for a user's mistake, and the text of any other error in one line."""


class UserError(ValueError):
    """Reports a mistake that the user can correct, in one line that says what, where, and what to change.

    What a file has put into it can neither break the line, nor steer the terminal, nor fill it.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        text = text if len(text) <= 2000 else f"{text[:1200]} … {text[-700:]}"
        super().__init__("".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text))


def one_line(error: BaseException, limit: int = 200) -> str:
    """Shorten an error's text to one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__

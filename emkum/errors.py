"""The one exception for mistakes that a user can mend."""

_PREFIX = "emkum: error: "


class UserError(SystemExit):
    """A wrong file, option or value.

    It ends the program with its message as the only line on standard error and exit status 1, also under the
    ``fairseq-*`` commands, whose own entry points would print a traceback for any other exception. The message names
    the file or option and the valid choices.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_PREFIX + message)
        self.message = message

    def __reduce__(self) -> tuple[type["UserError"], tuple[str]]:
        # Worker processes hand it on pickled; the prefix must not be added twice.
        return type(self), (self.message,)

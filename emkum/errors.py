"""The one exception for mistakes that a user can mend."""


class UserError(SystemExit):
    """A wrong file, option or value.

    It ends the program with its message as the only line on standard error and exit status 1, also under the
    ``fairseq-*`` commands, whose own entry points would print a traceback for any other exception. The message names
    the file or option and the valid choices.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"emkum: error: {message}")

"""The one exception for mistakes that a user can cause and mend. A leaf module: anything may import it."""


class UserError(Exception):
    """Bad input: the message is one line that names the file, key or value, and the remedy.

    Command lines print it without a traceback and exit with status 2.
    """


class QuietError(UserError):
    """An error that another process of the same run has already told the user of."""

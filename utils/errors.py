"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right.

    The message is one line that says what is wrong and what to do. Entry points print it to stderr and exit
    with code 2 and no traceback.
    """

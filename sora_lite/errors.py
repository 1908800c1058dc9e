"""The one kind of error that a user can mend, and how a command line shows it."""


class UserError(Exception):
    """Something outside the code is wrong: a setting, a file, the environment.

    The message is one sentence or two that name the file or key, the cause and the cure. A command line prints it
    as one line and exits with status 2, without a traceback; any other exception is a defect and keeps its traceback.
    """

"""What ends a command other than a defect: an error that a user can mend, and a stop that was asked for."""


class UserError(Exception):
    """Something outside the code is wrong: a setting, a file, the environment.

    The message is one sentence or two that name the file or key, the cause and the cure. A command line prints it
    as one line and exits with status 2, without a traceback; any other exception is a defect and keeps its traceback.
    """


class Interrupted(Exception):
    """A signal asked to stop, and everything is saved: the same command goes on. Exit status 75 (EX_TEMPFAIL)."""

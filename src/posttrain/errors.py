"""How a command can end other than well. The CLI maps each class to an exit code."""


class UserError(Exception):
    """The user's input is wrong: one line that names the field and the fix. Exit code 2, never a traceback."""

    exit_code = 2


class RunError(Exception):
    """The run itself failed in a way we can name (disk full, non-finite loss). Exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """A signal ended the run at a step boundary after saving; the same command goes on. Exit code 75.

    Like KeyboardInterrupt it is no Exception: nobody who handles errors should take it for one.
    """

    exit_code = 75


def did_you_mean(word: str, known: list[str]) -> str:
    """`" - did you mean 'optim.lr'?"` when a near name exists, else an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" - did you mean '{near[0]}'?" if near else ""

"""The exceptions that mean "your input needs mending"."""


class InputError(ValueError):
    """Bad input from the user.

    The message is one sentence that names the input, the place and the mend. The command line
    prints it and exits with code 2.
    """


class FolderInUse(InputError):
    """Another process writes into the folder that was named."""

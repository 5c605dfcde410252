"""The environment variables of a kernel: the sandbox's, and those of one execution."""

import os

# The variables of the sandbox, each followed by NUL, as in /proc/PID/environ. The agent writes the
# file when a sandbox begins, which is later than the start of a kernel that waits in a snapshot.
SANDBOX_VARIABLES = "/run/lohar/environment"


class Environment:
    """Finds what must change in the variables of a kernel before and after an execution.

    A change is a dict from names to values, in which None removes a variable.
    """

    def __init__(self):
        self._file = None
        self._sandbox = {}

    def before(self, variables):
        """Returns the change before an execution that has these variables."""
        return {**self._news(), **variables}

    def after(self, variables):
        """Returns the change that takes the variables of an execution back."""
        return {name: self._sandbox.get(name) for name in variables}

    def _news(self):
        """Returns how the sandbox's variables have changed since the last call."""
        try:
            with open(SANDBOX_VARIABLES, "rb") as file:
                found = os.fstat(file.fileno())
                identity = (found.st_ino, found.st_mtime_ns)
                if identity == self._file:
                    return {}
                pairs = file.read().decode(errors="surrogateescape").split("\0")
        except OSError:
            return {}
        now = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        gone = dict.fromkeys(self._sandbox.keys() - now.keys())
        self._file, self._sandbox = identity, now
        return {**gone, **now}

"""The kernel of Python: IPython's, with variables for each execution and further formats."""

import importlib
import os
import random
import sys

import zmq

from .environment import Environment
from .formats import register

# Clients cannot attach a debugger, and loading its package takes a quarter of a kernel's start.
# Users' code can import it all the same.
sys.modules["debugpy"] = None
from ipykernel.ipkernel import IPythonKernel  # noqa: E402
from ipykernel.kernelapp import IPKernelApp  # noqa: E402

del sys.modules["debugpy"]

# Whether to load the usual packages before the first execution.
PRELOAD = "BHATTI_PRELOAD"

PACKAGES = ["numpy", "pandas", "matplotlib.pyplot", "PIL.Image"]

# Where matplotlib draws: in results.
BACKEND = "module://matplotlib_inline.backend_inline"


class Python(IPythonKernel):
    """IPython. The variables of an execution are in the metadata of its request."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self._environment = Environment()
        self._has_begun = False
        # Sequences are shown whole.
        self.shell.display_formatter.formatters["text/plain"].max_seq_length = 0
        register(self.shell.display_formatter)
        os.environ.setdefault("MPLBACKEND", BACKEND)
        if os.environ.pop(PRELOAD, ""):
            for package in PACKAGES:
                importlib.import_module(package)

    async def execute_request(self, stream, ident, parent):
        variables = parent.get("metadata", {}).get("variables") or {}
        if not self._has_begun:
            self._has_begun = True
            begin_random_numbers()
        change_environment(self._environment.before(variables))
        try:
            await super().execute_request(stream, ident, parent)
        finally:
            change_environment(self._environment.after(variables))


def begin_random_numbers():
    """Forgets random numbers that all sandboxes of a snapshot would have."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def change_environment(change):
    """Sets variables, and removes those whose value is None."""
    for name, value in change.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Application(IPKernelApp):
    """The program of the kernel."""

    def _bind_socket(self, s, port):
        if s.type in (zmq.PUB, zmq.XPUB):
            # Output is not thrown away if its reader is slow.
            s.setsockopt(zmq.SNDHWM, 0)
        return super()._bind_socket(s, port)


if __name__ == "__main__":
    Application.launch_instance(argv=sys.argv[1:], kernel_class=Python)

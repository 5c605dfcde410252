"""Languages whose code runs in a kernel of Jupyter: Python, and what is installed beside it."""

import asyncio
import os
import queue
import sys
import tempfile

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from zmq import ZMQError

from .results import error, line_of

HOME = "/home/user"

# The kernel of this package.
PYTHON = "bhatti-python"

# How long a kernel may take to start, in seconds.
START_LIMIT = 300

# How often a silent kernel is checked, in seconds.
LOOK = 0.5

# How long an interrupted kernel may take to end its execution, in seconds.
INTERRUPT_LIMIT = 10


class Specs(KernelSpecManager):
    """Finds the programs of kernels: that of this package, and those of other packages."""

    def get_kernel_spec(self, kernel_name):
        if kernel_name != PYTHON:
            return super().get_kernel_spec(kernel_name)
        module = f"{__package__}.kernel"
        argv = [sys.executable, "-P", "-m", module, "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python", language="python")


def others():
    """Returns the names of further kernels, by language."""
    found = KernelSpecManager().get_all_specs()
    names = {it["spec"].get("language", name).lower(): name for name, it in found.items()}
    return {language: name for language, name in names.items() if language != "python"}


class Kernel:
    """A kernel, which is a process of its own."""

    def __init__(self, name, directory, preload=False):
        # The kernel's sockets are beside this file. Each kernel needs its own directory for them.
        self._sockets = tempfile.TemporaryDirectory(prefix="kernel-")
        self._manager = AsyncKernelManager(
            kernel_name=name,
            transport="ipc",
            connection_file=os.path.join(self._sockets.name, "kernel.json"),
            kernel_spec_manager=Specs(),
        )
        self._directory = directory
        self._preload = preload
        self._client = None
        self._request = None

    @property
    def is_over(self):
        """Whether the kernel has ended. Another one must take its place."""
        return self._client is None

    async def is_alive(self):
        """Whether the kernel's process runs."""
        return await self._manager.is_alive()

    async def start(self):
        """Starts the kernel, and waits until it can run code.

        Raises RuntimeError if it does not start.
        """
        environment = {**os.environ, **({"BHATTI_PRELOAD": "yes"} if self._preload else {})}
        try:
            await self._manager.start_kernel(cwd=self._directory, env=environment)
            self._client = self._manager.client()
            self._client.start_channels()
            await self._client.wait_for_ready(timeout=START_LIMIT)
        except (OSError, RuntimeError, NoSuchKernel) as problem:
            await self.end()
            raise RuntimeError(f"the kernel did not start: {problem}") from problem

    async def run(self, code, variables):
        """Runs code, and yields its lines, or None while there is nothing to say."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        metadata = {"variables": variables}
        message = self._client.session.msg("execute_request", content, metadata=metadata)
        self._client.shell_channel.send(message)
        self._request = message["header"]["msg_id"]
        while (message := await self._next_message()) != "end":
            yield message and line_of(message)
        if self._client is not None and not await self._manager.is_alive():
            yield error("KernelDied", "the kernel ended; its state is gone")
            await self.end()

    async def move(self, directory):
        """Makes a kernel that has run nothing work in another directory."""
        if directory != self._directory:
            self._directory = directory
            code = f"__import__('os').chdir({directory!r})"
            await self._client.execute_interactive(code, silent=True, output_hook=print)

    async def interrupt(self):
        """Interrupts the code, and waits until it has ended."""
        if self._client is None or not await self._manager.is_alive():
            return
        await self._manager.interrupt_kernel()
        for _ in range(int(INTERRUPT_LIMIT / LOOK)):
            if await self._next_message() == "end":
                return

    async def end(self):
        """Ends the kernel."""
        client, self._client = self._client, None
        if client is not None:
            client.stop_channels()
        if self._manager.has_kernel:
            await self._manager.shutdown_kernel(now=True)

    async def _next_message(self):
        """Waits for a message of the execution.

        Returns `end` after the last one or if the kernel has ended, or None after a while.
        """
        client = self._client
        if client is None:
            return "end"
        try:
            message = await client.get_iopub_msg(timeout=LOOK)
        except queue.Empty:
            return None if await self._manager.is_alive() else "end"
        except (ZMQError, asyncio.CancelledError):
            # The sockets are closed, because the context is restarted or removed.
            if client is self._client or asyncio.current_task().cancelling():
                raise
            return "end"
        if message["parent_header"].get("msg_id") != self._request:
            return None
        return "end" if is_last(message) else message


def is_last(message):
    return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


class Spare:
    """A kernel of Python that has started ahead of its use."""

    def __init__(self):
        self._starting = None

    def prepare(self):
        """Begins to start a kernel, if there is none."""
        self._starting = self._starting or asyncio.create_task(started(HOME))
        return self._starting

    async def take(self, directory):
        """Returns a kernel that can run code, and begins to start the next.

        Raises RuntimeError if it does not start.
        """
        starting = self.prepare()
        self._starting = None
        try:
            kernel = await asyncio.shield(starting)
            if kernel.is_over or not await kernel.is_alive():
                kernel = await started(HOME)
            await kernel.move(directory)
        except asyncio.CancelledError:
            # The client has gone. The kernel stays for the next one.
            self._starting = starting
            raise
        finally:
            self.prepare()
        return kernel


async def started(directory):
    kernel = Kernel(PYTHON, directory)
    await kernel.start()
    return kernel

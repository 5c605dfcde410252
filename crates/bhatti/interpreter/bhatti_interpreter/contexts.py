"""Contexts: what keeps the state of executions, one for each language or as many as one likes."""

import asyncio
import os
import time
import uuid

from .jupyter import HOME, PYTHON, Kernel, Spare, others
from .programs import PROGRAMS
from .results import KEEPALIVE, error

SHORT = {"js": "javascript", "ts": "typescript", "sh": "bash", "py": "python"}

# How long an execution may be silent before its client hears that it goes on, in seconds.
KEEPALIVE_INTERVAL = 5


class BadContext(Exception):
    """The context cannot be made, because of this message."""


def language_of(name):
    """Returns the language that a client means."""
    name = (name or "python").strip().lower()
    return SHORT.get(name, name)


class Runners:
    """Starts what runs the code of contexts."""

    def __init__(self):
        self._spare = Spare()

    async def prepare(self):
        """Starts what is used first, and waits for it."""
        await self._spare.prepare()

    async def start(self, language, directory):
        """Returns what runs the code of a language.

        Raises BadContext if there is no such directory or language.
        """
        if not os.path.isdir(directory):
            raise BadContext(f"cwd {directory!r} is not a directory")
        try:
            if language == "python":
                return await self._spare.take(directory)
            runner = self._of(language, directory)
            await runner.start()
        except (OSError, RuntimeError) as problem:
            raise BadContext(f"{language}: {problem}") from problem
        return runner

    async def first(self):
        """Returns a kernel of Python that has loaded the usual packages."""
        kernel = Kernel(PYTHON, HOME, preload=True)
        await kernel.start()
        return kernel

    def _of(self, language, directory):
        if language in PROGRAMS:
            return PROGRAMS[language](directory)
        kernels = others()
        if language in kernels:
            return Kernel(kernels[language], directory)
        known = ", ".join(["python", *PROGRAMS, *kernels])
        raise BadContext(f"language {language!r} is not installed: choose one of {known}")


class Context:
    """What clients see of a context, and what runs its code."""

    def __init__(self, language, directory, runners):
        self.id = str(uuid.uuid4())
        self.language = language
        self.directory = directory
        self._runners = runners
        self._runner = None
        # One execution at a time; the others wait.
        self._turn = asyncio.Lock()
        # One start or end at a time.
        self._changing = asyncio.Lock()
        self._is_removed = False

    def described(self):
        return {"id": self.id, "language": self.language, "cwd": self.directory}

    async def start(self, runner=None):
        """Starts what runs the code, unless it is given."""
        self._runner = runner or await self._runners.start(self.language, self.directory)

    async def execute(self, code, variables):
        """Runs code, and yields its lines.

        If the generator is closed before its end, the code is interrupted.
        """
        async with self._turn:
            try:
                async with self._changing:
                    if self._runner is not None and self._runner.is_over:
                        await self.start()
            except BadContext as problem:
                yield error("BadContext", str(problem))
                return
            runner = self._runner
            if runner is None:
                yield error("ContextRemoved", "the context was removed")
                return
            try:
                async for line in with_keepalives(runner.run(code, variables)):
                    yield line
            except (asyncio.CancelledError, GeneratorExit):
                if runner is self._runner:
                    await asyncio.shield(runner.interrupt())
                raise
            if runner is not self._runner:
                yield error("ContextRestarted", "the context was restarted or removed")

    async def restart(self):
        """Forgets the state. An execution that runs ends with an error."""
        async with self._changing:
            if not self._is_removed:
                await self._end()
                await self.start()

    async def remove(self):
        """Ends what runs the code, for good. An execution that runs ends with an error."""
        self._is_removed = True
        async with self._changing:
            await self._end()

    async def _end(self):
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.end()


async def with_keepalives(lines):
    """Yields lines, and others while there are none, so that a closed connection is noticed."""
    heard = time.monotonic()
    waiting = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(lines))
            await asyncio.wait({waiting}, timeout=KEEPALIVE_INTERVAL)
            if waiting.done():
                done, waiting = waiting, None
                line = done.result()
            else:
                line = None
            now = time.monotonic()
            if line is not None or now - heard >= KEEPALIVE_INTERVAL:
                heard = now
                yield line or KEEPALIVE
    except StopAsyncIteration:
        pass
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await lines.aclose()


class Contexts:
    """All contexts, in the order in which they were made."""

    def __init__(self):
        self._runners = Runners()
        self._all = {}
        # The context of code that names none, by language.
        self._usual = {}
        self._making = asyncio.Lock()

    async def prepare(self):
        """Makes the contexts that everyone expects."""
        spare = asyncio.create_task(self._runners.prepare())
        first = await self._runners.first()
        python = await self._add(Context("python", HOME, self._runners), first)
        javascript = await self.make("javascript", None)
        self._usual = {it.language: it for it in (python, javascript)}
        await spare

    async def make(self, language, directory):
        context = Context(language_of(language), directory or HOME, self._runners)
        return await self._add(context)

    async def _add(self, context, runner=None):
        await context.start(runner)
        self._all[context.id] = context
        return context

    def find(self, context_id):
        """Returns a context, or None."""
        return self._all.get(context_id)

    async def usual(self, language):
        """Returns the context of code that names none. The first such code makes it."""
        language = language_of(language)
        async with self._making:
            if language not in self._usual:
                self._usual[language] = await self.make(language, None)
            return self._usual[language]

    def all(self):
        return self._all.values()

    def described(self):
        return [context.described() for context in self._all.values()]

    async def remove(self, context):
        del self._all[context.id]
        if self._usual.get(context.language) is context:
            del self._usual[context.language]
        await context.remove()

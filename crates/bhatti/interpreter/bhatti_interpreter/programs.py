"""Languages whose code runs in a child process of the server."""

import asyncio
import json
import os
import shlex
import tempfile

from .child import Child
from .environment import Environment
from .results import error, output, result

# The shell is interactive, so that an interrupt ends a command and not the shell. It does not edit
# lines, and has no prompts and no history expansion.
SHELL = ["bash", "--noprofile", "--norc", "--noediting", "-i", "+H"]

# Gives the descriptor of answers a number that code does not use.
REDIRECT = 'exec 250>&{answers} {answers}>&-; exec "$@"'

# How long interrupted code may take to end, in seconds.
INTERRUPT_LIMIT = 10

NODE_PROGRAM = os.path.join(os.path.dirname(__file__), "javascript.js")


class Program:
    """Runs code in a child, which starts with the first code.

    A child that waited in a snapshot would have the same random numbers in every sandbox.
    """

    language = ""

    # The next code starts another child if one has ended.
    is_over = False

    def __init__(self, directory):
        self._directory = directory
        self._child = None
        self._environment = Environment()
        # What has changed in the variables since this began, and since the last request.
        self._all_changes = {}
        self._change = {}
        self._count = 0
        # Whether the child has a request that it has not answered.
        self._is_busy = False

    async def start_child(self):
        """Returns a new child."""
        raise NotImplementedError

    def request(self, code, change):
        """Returns the text that asks the child to change its variables and to run code."""
        raise NotImplementedError

    def answered(self, answer):
        """Returns the lines for an answer, and whether the code has ended."""
        raise NotImplementedError

    async def start(self):
        """Prepares. The child starts later."""

    async def run(self, code, variables):
        """Runs code, and yields its lines, or None while there is nothing to say."""
        self._count += 1
        yield {"type": "number_of_executions", "execution_count": self._count}
        self._note(self._environment.before(variables))
        try:
            if self._child is None:
                self._child = await self.start_child()
                self._change = dict(self._all_changes)
            change, self._change = self._change, {}
            self._is_busy = True
            await self._child.send(self.request(code, change))
            async for line in self._lines():
                yield line
        except BrokenPipeError:
            yield self._gone()
        finally:
            self._note(self._environment.after(variables))

    async def interrupt(self):
        """Interrupts the code, and waits until it has ended.

        Kills a child that goes on: a late answer would be taken for that of the next request.
        """
        if self._child is None or not self._is_busy:
            return
        self._child.interrupt()
        try:
            async with asyncio.timeout(INTERRUPT_LIMIT):
                async for _ in self._lines():
                    pass
        except TimeoutError:
            await self.end()

    async def end(self):
        """Ends the child."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _note(self, change):
        # The next request takes it along.
        self._all_changes.update(change)
        self._change.update(change)

    async def _lines(self):
        child = self._child
        while True:
            kind, text = await child.next_event()
            if kind == "end":
                if child is self._child:
                    yield self._gone()
                return
            if kind != "answer":
                yield output(kind, text)
                continue
            lines, has_ended = self.answered(text)
            if has_ended:
                self._is_busy = False
                child.rest()
            for line in lines:
                yield line
            if has_ended:
                return

    def _gone(self):
        child, self._child = self._child, None
        self._is_busy = False
        status = child.end()
        return error("Exit", f"{self.language} ended with status {status}; its state is gone")


class Bash(Program):
    """Each execution is a file that one shell reads, so that functions and variables stay."""

    language = "bash"

    def __init__(self, directory):
        super().__init__(directory)
        self._files = tempfile.TemporaryDirectory(prefix="bash-")

    async def start_child(self):
        argv = ["bash", "-c", REDIRECT, "bash", *SHELL]
        child = Child(argv, self._directory, reads_requests_from_stdin=True)
        try:
            await child.send("PS1= PS2= PROMPT_COMMAND=\n" + ANSWER)
            # What a shell says that has no terminal.
            while (await child.next_event())[0] not in ("answer", "end"):
                pass
        except asyncio.CancelledError:
            child.end()
            raise
        child.rest()
        return child

    def request(self, code, change):
        changes = [
            f"unset {name}\n" if value is None else f"export {name}={shlex.quote(value)}\n"
            for name, value in change.items()
            if name.isidentifier() and name.isascii()
        ]
        path = os.path.join(self._files.name, "code")
        with open(path, "w", errors="surrogateescape") as file:
            file.write(code + "\n")
        return "".join(changes) + f". {shlex.quote(path)} </dev/null 250>&-\n" + ANSWER

    def answered(self, answer):
        return [] if answer == "0" else [error("ExitStatus", answer)], True


# Makes the shell answer with the last exit status.
ANSWER = 'builtin printf "%s\\n" "$?" >&250\n'


class JavaScript(Program):
    """Node.js runs all code in one global scope."""

    language = "javascript"

    async def start_child(self):
        argv = ["node", "--no-warnings", NODE_PROGRAM, self.language, "{requests}", "{answers}"]
        return Child(argv, self._directory, reads_requests_from_stdin=False)

    def request(self, code, change):
        return json.dumps({"number": self._count, "code": code, "change": change}) + "\n"

    def answered(self, answer):
        answer = json.loads(answer)
        if "data" in answer:
            return [result(answer["data"], is_main_result=True)], False
        if "error" in answer:
            failed = answer["error"]
            return [error(failed["name"], failed["message"], failed["stack"])], True
        return [], True


class TypeScript(JavaScript):
    """JavaScript, after the types have been removed. They are not checked."""

    language = "typescript"


PROGRAMS = {program.language: program for program in (JavaScript, TypeScript, Bash)}

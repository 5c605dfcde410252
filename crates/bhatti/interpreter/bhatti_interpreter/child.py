"""A child process that runs code: a shell, or Node.js."""

import asyncio
import codecs
import collections
import os
import signal
import subprocess

READ_BYTES = 1 << 16

# How much output is read before something else has its turn, in bytes.
TURN_BYTES = 1 << 20

# Pieces of output that wait for the client. The child waits if there are more.
WAITING_MAX = 64


class Child:
    """A child process, its output, and the answers that it writes to a pipe of its own.

    Its pipes are read at all times, so that it does not stop when it writes between executions.
    What it writes then is thrown away: no client waits for it.
    """

    def __init__(self, argv, directory, reads_requests_from_stdin):
        """Starts the child. `{requests}` and `{answers}` in `argv` stand for descriptors."""
        requests_end, self._requests = os.pipe()
        answers, answers_end = os.pipe()
        names = {"requests": requests_end, "answers": answers_end}
        is_stdin = reads_requests_from_stdin
        self._process = subprocess.Popen(
            [part.format(**names) for part in argv],
            cwd=directory,
            stdin=requests_end if is_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[answers_end] if is_stdin else [requests_end, answers_end],
            start_new_session=True,
        )
        os.close(requests_end)
        os.close(answers_end)
        self._answers = Lines(os.fdopen(answers, "rb", buffering=0))
        self._outputs = {kind: Text(getattr(self._process, kind)) for kind in ("stdout", "stderr")}
        self._ended = os.pidfd_open(self._process.pid)
        self._is_wanted = False
        self._is_over = False
        self._events = collections.deque()
        self._arrived = asyncio.Event()
        # Answers that follow output that has not been read.
        self._lines = []
        self._watched = set()
        self._watch()

    async def send(self, request):
        """Sends a request. Output is kept from here on, until `rest`."""
        self._is_wanted = True
        data = request.encode(errors="surrogateescape")
        await asyncio.to_thread(write_all, self._requests, data)

    async def next_event(self):
        """Waits for output, an answer or the child's end.

        Returns the kind, which is `stdout`, `stderr`, `answer` or `end`, and the text.
        """
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if not self._watched and len(self._events) < WAITING_MAX:
            self._watch()
        return event

    def rest(self):
        """Throws output away from here on."""
        self._is_wanted = False
        self._events = collections.deque(it for it in self._events if it[0] == "end")
        if not self._watched:
            self._watch()

    def interrupt(self):
        """Sends SIGINT to the child, and to what it runs."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self):
        """Kills the child, and what it runs. Returns its exit status."""
        status = self._process.poll()
        if status is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            status = self._process.wait()
        self._is_over = True
        self._unwatch()
        for stream in (self._answers, *self._outputs.values()):
            stream.close()
        os.close(self._requests)
        os.close(self._ended)
        # For who waits for an event of a child that another one has ended.
        self._put("end", "")
        return status

    def _watch(self):
        if self._is_over:
            return
        streams = [it for it in (self._answers, *self._outputs.values()) if not it.is_closed]
        self._watched = {self._ended, *(it.fileno() for it in streams)}
        for descriptor in self._watched:
            asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _unwatch(self, descriptors=None):
        for descriptor in list(self._watched if descriptors is None else descriptors):
            asyncio.get_running_loop().remove_reader(descriptor)
            self._watched.discard(descriptor)

    def _read(self):
        # The end and the answers are read first and delivered last: the output before them is in
        # its pipe.
        has_ended = self._process.poll() is not None
        self._lines += self._answers.read()
        is_empty = all(self._read_output(kind, output) for kind, output in self._outputs.items())
        if is_empty:
            for line in self._lines:
                self._put("answer", line)
            self._lines = []
            if has_ended:
                self._put("end", "")
        closed = [it for it in (self._answers, *self._outputs.values()) if it.is_closed]
        self._unwatch({it.fileno() for it in closed} & self._watched)
        if len(self._events) >= WAITING_MAX or (has_ended and is_empty):
            self._unwatch()

    def _read_output(self, kind, output):
        """Reads output, up to a limit. Returns whether the pipe is empty."""
        for _ in range(TURN_BYTES // READ_BYTES):
            text = output.read()
            if not text:
                return True
            self._put(kind, text)
        return False

    def _put(self, kind, text):
        if kind == "end" or self._is_wanted:
            self._events.append((kind, text))
            self._arrived.set()


class Text:
    """A pipe with text."""

    def __init__(self, stream):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_closed = False
        os.set_blocking(stream.fileno(), False)

    def fileno(self):
        return self._stream.fileno()

    def close(self):
        self.is_closed = True
        self._stream.close()

    def read(self):
        """Returns some of the text that is in the pipe, or nothing."""
        try:
            piece = os.read(self.fileno(), READ_BYTES)
        except BlockingIOError:
            return ""
        self.is_closed = not piece
        return self._decoder.decode(piece)


class Lines(Text):
    """A pipe with lines."""

    def __init__(self, stream):
        super().__init__(stream)
        self._begun = ""

    def read(self):
        """Returns the whole lines that have arrived."""
        *lines, self._begun = (self._begun + super().read()).split("\n")
        return lines


def write_all(descriptor, data):
    while data:
        data = data[os.write(descriptor, data) :]

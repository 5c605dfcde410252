"""The server: a JSON object per line for each piece of an execution."""

import asyncio
import json
import logging
import signal

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.web import Application, RequestHandler

from .contexts import BadContext, Contexts
from .results import END

PORT = 49999

# Maximum length of a request, in bytes.
REQUEST_BYTES_MAX = 64 << 20

# How long a client may keep a connection without a request, in seconds.
IDLE_LIMIT = 640


class Handler(RequestHandler):
    """Common parts: JSON requests, and errors in plain text."""

    def initialize(self, contexts):
        self.contexts = contexts

    def body(self):
        """Returns the request, or None after an answer that refuses it."""
        try:
            body = json.loads(self.request.body or b"{}")
        except ValueError as problem:
            return self.refuse(400, f"the request is not JSON: {problem}")
        if not isinstance(body, dict):
            return self.refuse(400, "the request is not a JSON object")
        return body

    def refuse(self, status, message):
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(message + "\n")

    def found(self, context_id):
        """Returns a context, or None after an answer that says that it is missing."""
        context = self.contexts.find(context_id)
        return context or self.refuse(404, f"Context {context_id} not found")

    def answer(self, content):
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(content))

    def write_error(self, status_code, **_):
        self.refuse(status_code, self._reason)


class Health(Handler):
    def get(self):
        self.answer("OK")


class AllContexts(Handler):
    def get(self):
        self.answer(self.contexts.described())

    async def post(self):
        body = self.body()
        if body is None:
            return
        language, directory = body.get("language"), body.get("cwd")
        if not (is_text(language) and is_text(directory)):
            return self.refuse(400, "`language` or `cwd` is not a text")
        try:
            context = await self.contexts.make(language, directory)
        except BadContext as problem:
            return self.refuse(400, str(problem))
        self.answer(context.described())


class OneContext(Handler):
    async def delete(self, context_id):
        if context := self.found(context_id):
            await self.contexts.remove(context)
            self.answer(None)


class Restart(Handler):
    async def post(self, context_id):
        context = self.found(context_id)
        if not context:
            return
        try:
            await context.restart()
        except BadContext as problem:
            return self.refuse(500, str(problem))
        self.answer(None)


class Execute(Handler):
    _work = None

    async def post(self):
        self._work = asyncio.current_task()
        body = self.body()
        if body is None:
            return
        context_id, language = body.get("context_id"), body.get("language")
        code, variables = body.get("code"), body.get("env_vars") or {}
        if not is_unicode(code):
            return self.refuse(400, "`code` is not a text")
        if not (is_text(context_id) and is_text(language)):
            return self.refuse(400, "`context_id` or `language` is not a text")
        if not is_variables(variables):
            return self.refuse(400, "`env_vars` is not an object of texts")
        if context_id and language:
            return self.refuse(400, "give `context_id` or `language`, not both")
        try:
            if context_id:
                context = self.found(context_id)
            else:
                context = await self.contexts.usual(language)
        except BadContext as problem:
            return self.refuse(400, str(problem))
        if context:
            await self.stream(context.execute(code, variables))

    async def stream(self, lines):
        self.set_header("Content-Type", "application/json")
        try:
            async for line in lines:
                await self.send(line)
            await self.send(END)
        except (StreamClosedError, asyncio.CancelledError):
            # The client has gone.
            await lines.aclose()

    async def send(self, line):
        self.write(json.dumps(line) + "\n")
        await self.flush()

    def on_connection_close(self):
        # The code is interrupted, so that the next does not wait for it.
        if self._work is not None:
            self._work.cancel()


def is_text(value):
    """Whether a value is a text, or absent. A path with NUL names no file."""
    return value is None or (is_unicode(value) and "\0" not in value)


def is_unicode(value):
    """Whether a value is a text that can be sent on: JSON may have half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_variables(value):
    return isinstance(value, dict) and all(
        text is not None and is_text(text) for pair in value.items() for text in pair
    )


async def serve():
    """Serves until a signal ends it."""
    contexts = Contexts()
    await contexts.prepare()
    given = {"contexts": contexts}
    application = Application(
        [
            ("/health", Health, given),
            ("/execute", Execute, given),
            ("/contexts", AllContexts, given),
            ("/contexts/([^/]+)", OneContext, given),
            ("/contexts/([^/]+)/restart", Restart, given),
        ],
        log_function=lambda _: None,
    )
    server = HTTPServer(
        application, idle_connection_timeout=IDLE_LIMIT, max_body_size=REQUEST_BYTES_MAX
    )
    server.listen(PORT, "127.0.0.1")
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    for context in list(contexts.all()):
        await contexts.remove(context)


def main():
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve())

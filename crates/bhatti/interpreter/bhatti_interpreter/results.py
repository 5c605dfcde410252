"""The lines of an execution, made from the messages of a kernel."""

import datetime

# The formats of results that have a name of their own.
FORMATS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}

END = {"type": "end_of_execution"}
KEEPALIVE = {"type": "keepalive"}


def line_of(message):
    """Returns the line for a message, or None."""
    kind, content = message["msg_type"], message["content"]
    if kind == "execute_input":
        count = content["execution_count"]
        return {"type": "number_of_executions", "execution_count": count}
    if kind == "stream":
        return output(content["name"], content["text"], message["header"]["date"])
    if kind in ("display_data", "execute_result"):
        return result(content["data"], is_main_result=kind == "execute_result")
    if kind == "error":
        traceback = "\n".join(content["traceback"])
        return error(content["ename"], content["evalue"], traceback)
    return None


def output(kind, text, date=None):
    """Returns the line of a piece of `stdout` or `stderr`."""
    date = date or datetime.datetime.now(datetime.timezone.utc)
    return {"type": kind, "text": text, "timestamp": date.isoformat()}


def error(name, value, traceback=None):
    traceback = traceback or f"{name}: {value}"
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def result(data, is_main_result):
    """Returns the line of a result: a dict from MIME types to content."""
    line = {"type": "result", "is_main_result": is_main_result, "extra": {}}
    for kind, content in data.items():
        if kind in FORMATS:
            line[FORMATS[kind]] = content
        else:
            line["extra"][kind] = content
    text = line.get("text", "")
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        line["text"] = text[1:-1]
    return line

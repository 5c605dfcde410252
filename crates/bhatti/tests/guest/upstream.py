"""An application in a sandbox, for tests of what passes on to it: it says exactly what arrived, and answers as asked."""

import base64
import hashlib
import json
import socketserver
import sys
import threading

go = threading.Event()


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.one():
            pass

    def one(self):
        line = self.rfile.readline().decode("latin-1").strip()
        if not line:
            return False
        method, path, _ = line.split(" ", 2)
        headers = []
        while True:
            header = self.rfile.readline().decode("latin-1").strip()
            if not header:
                break
            name, value = header.split(":", 1)
            headers.append([name.strip().lower(), value.strip()])
        named = dict(headers)
        if path.startswith("/early"):
            self.answer(b"too large", status="413 Content Too Large")
            return False
        body = self.body(named)
        route = path.split("?")[0].split("/")[1]
        return getattr(self, "do_" + (route or "echo"), self.do_echo)(method, path, headers, named, body)

    def body(self, named):
        if named.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                size = int(self.rfile.readline(), 16)
                chunk = self.rfile.read(size)
                self.rfile.readline()
                if size == 0:
                    return body
                body += chunk
        return self.rfile.read(int(named.get("content-length", 0)))

    def send(self, text):
        self.wfile.write(text if isinstance(text, bytes) else text.encode())
        self.wfile.flush()

    def answer(self, body, status="200 OK", extra=""):
        self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n")
        self.send(body)
        return True

    def do_echo(self, method, path, headers, named, body):
        said = {"method": method, "path": path, "headers": headers, "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest()}
        text = json.dumps(said).encode()
        if method == "HEAD":
            self.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\nX-Head: yes\r\n\r\n")
            return True
        extra = "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nX-End: 1\r\nKeep-Alive: timeout=5\r\n"
        return self.answer(text, extra=extra)

    def do_status(self, method, path, headers, named, body):
        return self.answer(b"teapot", status="418 I'm a teapot")

    def do_redirect(self, *_):
        extra = f"Location: http://localhost:{sys.argv[1]}/x?y\r\nRefresh: 3; url=/z\r\n"
        return self.answer(b"", status="302 Found", extra=extra + "Set-Cookie: a=b; Path=/; Domain=sb.test\r\n")

    def do_old(self, *_):
        self.send("HTTP/1.0 200 OK\r\n\r\nold")
        return False

    def do_events(self, *_):
        self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: first\n\n")
        go.wait(60)
        self.send("data: second\n\n")
        return False

    def do_go(self, *_):
        go.set()
        return self.answer(b"gone")

    def do_silent(self, *_):
        self.rfile.read()
        return False

    def do_close(self, *_):
        return False

    def do_garbage(self, *_):
        self.send("this is no HTTP\r\n\r\n")
        return False

    def do_large(self, *_):
        extra = "".join(f"X-Many-{n}: {n}\r\n" for n in range(200))
        return self.answer(b"large", extra=extra + "X-Long: " + "y" * 30000 + "\r\n")

    def do_chunked(self, *_):
        self.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        return True

    def do_ws(self, method, path, headers, named, body):
        key = named["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        # The first message comes with the head, in one packet.
        self.send((f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   f"Sec-WebSocket-Accept: {accept}\r\n\r\n").encode() + b"\x81\x05early")
        while True:
            head = self.rfile.read(2)
            if len(head) < 2:
                return False
            length = head[1] & 0x7F
            if length == 126:
                length = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            if head[0] & 0x0F == 8:
                self.send(b"\x88\x00")
                return False
            if length < 126:
                self.send(bytes([head[0], length]) + data)
            else:
                self.send(bytes([head[0], 126]) + length.to_bytes(2, "big") + data)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024


Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

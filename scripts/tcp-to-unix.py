"""Relays TCP connections to a Unix socket, for tools that support only TCP.

Usage: tcp-to-unix.py SOCKET PORT_FILE
"""

import asyncio
import sys


async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


async def relay(reader, writer):
    upstream_reader, upstream_writer = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))


async def main():
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    with open(sys.argv[2], "w") as file:
        file.write(str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


asyncio.run(main())

"""Starts the server."""

from .server import main

main()

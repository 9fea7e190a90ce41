"""Prints, logs, counts, fails, and probes what a guest does not have."""

import os
import socket
from collections.abc import Callable

from kvs_sdk import Request, Response, guest, line
from wit_world.imports import logging, metrics, request_context

PROBES: dict[str, Callable[[], object]] = {
    "open": lambda: open("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "socket": lambda: socket.socket(),
    "resolve": lambda: socket.getaddrinfo(b"example.org", 80),
    "environment": lambda: os.environ["HOME"],
    "request-id": request_context.request_id,
}


def handle(request: Request) -> Response:
    print(f"asked for {request.key}")
    logging.log(logging.Level.WARN, f"warned of {request.key}")
    metrics.add("probes", [("key", request.key)], 2)
    metrics.set("last", [], 0.5)
    if request.key == "fail":
        raise LookupError("nothing is found")
    try:
        return line(200, repr(PROBES[request.key]()))
    except (OSError, LookupError) as error:
        return line(200, f"refused: {error!r}")


Lifecycle, Handler, Sharding = guest("probe-python", "0.1.0", [], handle)

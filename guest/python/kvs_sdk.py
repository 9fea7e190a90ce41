"""SDK for guests whose paths name keys: a guest describes itself and handles requests, and the SDK keeps what the log says.

componentize-py generates `wit_world`, the typed contract, from `wit/` when it builds the guest.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports import lifecycle
from wit_world.exports.sharding import Target, Target_AnyShard, Target_Key
from wit_world.imports import response_cache, timer, transaction_log
from wit_world.imports.http import Header, Response
from wit_world.imports.http import Request as Received
from wit_world.imports.transaction_log import Event, Event_Delete, Event_Put, Put

STATUS = {
    transaction_log.AppendError_InsufficientStorage: (507, "no room is left"),
    transaction_log.AppendError_Unavailable: (503, "the log accepts no entries now"),
    transaction_log.AppendError_ReadOnly: (403, "writes are not allowed here"),
    transaction_log.AppendError_TooLarge: (413, "too large for the log"),
    transaction_log.AppendError_InvalidKey: (400, "not a valid key"),
}

Metadata = list[tuple[str, str]]


@dataclass(slots=True)
class Item:
    sequence: int
    value: bytes
    metadata: Metadata
    expires_at_ms: int | None


def header(name: str, text: str) -> Header:
    return Header(name, text.encode())


def etag(sequence: int) -> Header:
    return header("etag", f'"{sequence}"')


def line(status: int, text: str, read_sequence: int = 0, more: Sequence[Header] = ()) -> Response:
    """A response of one line of text."""
    return Response(status, [header("content-type", "text/plain; charset=utf-8"), *more], f"{text}\n".encode(), read_sequence)


class Rejected(Exception):
    """Raised for a request that cannot be answered otherwise, with its response."""

    def __init__(self, response: Response):
        self.response = response


def key_of(path: str) -> str:
    """The key of a path, by the rules that all guests keep."""
    raw = re.fullmatch(r"/v1/(?:key/(.*)|([^/]*))", path, re.DOTALL)
    if not raw:
        raise Rejected(line(404, "unknown path; keys live at /v1/{key} and /v1/key/{key}"))
    escaped = raw[1] if raw[1] is not None else raw[2]
    try:
        if re.search("%(?![0-9A-Fa-f]{2})", escaped):
            raise ValueError(escaped)
        key = unquote_to_bytes(escaped).decode()
    except ValueError:
        raise Rejected(line(400, "the key has a bad percent escape, or is not valid UTF-8")) from None
    if not 1 <= len(key.encode()) <= 1024 or re.search(r"[\0-\x1f\x7f-\x9f]|(^|/)\.\.?(/|\Z)", key):
        raise Rejected(line(400, "a key is 1 to 1024 bytes, without control characters, `.` and `..` segments"))
    return key


class Store:
    """What the log says."""

    def __init__(self) -> None:
        self.items: dict[bytes, Item] = {}
        self.bytes = 0
        self.newest_delete = 0
        # Before each key: the secret of Python's hashes is a part of the component, and clients could choose keys that collide.
        self.seed = b""

    def read(self, key: str, time_ms: int) -> tuple[Item | None, int]:
        """The item, unless it expired, and the sequence that a response with or without it depends on."""
        found = self.items.get(self.seed + key.encode())
        if found and (found.expires_at_ms is None or found.expires_at_ms > time_ms):
            return found, found.sequence
        # The absence of what has expired depends on its put too.
        return None, max(self.newest_delete, found.sequence if found else 0)

    def append(self, event: Event) -> int:
        """Appends, then changes. Returns the sequence."""
        try:
            sequence = transaction_log.append([event])
        except Err as error:
            status, reason = STATUS[type(error.value)]
            raise Rejected(line(status, f"{reason}; nothing was stored")) from None
        match event:
            case Event_Put(put):
                self.change(put.key.encode(), Item(sequence, put.value, put.metadata, put.expires_at_ms), sequence)
            case Event_Delete(key):
                self.change(key.encode(), None, sequence)
        return sequence

    def apply(self, batch: lifecycle.Batch) -> None:
        data, start = batch.bytes, 0
        for entry in batch.entries:
            end = start + entry.key_bytes
            key, start, item = data[start:end], end, None
            if (put := entry.put) is not None:
                start = end + put.value_bytes
                metadata = [] if put.metadata is None else batch.metadata[put.metadata]
                item = Item(entry.sequence, data[end:start], metadata, put.expires_at_ms)
            self.change(key, item, entry.sequence)

    def change(self, key: bytes, item: Item | None, sequence: int) -> None:
        """What an entry of the log does: on replay, and right after it was appended."""
        old = self.items.pop(self.seed + key, None)
        if old:
            self.bytes -= len(key) + len(old.value)
        if item:
            self.items[self.seed + key] = item
            self.bytes += len(key) + len(item.value)
        elif old:
            self.newest_delete = sequence


class Request:
    """A request for a key."""

    def __init__(self, received: Received, store: Store):
        path, _, self.query = received.target.partition("?")
        self.key = key_of(path)
        self.method = received.method
        self.body = received.body
        self.received = received
        self.store = store

    def headers(self, name: str) -> list[str]:
        """Values of a header, of those that the guest's description names."""
        return [header.value.decode(errors="replace") for header in self.received.headers if header.name == name]

    def read(self) -> tuple[Item | None, int]:
        """The item of the key, unless it expired, and the sequence that a response with or without it depends on."""
        return self.store.read(self.key, self.received.time_ms)

    def reusable(self, item: Item | None) -> None:
        """Declares that the response depends on nothing but the request and the item of the key."""
        response_cache.reuse([self.key], item.expires_at_ms if item else None)

    def put(self, value: bytes, metadata: Metadata, expires_at_ms: int | None = None) -> int:
        """Appends a put of the key, then changes the store. Returns the sequence."""
        return self.store.append(Event_Put(Put(self.key, value, metadata, expires_at_ms)))

    def delete(self) -> int:
        """Appends a delete of the key, then changes the store. Returns the sequence."""
        return self.store.append(Event_Delete(self.key))


def guest(name: str, version: str, headers: list[str], handle: Callable[[Request], Response]):
    """The classes that the module of a guest must have: Lifecycle, Handler and Sharding."""
    store = Store()

    class Lifecycle(exports.Lifecycle):
        def describe(self) -> lifecycle.Description:
            store.seed = os.urandom(8)
            return lifecycle.Description(name, version, headers, [])

        def apply(self, batch: lifecycle.Batch) -> None:
            store.apply(batch)

        def tick(self, now_ms: int) -> int | None:
            # There is no housekeeping: never again.
            timer.set(None)
            return None

        def stats(self) -> lifecycle.Statistics:
            return lifecycle.Statistics(len(store.items), store.bytes)

    class Handler(exports.Handler):
        def handle(self, request: Received) -> Response:
            try:
                return handle(Request(request, store))
            except Rejected as rejected:
                return rejected.response

    class Sharding(exports.Sharding):
        def route(self, method: str, target: str) -> Target:
            try:
                return Target_Key(key_of(target.partition("?")[0]))
            except Rejected:
                return Target_AnyShard()

        def extract_keys(self, body: bytes) -> list[str]:
            return []

        def merge_responses(self, request: Received, responses: list[Response]) -> Response:
            return responses[0]

    return Lifecycle, Handler, Sharding

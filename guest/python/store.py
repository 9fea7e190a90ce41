"""A store in Python: the paths, methods and headers of the default guest, without conditions, lists, transactions and times to
live; it honours those that another guest has set."""

import re

from kvs_sdk import Request, Response, etag, guest, header, line


def is_useful(content_type: str) -> bool:
    """A content type that a response can carry; curl's is what curl sends when its user named none."""
    form = content_type.lower().startswith("application/x-www-form-urlencoded")
    return not form and re.fullmatch("[ -~]{1,256}", content_type) is not None


def handle(request: Request) -> Response:
    if request.query:
        return line(400, "this store takes no query parameters")
    item, read_sequence = request.read()
    if request.method == "PUT":
        # A part would replace the whole (RFC 9110, section 14.5).
        if request.headers("content-range"):
            return line(400, "content-range: send the whole value")
        if request.headers("content-encoding"):
            return line(415, "content-encoding would not be kept")
        types = list(filter(is_useful, request.headers("content-type")))[:1]
        sequence = request.put(request.body, [("content-type", kind) for kind in types])
        return Response(201, [etag(sequence)], b"", sequence)
    if request.method == "DELETE":
        return Response(200, [], b"", request.delete() if item else read_sequence)
    if request.method not in ("GET", "HEAD"):
        return line(405, "a key has GET, HEAD, PUT and DELETE", more=[header("allow", "GET, HEAD, PUT, DELETE")])
    request.reusable(item)
    if not item:
        return line(404, "no such key", read_sequence)
    kind = next((text for name, text in item.metadata if name == "content-type" and is_useful(text)), "application/octet-stream")
    headers = [header("content-type", kind), etag(item.sequence), header("content-security-policy", "sandbox")]
    return Response(200, headers, item.value, read_sequence)


Lifecycle, Handler, Sharding = guest("python", "0.1.0", ["content-type", "content-range", "content-encoding"], handle)

"""P01 to P13 and P38: what is wrong before any field is looked at."""

import gzip
import json
import zlib
from collections.abc import Iterator

from tests.bad_input.cases import CHAT, COMPLETIONS, EMBEDDINGS, MODEL, TOKENIZE, Case, Row, chat

ROUNDS = "/api/v1/arena/rounds"
PATHS = (
    *(CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE, "/detokenize", f"/v1/engines/{MODEL}/completions"),
    *(ROUNDS, f"{ROUNDS}/round-0123/turns"),
)
SMALL_PATHS = (f"{ROUNDS}/round-0123/vote", "/api/v1/feedback")
"""Their bodies may have 16 KiB."""


def head(line: str, *headers: str, end: str = "\r\n") -> bytes:
    return (end.join([line, *headers]) + 2 * end).encode("latin-1")


def chunked(path: str, host: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """A body without a declared length."""
    yield head(f"POST {path} HTTP/1.1", f"Host: {host}", "Transfer-Encoding: chunked")
    for chunk in chunks:
        yield b"%x\r\n%s\r\n" % (len(chunk), chunk)


def endless() -> Iterator[bytes]:
    """Ten gigabytes, if anybody reads them."""
    yield b'{"model": "'
    for _ in range(10 * 2**30 // 65536):
        yield b"x" * 65536


def nested(levels: int, opening: str, closing: str) -> bytes:
    return ('{"model": "m", "tools": ' + opening * levels + "1" + closing * levels + "}").encode()


def bodies(*pairs: tuple[str, bytes]) -> tuple[Case, ...]:
    """Every body to every route that may take one of its size."""
    return tuple(
        Case(what, 400, "invalid_json", body=body, path=path)
        for what, body in pairs
        for path in (PATHS if len(body) > 16_000 else PATHS + SMALL_PATHS)
    )


GOOD = json.dumps(chat()).encode()
TEXT = GOOD.decode()

P01 = Row(
    "P01",
    "No JSON object",
    "To every route that takes a body.",
    bodies(
        ("an empty body", b""),
        ("`null`", b"null"),
        ("`[]`", b"[]"),
        ("`42`", b"42"),
        ('`"x"`', b'"x"'),
        ("JSON that is cut", GOOD[:-5]),
        ("something behind the JSON", GOOD + b" x"),
        ("the same key twice", b'{"model": "a", "model": "b"}'),
        ("the same key twice, spelt in two ways", b'{"model": "a", "mode\\u006c": "b"}'),
        ("a byte order mark", b"\xef\xbb\xbf" + GOOD),
    ),
)


def with_length(length: str, body: bytes = GOOD) -> Case:
    def raw(host: str) -> list[bytes]:
        return [head(f"POST {CHAT} HTTP/1.1", f"Host: {host}", *length.split("; ")) + body]

    return Case(f"`{length}`", 400, "invalid_http", raw=raw)


P02 = Row(
    "P02",
    "A body too large, or of another length than it says",
    "At most 4 MiB, counted as they come; the process grows by no more than it reads.",
    (
        Case("10 GB in chunks", 413, "body_too_large", raw=lambda host: chunked(CHAT, host, endless())),
        Case(
            "`Content-Length: 10000000000`",
            413,
            "body_too_large",
            raw=lambda host: [head(f"POST {CHAT} HTTP/1.1", f"Host: {host}", "Content-Length: 10000000000")],
        ),
        Case(
            "a Content-Length that is too short",
            400,
            "invalid_json",
            raw=lambda host: [head(f"POST {CHAT} HTTP/1.1", f"Host: {host}", "Content-Length: 9") + GOOD],
        ),
        *(
            Case("17 KB where 16 KiB are enough", 413, "body_too_large", body=b" " * 17_000, path=path)
            for path in SMALL_PATHS
        ),
        with_length("Content-Length: -1"),
        with_length("Content-Length: 1e3"),
        with_length("Content-Length: 99999999999999999999999999"),
        with_length("Content-Length: 5; Content-Length: 6"),
    ),
)

P03 = Row(
    "P03",
    "Nesting",
    "At most 64 levels and 32,768 objects and lists.",
    bodies(
        *(
            (f"{kind} in {levels:,} levels", nested(levels, opening, closing))
            for levels in (100, 20_000, 800_000)
            for kind, opening, closing in (("lists", "[", "]"), ("objects", '{"a":', "}"), ("both", '[{"a":', "}]"))
            if levels * len(opening + closing) < 4_000_000
        )
    )
    + bodies(("a million lists that are not closed", b'{"a": ' + b"[" * 1_000_000)),
)

P04 = Row(
    "P04",
    "Numbers that are none, or too large",
    "An integer beyond 64 bits is refused wherever it stands. `-0` is 0.",
    bodies(
        *(
            (what, TEXT[:-1].encode() + b', "x": ' + number + b"}")
            for what, number in (
                ("an integer of a million digits", b"9" * 1_000_000),
                ("`18446744073709551616`", b"18446744073709551616"),
                ("`1e400`", b"1e400"),
                ("`NaN`", b"NaN"),
                ("`-Infinity`", b"-Infinity"),
                ("`01`", b"01"),
            )
        )
    )
    + (
        Case("`n` -0", 400, "invalid_value", body=TEXT[:-1].encode() + b', "n": -0}'),
        Case("`temperature` -0.0", 200, body=TEXT[:-1].encode() + b', "temperature": -0.0}'),
    ),
)

P05 = Row(
    "P05",
    "Another encoding",
    "JSON is UTF-8. Compressed bodies are not read.",
    bodies(
        ("bytes that are no UTF-8", GOOD.replace(b"Hello", b"\xff\xfe")),
        ("an overlong form", GOOD.replace(b"Hello", b"\xc0\xaf")),
        ("a surrogate as bytes", GOOD.replace(b"Hello", b"\xed\xa0\x80")),
        ("UTF-16", TEXT.encode("utf-16")),
        ("UTF-32", TEXT.encode("utf-32")),
    )
    + tuple(
        Case(
            f"`Content-Encoding: {name}`", 415, "unsupported_media_type", body=body, headers={"Content-Encoding": name}
        )
        for name, body in (
            ("gzip", lambda: gzip.compress(b" " * 100_000_000)),
            ("deflate", lambda: zlib.compress(GOOD)),
            ("br", GOOD),
            ("identity, gzip", GOOD),
        )
    ),
)

P06 = Row(
    "P06",
    "Content-Type",
    "JSON may call itself JSON, a form or plain text, as `curl -d` does, or nothing at all.",
    tuple(
        Case(f"`{kind}`", 415, "unsupported_media_type", body=GOOD, headers={"Content-Type": kind})
        for kind in ("multipart/form-data; boundary=x", "application/xml", "text/html", "image/png", "x" * 2000)
    )
    + tuple(
        Case(f"JSON called {name}", 200, body=GOOD, headers={"Content-Type": kind} if kind else {})
        for name, kind in (
            ("`application/x-www-form-urlencoded`", "application/x-www-form-urlencoded"),
            ("`text/plain`", "text/plain"),
            ("nothing", ""),
        )
    ),
)


def raw(
    what: str, status: int, code: str | None, line: str, *headers: str, body: bytes = b"", end: str = "\r\n"
) -> Case:
    """A request by its lines; HOST in them is the server's."""

    def pieces(host: str) -> list[bytes]:
        return [head(line.replace("HOST", host), *(text.replace("HOST", host) for text in headers), end=end) + body]

    return Case(what, status, code, raw=pieces)


MODELS = "GET /v1/models HTTP/1.1"
CLOSE = ("Host: HOST", "Connection: close")

P07 = Row(
    "P07",
    "Headers",
    "32 KiB and 100 of them, 8 KiB of URL, all within 10 seconds.",
    (
        raw("a header of 100 KiB", 431, "headers_too_large", MODELS, "Host: HOST", "A: " + "x" * 102_400),
        Case(
            "a header of 1 MB that does not end",
            431,
            "headers_too_large",
            raw=lambda host: [f"{MODELS}\r\nHost: {host}\r\nA: ".encode(), *[b"x" * 1000] * 1000],
        ),
        raw("2,000 headers", 431, "too_many_headers", MODELS, "Host: HOST", *["A: b"] * 2000),
        raw("a URL of 64 KiB", 414, "url_too_long", f"GET /{'x' * 65536} HTTP/1.1", "Host: HOST"),
        raw("a query of 64 KiB", 414, "url_too_long", f"GET /v1/models?{'x' * 65536} HTTP/1.1", "Host: HOST"),
    ),
)

POST = f"POST {CHAT} HTTP/1.1"
P08 = Row(
    "P08",
    "HTTP that two readers might read in two ways",
    "Refused, and the connection ends. A URL with a host must name the host of the Host header.",
    (
        raw(
            "chunks that do not end",
            400,
            "invalid_http",
            POST,
            "Host: HOST",
            "Transfer-Encoding: chunked",
            body=b"2\r\n{}XX",
        ),
        raw(
            "a chunk of size `-1`",
            400,
            "invalid_http",
            POST,
            "Host: HOST",
            "Transfer-Encoding: chunked",
            body=b"-1\r\n",
        ),
        raw(
            "Content-Length and Transfer-Encoding",
            400,
            "invalid_http",
            POST,
            "Host: HOST",
            "Content-Length: 2",
            "Transfer-Encoding: chunked",
            body=b"0\r\n\r\n",
        ),
        raw(
            "`Transfer-Encoding: chunked, identity`",
            400,
            "invalid_http",
            POST,
            "Host: HOST",
            "Transfer-Encoding: chunked, identity",
        ),
        raw("lines that end in LF alone", 400, "invalid_http", MODELS, "Host: HOST", end="\n"),
        raw("NUL in a header", 400, "invalid_http", MODELS, "Host: HOST", "A: b\0c"),
        raw("a space before a colon", 400, "invalid_http", MODELS, "Host: HOST", "A : b"),
        raw("no Host", 400, "invalid_host", MODELS),
        raw("two Hosts", 400, "invalid_host", MODELS, "Host: HOST", "Host: HOST"),
        raw("a URL of another host", 400, "invalid_host", "GET http://evil.example/v1/models HTTP/1.1", *CLOSE),
        raw("a URL of the same host", 200, None, "GET http://HOST/v1/models HTTP/1.1", *CLOSE),
        raw("HTTP/2 without asking", 400, "invalid_http", "PRI * HTTP/2.0", "", "SM"),
        raw("no HTTP at all", 400, "invalid_http", "\x16\x03\x01\x02\x00\x01"),
    ),
)

P09 = Row(
    "P09",
    "Headers that ask for work",
    "Ranges are ignored. Who announces a body and never sends it is cut after 30 seconds (400 `body_timeout`).",
    (raw("a Range of 1,000 parts", 200, None, MODELS, *CLOSE, "Range: bytes=" + "0-," * 1000 + "0-"),),
)


def multipart(body: bytes, boundary: str = "x") -> Case:
    what = f"{len(body):,} bytes, boundary of {len(boundary):,}"
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return Case(what, 415, "unsupported_media_type", body=body, headers=kind)


P10 = Row(
    "P10",
    "Multipart",
    "Not read at all.",
    (
        multipart(b"--x\r\n" + b"x" * 1_000_000),
        multipart(b'--x\r\nContent-Disposition: form-data; filename="' + b"x" * 1_000_000 + b'"\r\n\r\n'),
        multipart(b"--x\r\n\r\n\r\n" * 100_000),
        multipart(b"x", boundary="x" * 10_000),
    ),
)

UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
P11 = Row(
    "P11",
    "Other protocols and methods",
    "There are no WebSockets here; an upgrade is not made, and the request answered as it is, as RFC 9110 7.8 allows.",
    (
        raw("a WebSocket on a route of GET", 200, None, MODELS, "Host: HOST", *UPGRADE),
        raw(
            "a WebSocket on a route of POST", 405, "method_not_allowed", f"GET {CHAT} HTTP/1.1", "Host: HOST", *UPGRADE
        ),
        raw(
            "an upgrade to h2c",
            200,
            None,
            MODELS,
            "Host: HOST",
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ),
        raw("TRACE", 405, "method_not_allowed", f"TRACE {CHAT} HTTP/1.1", *CLOSE),
        raw("GET where POST is meant", 405, "method_not_allowed", f"GET {CHAT} HTTP/1.1", *CLOSE),
        raw("PROPFIND", 405, "method_not_allowed", f"PROPFIND {CHAT} HTTP/1.1", *CLOSE),
        raw("CONNECT", 400, "invalid_http", "CONNECT evil.example:443 HTTP/1.1", *CLOSE),
        raw("an unknown verb", 400, "invalid_http", f"BREW {CHAT} HTTP/1.1", *CLOSE),
        raw("`__class__` as verb", 400, "invalid_http", f"__class__ {CHAT} HTTP/1.1", *CLOSE),
        Case(
            "a body where the URL says everything",
            400,
            "unexpected_body",
            path=f"/api/v1/models/{MODEL}/load",
            body={"worker": "w1"},
        ),
        raw("an unknown route", 404, "route_not_found", "GET /v1/nothing HTTP/1.1", *CLOSE),
    ),
)

P13 = Row(
    "P13",
    "The model's name",
    "What nobody serves is a 404 that lists what is served; a name is never a path, and never a line of the log.",
    (
        Case("none", 400, "missing_model", body={"messages": chat()["messages"]}),
        Case("`null`", 400, "missing_model", body=chat(model=None)),
        Case("one that nobody serves", 404, "model_not_found", body=chat(model="vicuna")),
        Case("an empty one", 400, None, body=chat(model="")),
        Case("a number", 400, None, body=chat(model=5)),
        Case("10 KiB", 400, None, body=chat(model="x" * 10_240)),
        Case("`../x`", 404, "model_not_found", body=chat(model="../x")),
        Case("CR and LF", 404, "model_not_found", body=chat(model="x\r\nforged line of the log")),
        Case("escapes of a terminal", 404, "model_not_found", body=chat(model="\x1b[2Jx")),
        Case(
            "`GET /v1/models/../../etc/passwd`",
            404,
            "model_not_found",
            path="/v1/models/../../etc/passwd",
            method="GET",
        ),
        Case("`GET /v1/models/%2e%2e%2fx%00`", 404, "model_not_found", path="/v1/models/%2e%2e%2fx%00", method="GET"),
    ),
)


def keyed(what: str, status: int, code: str | None, *headers: str, query: str = "") -> Case:
    def pieces(host: str) -> list[bytes]:
        return [head(f"GET /v1/models{query} HTTP/1.1", f"Host: {host}", "Connection: close", *headers)]

    return Case(what, status, code, raw=pieces, needs_key=True)


KEY = "a-key-of-these-tests"
WRONG = "invalid_api_key"
P38 = Row(
    "P38",
    "The key, on a server that has some",
    "Exactly one `Authorization: Bearer KEY`; the scheme's case does not matter.",
    (
        keyed("none", 401, WRONG),
        keyed("an empty header", 401, WRONG, "Authorization:"),
        keyed("an empty key", 401, WRONG, "Authorization: Bearer "),
        keyed("the key twice", 401, WRONG, *[f"Authorization: Bearer {KEY}"] * 2),
        keyed("`Basic`", 401, WRONG, f"Authorization: Basic {KEY}"),
        keyed("the key without a scheme", 401, WRONG, f"Authorization: {KEY}"),
        keyed("a wrong key", 401, WRONG, "Authorization: Bearer wrong"),
        keyed("bytes that are no ASCII", 401, WRONG, "Authorization: Bearer gööd"),
        keyed("16 KiB", 401, WRONG, "Authorization: Bearer " + "x" * 16_384),
        keyed(
            "64 KiB, which are too large for headers", 431, "headers_too_large", "Authorization: Bearer " + "x" * 65_536
        ),
        keyed("the key in the URL", 401, WRONG, query=f"?api_key={KEY}"),
        keyed("`bearer` in small letters", 200, None, f"Authorization: bearer {KEY}"),
    ),
)

ROWS = (P01, P02, P03, P04, P05, P06, P07, P08, P09, P10, P11, P13, P38)

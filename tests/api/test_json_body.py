"""Bodies are read within limits: bytes, time, depth, numbers of values, and nothing that would be read as another."""

import json
import socket
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat.api.http_edge import parse_json_object
from fastchat.api.json_body import MAX_BODY_BYTES
from fastchat.errors import InvalidRequestError
from tests.api.edge_app import DEADLINE_S, MAX_BYTES


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", ""],
)
def test_json_is_read_whatever_it_is_called(ask, kind):
    """A bare `curl -d` says that it sends a form."""
    status, _, body = ask("POST", "/json", '{"a": "你好 \\": {"}'.encode(), {"Content-Type": kind})
    assert (status, json.loads(body)) == (200, {"a": '你好 ": {'})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"42",
        b'"x"',
        b"{",
        b'{"a":1}x',
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\\ud800"}',
        b'{"a":1,"a":1}',
        b'{"a":{"b":[{"c" :1, "d":2,"c"\n:3}]}}',
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        b'{"a":' + b"9" * 900 + b"}",
        b'{"a":[18446744073709551616]}',
        b'{"a":-9223372036854775809}',
        b"[" * 900,
    ],
)
def test_what_is_no_plain_json_object_is_a_400(ask, body):
    status, _, answer = ask("POST", "/json", body)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/xml"},
        {"Content-Type": "image/png"},
        {"Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_another_kind_of_body_is_a_415(ask, headers):
    status, _, body = ask("POST", "/json", b"{}", headers)
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bytes_are_counted_as_they_come(ask, is_chunked):
    """With a Content-Length or without one."""
    body = iter([b'{"a": "', b"x" * MAX_BYTES, b'"}']) if is_chunked else b"x" * (MAX_BYTES + 1)
    status, _, answer = ask("POST", "/json", body)
    assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")


def test_a_declared_length_is_refused_before_a_byte_is_sent(connect):
    with connect() as client:
        client.putrequest("POST", "/json")
        client.putheader("Authorization", "Bearer good")
        client.putheader("Content-Length", str(10**12))
        client.endheaders()
        assert client.getresponse().status == 413


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text('ab":\\{}[], \n世', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab":\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text('ab":\\', max_size=3), json_values, max_size=3), st.sampled_from([None, 1]))
def test_any_object_without_double_keys_is_read_as_it_is(document, indent):
    """Strings that look like keys do not confuse the count of keys."""
    assert parse_json_object(json.dumps(document, indent=indent).encode()) == document


@given(st.dictionaries(st.text('ab":\\', max_size=3), json_values, min_size=1, max_size=3))
def test_a_key_that_comes_twice_is_always_seen(document):
    text = json.dumps(document)
    key = json.dumps(next(iter(document)))
    with pytest.raises(InvalidRequestError, match="twice"):
        parse_json_object(f"{text[:-1]}, {key}: 0}}".encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"[]," * 1_300_000 + b"[]]}",
        b'{"a":[' + b"{}," * 1_300_000 + b"{}]}",
        b'{"a":[' + b'"",' * 1_300_000 + b'""]}',
        b'{"a":[' + b"1," * 2_000_000 + b"1]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(370_000)) + b"}",
        b'{"a":"' + b'\\":' * 1_300_000 + b'"}',
        b'{"a":"' + b'\\"' * 2_000_000,
        b'"' * 4_000_000,
        b"\\" * 4_000_000,
        b'{"a":' + b"9" * 4_000_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_within_the_limit_of_bytes_is_read_or_refused_quickly(body):
    """Whatever is in it; four million bytes of lists once took six seconds. What holds the loop is bounded."""
    assert len(body) <= MAX_BODY_BYTES
    began = time.process_time()
    with suppress(InvalidRequestError):
        parse_json_object(body)
    assert time.process_time() - began < 1.0


@given(
    st.integers(-(2**70), 2**70)
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
)
def test_an_integer_is_read_as_itself_or_refused(number):
    """Beyond 64 bits the parser would make a float of it; digits of a fraction, an exponent or a text are none."""
    other = {"f": 0.12345678901234567, "s": "9" * 30}
    body = (
        json.dumps({"a": [number], **other}).encode().replace(b"0.12345678901234567", b"0.1234567890123456789012345e1")
    )
    if -(2**63) <= number < 2**64:
        assert parse_json_object(body)["a"] == [number]
    else:
        with pytest.raises(InvalidRequestError, match="beyond 64 bits"):
            parse_json_object(body)


def test_a_body_that_trickles_ends_at_the_deadline(connect):
    """However often a byte comes; the client is told."""
    with connect() as client:
        client.putrequest("POST", "/json")
        client.putheader("Authorization", "Bearer good")
        client.putheader("Content-Length", "900")
        began = time.monotonic()
        client.endheaders()
        client.sock.settimeout(0.1)
        while True:
            client.send(b" ")
            try:
                client.sock.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                assert time.monotonic() - began < 60
                continue
            break
        client.sock.settimeout(60)
        answer = client.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "body_timeout")
        assert DEADLINE_S * 0.9 < time.monotonic() - began < DEADLINE_S + 10

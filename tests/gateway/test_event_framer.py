"""The framer alone: bytes in, events out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat.api.streaming import end_tag, ids_tag, prompt_tag
from fastchat.gateway import event_framer
from fastchat.gateway.event_framer import BrokenStreamError, EventFramer

token_ids = st.lists(st.integers(0, 200_000), max_size=4)
tags = st.one_of(
    st.just(b""),
    st.builds(ids_tag, st.integers(0, 3), st.integers(0, 99), token_ids),
    st.builds(prompt_tag, st.integers(0, 3), token_ids),
    st.builds(end_tag, st.integers(0, 3)),
)
payloads = st.text("ab世: {}0123,", max_size=12).map(str.encode)
line_ends = st.sampled_from([b"\n", b"\r\n"])


@st.composite
def streams(draw):
    """(the worker's bytes, the client's bytes, the tags)"""
    worker, client, kept = b"", b"", b""
    for _ in range(draw(st.integers(0, 6))):
        end = draw(line_ends)
        tag = draw(tags).replace(b"\n", end)
        event = draw(st.sampled_from([b"data: ", b": note ", b"event: x" + end + b"data: "])) + draw(payloads)
        event += end + end
        worker, client, kept = worker + tag + event, client + event, kept + tag
    return worker + b"data: [DONE]\n\n", client + b"data: [DONE]\n\n", kept


def run(framer, worker_bytes, cuts):
    pieces, begin = [], 0
    for cut in [*sorted(cuts), len(worker_bytes)]:
        if cut > begin:
            pieces.append(framer.feed(worker_bytes[begin:cut]))
            begin = cut
    return [*pieces, framer.finish()]


@given(streams(), st.data())
def test_however_the_bytes_are_cut_the_client_gets_the_same(stream, data):
    """The client's bytes are the worker's without the tag lines, and every write ends at an event's end."""
    worker, client, kept = stream
    cuts = data.draw(st.lists(st.integers(0, len(worker)), max_size=12))
    framer = EventFramer(has_tags=True)
    pieces = run(framer, worker, cuts)
    assert b"".join(pieces) == client
    assert bytes(framer.tags) == kept
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n", b"\n\r\n")) for piece in pieces if piece)


@given(streams(), st.integers(1, 7))
def test_without_tags_nothing_is_taken_out(stream, size):
    """What looks like a tag from a server that knows none stays."""
    worker, _, _ = stream
    framer = EventFramer(has_tags=False)
    assert b"".join(run(framer, worker, range(0, len(worker), size))) == worker
    assert framer.tags is None


def test_events_of_one_read_go_out_in_one_piece():
    framer = EventFramer(has_tags=True)
    assert framer.feed(b": 0 0 5\ndata: a\n\n: 0 1 6\ndata: b\n\ndata: c") == b"data: a\n\ndata: b\n\n"
    assert framer.feed(b"\n\n") == b"data: c\n\n"


@pytest.mark.parametrize(
    "ending", [b"data: [DONE]\n\n", b"data: [DONE]", b"data:[DONE]\r\n", b'data: {"error":{"message":"x"}}\n\n']
)
def test_an_answer_that_says_its_end_is_whole(ending):
    framer = EventFramer(has_tags=True)
    sent = framer.feed(b"data: a\n\n" + ending)
    assert framer.has_ended() == ending.endswith(b"\n\n")
    assert (sent + framer.finish()).rstrip() == b"data: a\n\n" + ending.rstrip()


@pytest.mark.parametrize(
    ("text", "can_go_on"),
    [(b"", True), (b": wait\n\n", True), (b": wait\n\n: 0 0 5\ndata: a\n\n", True), (b": wait\n\ndata: a\n\n", False)],
)
def test_an_answer_without_tags_goes_on_nowhere(text, can_go_on):
    """It would begin again behind what the client has."""
    framer = EventFramer(has_tags=True)
    framer.feed(text)
    assert framer.can_go_on() == can_go_on


@pytest.mark.parametrize("text", [b"", b"data: a\n\n", b"data: a\n\ndata: [DO", b"data: [DONE]\n\ndata: b\n\n"])
def test_an_answer_that_just_stops_is_broken(text):
    framer = EventFramer(has_tags=True)
    framer.feed(text)
    assert not framer.has_ended()
    with pytest.raises(BrokenStreamError):
        framer.finish()


def test_an_endless_event_is_refused_before_it_fills_memory():
    framer = EventFramer(has_tags=False)
    with pytest.raises(BrokenStreamError, match="more than"):
        feed_for_ever(framer, b"x" * 65536)
    assert len(framer._rest) <= event_framer.MAX_EVENT_BYTES + 65536


def test_endless_blank_lines_are_refused():
    with pytest.raises(BrokenStreamError, match="blank"):
        feed_for_ever(EventFramer(has_tags=False), b"\n\n" * 1000)


def feed_for_ever(framer, piece):
    for _ in range(2 * event_framer.MAX_EVENT_BYTES // len(piece)):
        framer.feed(piece)


def test_too_many_tags_are_given_up_and_the_stream_goes_on():
    framer = EventFramer(has_tags=True)
    event = ids_tag(0, 0, range(1000)) + b"data: a\n\n"
    for _ in range(event_framer.MAX_TAG_BYTES // 3000):
        assert framer.feed(event) == b"data: a\n\n"
    assert framer.tags is None

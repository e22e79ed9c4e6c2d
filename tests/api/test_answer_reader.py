"""Events of an answer, however they are cut."""

import json

import pytest

from fastchat.api.answer_reader import AnswerReader, error_of
from fastchat.errors import RequestError, UnavailableError


def chunk(**fields):
    return json.dumps({"object": "chat.completion.chunk", **fields}, ensure_ascii=False)


def delta(text, finish=None):
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


EVENTS = (
    f": a comment\r\n\r\ndata: {chunk(choices=[])}\n\nevent: message\ndata: {delta('你')}\r\n\r\n"
    f"data:{delta('好🙂')}\n\n: fastchat 0 0 12\ndata: {delta(None, 'stop')}\n\n"
    f"data: {chunk(choices=[], usage={'prompt_tokens': 3, 'completion_tokens': 2})}\n\ndata: [DONE]\n\n"
).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, len(EVENTS)])
def test_text_does_not_depend_on_the_cuts(size):
    """Also not in the middle of a character, of a line end or of an event."""
    reader = AnswerReader()
    text = "".join(reader.push(EVENTS[start : start + size]) for start in range(0, len(EVENTS), size))
    assert text == "你好🙂"
    assert (reader.finish_reason, reader.is_done) == ("stop", True)
    assert (reader.num_prompt_tokens, reader.num_generated_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"error": {"message": "no key", "code": "invalid_api_key"}}, 401, RequestError, "no key"),
        ({"error": {"message": "busy"}}, 503, UnavailableError, "busy"),
        ({"error": "plain"}, 400, RequestError, "plain"),
        ({"object": "error", "message": "old", "code": 40303}, 400, RequestError, "old"),
        ({"detail": "Not Found"}, 404, RequestError, "Not Found"),
    ],
)
def test_every_shape_of_error_has_its_message(body, status, kind, message):
    """OpenAI's, FastChat's flat one, FastAPI's."""
    error = error_of(body, status=status)
    assert isinstance(error, kind)
    assert error.message == message


def test_answer_is_no_error():
    assert error_of({"choices": []}) is None


def test_stream_of_something_else_is_told():
    with pytest.raises(UnavailableError, match="not JSON"):
        AnswerReader().push(b"data: <html>\n\n")

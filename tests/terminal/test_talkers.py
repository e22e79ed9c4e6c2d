"""Both talkers keep one law: the model loaded here and the server that serves it give the same answers and errors."""

import asyncio
import json
import socket
import threading

import pytest

from fastchat.errors import AuthenticationError, ConfigError, ContextLengthError, RequestError, UnavailableError
from fastchat.terminal.conversation import Turn
from fastchat.terminal.local_talker import LocalTalker
from fastchat.terminal.remote_talker import RemoteTalker, base_url_of, list_models
from fastchat.terminal.talker import AnswerOptions, Question
from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig
from fastchat.worker.loaded_model import open_models
from tests.system import MODEL_NAME
from tests.terminal.conftest import LONG_CONTEXT

ENGINE = EngineSpec(device="cpu", dtype="float32", kv_cache_bytes=32 * 2**20)
QUESTIONS = [
    Question((Turn("user", "你是谁？"),), options=AnswerOptions(temperature=0, max_tokens=64)),
    Question((Turn("user", "你是谁？"),), "你是一个诗人。", AnswerOptions(seed=7, max_tokens=64)),
    Question(
        (Turn("user", "Hello!"), Turn("assistant", "你好！"), Turn("user", "如何使用fastchat")),
        options=AnswerOptions(temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=1, max_tokens=64),
    ),
]


@pytest.fixture(params=["local", "remote"])
def talker(request, model_folder):
    """A talker of each kind, not yet started."""
    if request.param == "local":
        config = WorkerConfig(models=(ModelSpec(model_folder),), address="", cluster_token="none", engine=ENGINE)
        (model,) = open_models(config).models
        return LocalTalker(lambda: model.start(config))
    system = request.getfixturevalue("system")
    return RemoteTalker(f"{system.api_url}/v1", api_key=None, model_name=MODEL_NAME)


@pytest.fixture(scope="module")
def expected(system):
    """What the API answers, not streamed."""
    bodies = [question.body(MODEL_NAME, max_tokens=64) for question in QUESTIONS]
    return [system.post("/v1/chat/completions", {**body, "stream": False, "stream_options": None}) for body in bodies]


def run(talker, use):
    async def whole():
        await talker.start()
        try:
            return await use(talker)
        finally:
            await talker.close()

    return asyncio.run(whole())


def test_answers_are_those_of_the_api(talker, expected):
    """Text, ending and counts; the pieces as they come make the text."""

    async def use(talker):
        answers = []
        for question in QUESTIONS:
            pieces = []
            answers.append((await talker.answer(question, pieces.append), pieces))
        return answers

    answers = run(talker, use)
    assert any(len(pieces) > 1 for _, pieces in answers)  # where a machine stalls, a whole answer may come in one
    for (answered, pieces), body in zip(answers, expected, strict=True):
        (choice,) = body["choices"]
        assert answered.text == "".join(pieces) == choice["message"]["content"]
        assert answered.finish_reason == choice["finish_reason"]
        assert answered.num_prompt_tokens == body["usage"]["prompt_tokens"]
        assert answered.num_generated_tokens == body["usage"]["completion_tokens"]


def test_prompt_that_does_not_fit_is_told_with_both_counts(talker):
    """One sentence with the same numbers, and the next question is answered."""
    long = Question((Turn("user", "你好" * LONG_CONTEXT),), options=AnswerOptions(max_tokens=5))

    async def use(talker):
        with pytest.raises(RequestError) as refused:
            await talker.answer(long, lambda _: None)
        answered = await talker.answer(QUESTIONS[0], lambda _: None)
        return refused.value, answered

    error, answered = run(talker, use)
    assert error.code == "context_length_exceeded"
    assert str(LONG_CONTEXT) in error.message
    assert "the prompt alone has" in error.message
    assert answered.text
    if isinstance(error, ContextLengthError):
        assert str(error.num_prompt_tokens) in error.message


def test_limit_that_does_not_fit_becomes_what_is_left(talker):
    """--max-new-tokens is the most that is wanted, not what must be there."""
    question = Question((Turn("user", "好" * (LONG_CONTEXT - 30)),), options=AnswerOptions(max_tokens=512))
    answered = run(talker, lambda talker: talker.answer(question, lambda _: None))
    assert answered.num_prompt_tokens + answered.num_generated_tokens <= LONG_CONTEXT


def test_wrong_option_is_one_line(talker):
    question = Question((Turn("user", "x"),), options=AnswerOptions(temperature=9))
    with pytest.raises(RequestError, match="temperature"):
        run(talker, lambda talker: talker.answer(question, lambda _: None))


def served_by(answer):
    """A URL where one connection after the other is given the bytes `answer` and closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def http(status, body, *, kind="application/json"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


HALF = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "hal"}, "finish_reason": null}]}\n\n'
NO_KEY = json.dumps({"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}}).encode()


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (HALF % (len(CHUNK), CHUNK), UnavailableError, "was lost"),
        (http("200 OK", CHUNK, kind="text/event-stream"), UnavailableError, "in the middle of the answer"),
        (http("503 Service Unavailable", b"<html>"), UnavailableError, "503"),
        (http("404 Not Found", b"nothing"), RequestError, "is --url right"),
        (http("404 Not Found", b'{"error": "Not found."}'), RequestError, "is --url right"),
        (http("401 Unauthorized", NO_KEY), AuthenticationError, "OPENAI_API_KEY"),
        (b"", UnavailableError, "was lost"),
    ],
)
def test_what_a_server_does_wrong_is_one_line(answer, kind, message):
    """A lost connection, a proxy's page, a wrong address, a missing key."""
    talker = RemoteTalker(served_by(answer), api_key=None, model_name="m")
    with pytest.raises(kind, match=message) as error:
        run(talker, lambda talker: talker.answer(QUESTIONS[0], lambda _: None))
    assert "\n" not in error.value.message


def test_server_that_is_not_there_is_one_line_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UnavailableError, match=r"Connection refused.*fastchat serve"):
        asyncio.run(list_models(f"http://127.0.0.1:{port}/v1", api_key=None))


def test_list_that_is_none_is_told():
    with pytest.raises(UnavailableError, match="not a list of models"):
        asyncio.run(list_models(served_by(http("200 OK", b"<html>")), api_key=None))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://example.org/v1/", "https://example.org/v1"),
        ("https://example.org/api/v3", "https://example.org/api/v3"),
    ],
)
def test_url_may_leave_out_its_version(text, url):
    assert base_url_of(text) == url


def test_url_that_is_none_is_refused():
    with pytest.raises(ConfigError):
        base_url_of("127.0.0.1:8000")

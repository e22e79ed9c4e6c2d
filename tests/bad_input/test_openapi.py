"""The API's own OpenAPI document as a source of requests: whatever it allows, and what it does not, is answered."""

from __future__ import annotations

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.bad_input.cases import CHAT, COMPLETIONS, EMBEDDINGS, MODEL, TOKENIZE, Case, chat, completion, embedding
from tests.bad_input.sending import PATIENCE_S, send
from tests.bad_input.test_bad_input import CONTROL, INTERNALS

SECONDS_PER_ROUTE = 2.0
"""Fifteen runs of so many: half a minute."""
MAX_EXAMPLES = 30
BODY_ROUTES = (CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE, "/detokenize")
NEVER = {409, 422}
"""Clients repeat the first for ever and do not know the second."""
LIMITS = {CHAT: "max_completion_tokens", COMPLETIONS: "max_tokens"}
"""What bounds an answer whose body does not."""

SETTINGS = settings(
    max_examples=MAX_EXAMPLES,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations(target):
    """Every operation of the document, by method and path."""
    schema = schemathesis.openapi.from_url(f"{target.system.api_url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def check(answer):
    """Answered, and an error is OpenAI's."""
    assert answer.status_code < 500, (answer.status_code, answer.text[:300])
    assert answer.status_code not in NEVER
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert not INTERNALS.search(error["message"])


def cheap(path, body):
    """A generated body for the served model, with an answer that does not take long: never one up to the context."""
    if not isinstance(body, dict) or "model" not in body:
        return body
    limited = {name: 2 for name in ("max_tokens", "max_completion_tokens") if type(body.get(name)) is int}
    if not limited and path in LIMITS and body.get(LIMITS[path]) is None:
        limited = {LIMITS[path]: 2}
    return {**body, "model": MODEL, **limited, **({"n": 1} if type(body.get("n")) is int else {})}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", BODY_ROUTES)
def test_what_the_document_allows_and_forbids_is_answered(target, operations, path, mode):
    """Bodies drawn from the document, good and broken: never a 5xx, always OpenAI's shape, and the next one served."""
    began = time.monotonic()

    @SETTINGS
    @given(operations["POST", path].as_strategy(generation_mode=mode))
    def run(case):
        if time.monotonic() - began < SECONDS_PER_ROUTE:
            case.body = cheap(path, case.body)
            check(case.call(timeout=PATIENCE_S))

    run()
    assert send(CONTROL, target.port).status == 200


def test_the_document_names_every_route_and_each_is_answered(target, operations):
    """The routes without a body too."""
    assert {path for method, path in operations if method == "POST"} > set(BODY_ROUTES)
    for (method, path), operation in operations.items():
        if method == "GET":
            for name in (MODEL, "../x", "%00", "a/b"):
                case = operation.Case(path_parameters={"model": name} if "{model}" in path else {})
                check(case.call(timeout=PATIENCE_S))


GOOD = {
    CHAT: chat(stream=True, temperature=1, n=1, stop=["x"], logit_bias={"5": 1}, user="u", metadata={"a": "b"}),
    COMPLETIONS: completion(echo=True, logprobs=1, seed=1, top_p=0.5, presence_penalty=1),
    EMBEDDINGS: embedding(encoding_format="float", dimensions=64),
    TOKENIZE: {"model": MODEL, "prompt": "x", "add_special_tokens": True},
    "/detokenize": {"model": MODEL, "tokens": [5, 6]},
}
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab$_", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("path", BODY_ROUTES)
def test_a_good_body_with_one_field_of_any_value_is_answered(target, path):
    """Each field in turn gets what JSON can hold."""
    began = time.monotonic()

    @SETTINGS
    @given(st.sampled_from(sorted(GOOD[path])), JSON_VALUES)
    def run(name, value):
        if time.monotonic() - began < SECONDS_PER_ROUTE:
            body = {**GOOD[path], name: value}
            if type(body.get("max_tokens")) is int:
                body["max_tokens"] = min(body["max_tokens"], 4)
            elif path in LIMITS and body.get("max_tokens") is None:
                body[LIMITS[path]] = 4  # null is no limit
            answer = send(Case("one field", 200, body=body, path=path), target.port)
            assert answer.status in (200, 400, 404), (body, answer.body[:300])
            if answer.status != 200:
                assert list(answer.error) == ["message", "type", "param", "code"]
                assert not INTERNALS.search(answer.error["message"])

    run()
    assert send(CONTROL, target.port).status == 200

"""Every parameter that a client may send is obeyed, accepted because it changes nothing, or refused by name."""

import math

import orjson
import pytest

from fastchat.api.parameters import NEUTRAL_ONLY, Ignored, parse_body
from fastchat.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from fastchat.errors import InvalidRequestError

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "toy", "messages": MESSAGES}
COMPLETION = {"model": "toy", "prompt": "hi"}
EMBEDDING = {"model": "toy", "input": "hi"}

# All names that openai 3.54 sends, and what users put into extra_body.
CHAT_NAMES = [
    "messages",
    "model",
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "moderation",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "guided_json",
    "structured_outputs",
    "return_token_ids",
    "echo",
    "cache_salt",
    "chat_template",
    "include_stop_str_in_output",
]
COMPLETION_NAMES = [
    "model",
    "prompt",
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "guided_json",
    "structured_outputs",
    "return_token_ids",
    "cache_salt",
    "include_stop_str_in_output",
]


def is_decided(kind, name):
    return name in kind.model_fields or name in NEUTRAL_ONLY[kind]


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_every_chat_parameter_is_decided_on(name):
    """No name of the clients is left to chance; null is neutral for each."""
    assert is_decided(ChatCompletionRequest, name)
    if name not in CHAT:
        parse_body(ChatCompletionRequest, {**CHAT, name: None})


@pytest.mark.parametrize("name", COMPLETION_NAMES)
def test_every_completion_parameter_is_decided_on(name):
    """The same for completions."""
    assert is_decided(CompletionRequest, name)
    if name not in COMPLETION:
        parse_body(CompletionRequest, {**COMPLETION, name: None})


def test_no_parameter_is_decided_on_twice():
    """A name is obeyed or refused, never both."""
    for kind, table in NEUTRAL_ONLY.items():
        assert not set(kind.model_fields) & set(table)


@pytest.mark.parametrize("name", ["model", "input", "dimensions", "encoding_format", "user"])
def test_every_embedding_parameter_is_decided_on(name):
    """The same for embeddings."""
    assert is_decided(EmbeddingRequest, name)
    if name not in EMBEDDING:
        parse_body(EmbeddingRequest, {**EMBEDDING, name: None})


GOOD_BODIES = {
    ChatCompletionRequest: CHAT,
    CompletionRequest: COMPLETION,
    EmbeddingRequest: EMBEDDING,
    TokenizeRequest: CHAT,
    DetokenizeRequest: {"model": "toy", "tokens": [1]},
}
RULES = [(kind, name, rule) for kind, table in NEUTRAL_ONLY.items() for name, rule in table.items()]


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(kind, name, value) for kind, name, rule in RULES for value in rule.values], ids=str
)
def test_neutral_values_are_accepted(kind, name, value):
    """What changes nothing needs no support, on any route."""
    _, ignored = parse_body(kind, {**GOOD_BODIES[kind], name: value})
    assert ignored.names == ()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, _ in RULES], ids=str)
def test_what_is_not_obeyed_is_refused_by_name(kind, name):
    """A value that would change the answer is a 400 that names it, on any route."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(kind, {**GOOD_BODIES[kind], name: {"some": "value"}})
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"response_format": {"type": "grammar"}},
        {"store": True},
        {"reasoning_effort": "high"},
        {"service_tier": "flex"},
        {"modalities": ["text", "audio"]},
        {"continue_final_message": True},
        {"chat_template": "{{ x }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"documents": [{"text": "x"}]},
    ],
    ids=str,
)
def test_unsupported_features_are_refused(body):
    """The features that other servers have and this one has not."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatCompletionRequest, {**CHAT, **body})
    assert caught.value.param == next(iter(body))


BAD_VALUES = [
    *[("max_tokens", value) for value in (0, -1, 1e18, 10**18, "5", 1.5, True)],
    *[("max_completion_tokens", value) for value in (0, -1, "5", True)],
    *[("temperature", value) for value in (-1, 3, math.nan, math.inf, 1e308, "0.7", True)],
    *[("top_p", value) for value in (0, -1, 1.1, "1", math.nan)],
    *[("top_k", value) for value in (-2, 10**9, 1.5, "1", True)],
    *[("min_p", value) for value in (2, -0.1, math.nan)],
    *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (2.1, -2.1, math.nan, "0")],
    *[("repetition_penalty", value) for value in (0, -1, 11, math.nan)],
    *[("n", value) for value in (0, -1, 10_000, "2", True, 1.0)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "1", True)],
    *[("stop", value) for value in ("", [""], [None], ["x"] * 17, "x" * 257, 5, {"a": 1}, ["x"] * 100_000)],
    *[
        ("logit_bias", value)
        for value in ({"abc": 1}, {"-1": 1}, {"01": 1}, {"1": 1e9}, {"1": math.nan}, {"1": True}, [1])
    ],
    ("logit_bias", {str(number): 1 for number in range(100_000)}),
    *[("top_logprobs", value) for value in (-1, 21, 30, True, "1", 10**9)],
    *[("logprobs", value) for value in (1, "yes")],
    *[("stream", value) for value in ("yes", 1)],
    *[("stream_options", value) for value in ("x", [], {"include_usage": "yes"}, {"include_obfuscation": True})],
    *[("stop_token_ids", value) for value in ("x", [1.5], [True], [-1], ["1"])],
    *[("min_tokens", value) for value in (-1, "1", 1.5)],
    *[("cache_salt", value) for value in ("", "x" * 1_000_000, 5)],
    *[("user", value) for value in ("x" * 1_000_000, {"a": {}}, 5)],
    *[("metadata", value) for value in ({"a": "x" * 1_000_000}, {"a": {}}, "x", {str(i): "" for i in range(17)})],
    *[("messages", value) for value in ([], {}, "x", None, [5], [None], [[]])],
    ("messages", [MESSAGES[0]] * 2049),
    *[("model", value) for value in (None, "", 5, "x" * 10_240)],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_name_their_field(name, value):
    """Out of range, of another type, or too many: a 400 with `param`, and never the value itself in the message."""
    body = {"stream": True} if name == "stream_options" else {"logprobs": True} if name == "top_logprobs" else {}
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatCompletionRequest, {**CHAT, **body, name: value})
    assert caught.value.param.startswith(name)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": None, "content": "x"}, "messages[0].role"),
        ({"role": "root", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [["x"]]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "metadata": {}}, "messages[0].metadata"),
        ({"role": "system", "content": "x", "tools": ["f"]}, "messages[0].tools[0]"),
    ],
    ids=str,
)
def test_bad_messages_name_the_place(message, param):
    """The path says which message and which of its fields."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatCompletionRequest, {"model": "toy", "messages": [message]})
    assert caught.value.param == param


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], [-1.5], [1.5], ["x", 1], [[1], "x"], [True], None, 5, {}, ["x"] * 10_000, [["x"]]],
    ids=lambda value: str(value)[:40],
)
def test_bad_prompts_are_refused(prompt):
    """A prompt is text or ids, some but not too many of them, and never empty."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(CompletionRequest, {"model": "toy", "prompt": prompt})
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError):
        parse_body(EmbeddingRequest, {"model": "toy", "input": prompt})


@pytest.mark.parametrize(
    "body",
    [
        {"best_of": 2},
        {"n": 2, "best_of": 1},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
        {"max_tokens": 0},
        {"suffix": "x"},
        {"prompt": ["x"] * 64, "n": 128},
        {"stream_options": {"include_usage": True}},
    ],
    ids=str,
)
def test_bad_completions_are_refused(body):
    """What is particular to completions."""
    with pytest.raises(InvalidRequestError):
        parse_body(CompletionRequest, {**COMPLETION, **body})


@pytest.mark.parametrize(
    "body",
    [{"dimensions": 0}, {"dimensions": -1}, {"dimensions": 10**9}, {"encoding_format": "hex"}, {"input": ["x"] * 3000}],
    ids=str,
)
def test_bad_embeddings_are_refused(body):
    """What is particular to embeddings."""
    with pytest.raises(InvalidRequestError):
        parse_body(EmbeddingRequest, {**EMBEDDING, **body})


def test_a_long_key_is_not_sent_back():
    """What a client sends it knows; an answer as large as a request is no answer."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatCompletionRequest, {**CHAT, "metadata": {"x" * 100_000: "y"}})
    assert len(caught.value.message) + len(caught.value.param) < 300


def test_unknown_names_are_listed_not_refused():
    """The header names what was ignored, also inside of messages, and stays a short line of plain characters."""
    message = {**MESSAGES[0], "mood": "good", "refusal": None}
    _, ignored = parse_body(ChatCompletionRequest, {**CHAT, "messages": [message], "__proto__": 1, "x\r\ny": 2})
    assert ignored.header_value() == "__proto__, x??y, messages.mood"
    assert Ignored(tuple(f"name{number}" for number in range(1000))).header_value().endswith(", +968 more")
    assert Ignored().header_value() is None


def test_labels_change_nothing():
    """What only names the user is accepted as it is."""
    body = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"}
    _, ignored = parse_body(ChatCompletionRequest, {**CHAT, **body, "service_tier": "auto"})
    assert ignored.names == ()


def test_parts_of_text_are_joined_by_lines():
    """A content of parts is their texts, one below the other."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body, _ = parse_body(ChatCompletionRequest, {"model": "toy", "messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].content == "a\nb"


def test_whole_numbers_are_numbers():
    """1 is a temperature; a JSON number beyond 64 bits is no integer."""
    body, _ = parse_body(
        ChatCompletionRequest, orjson.loads(orjson.dumps({**CHAT, "temperature": 1, "seed": -(2**63)}))
    )
    assert (body.temperature, body.seed) == (1.0, -(2**63))


def test_tokenize_takes_a_prompt_or_a_conversation():
    """Both shapes of vLLM's."""
    assert parse_body(TokenizeRequest, COMPLETION)[0].prompt == "hi"
    assert parse_body(TokenizeRequest, CHAT)[0].messages[0].content == "hi"

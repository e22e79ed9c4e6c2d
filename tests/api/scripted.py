"""An engine that says what a test wrote down, and a tokenizer whose ids are bytes: text laws without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import orjson

from fastchat.api.chat import prepare_chat
from fastchat.api.completions import prepare_completion
from fastchat.api.request_context import RequestContext
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.engine.client import EngineClient, EngineLimits
from fastchat.engine.events import EngineStats, FinishReason, SequenceEvent, SequenceRequest, TokenLogprobs
from fastchat.models.interface import ChatMessage, SamplingDefaults, any_length

EOS = 256
USER = 257
PIECES = {258: b"\xe4\xbd", 259: b"\xa0x", 260: b"sto", 261: b"p!", 262: b"  ", 263: "你好".encode(), 264: b"abab"}
VOCAB_SIZE = 280
EMBEDDING_SIZE = 4
MAX_CONTEXT = 200
CREATED = 1_700_000_000


class ByteTokenizer:
    """Implements `interface.Tokenizer`: an id below 256 is that byte, some more are longer pieces."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = frozenset({EOS})
    max_id_characters = 4

    def encode(self, text):
        return [*text.encode()]

    def encode_piece(self, text):
        return [*text.encode()]

    def prefix_ids(self):
        return []

    def special_token_id(self, name):
        return {"</s>": EOS, "<|user|>": USER}.get(name)

    def decode(self, token_ids, *, skip_special_tokens=True):
        names = {} if skip_special_tokens else {EOS: b"</s>", USER: b"<|user|>"}
        return b"".join(names.get(i, self.token_bytes(i)) for i in token_ids).decode(errors="replace")

    def token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else PIECES.get(token_id, b"")


class LineFormat:
    """Implements `interface.ChatFormat`: `role:text` lines."""

    name = "lines"
    source = "a test"
    roles = ("user", "assistant")
    stop_token_ids = frozenset({USER})
    message_fields = frozenset({"metadata"})

    def __init__(self, *, stop_strings: tuple[str, ...] = (), strips_leading_space: bool = False) -> None:
        self.stop_strings = stop_strings
        self.strips_leading_space = strips_leading_space

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt=True, check_length=any_length):
        lines = "".join(f"{message.role}:{message.content}\n" for message in messages)
        check_length(len(lines))
        return [*(lines + ("assistant:" if add_generation_prompt else "")).encode()]


class ScriptedEngine(EngineClient):
    """Implements `EngineClient`: `script(request)` is the endless answer, given out in groups of `group_size` ids."""

    def __init__(
        self,
        script: Callable[[SequenceRequest], Sequence[int]],
        *,
        group_size: int = 1,
        max_context: int = MAX_CONTEXT,
    ) -> None:
        super().__init__()
        self.limits = EngineLimits(max_context, 100, 16, VOCAB_SIZE, EMBEDDING_SIZE, "cpu", "float32")
        self.requests: list[SequenceRequest] = []
        self.is_paused = False
        self._script = script
        self._group_size = group_size
        self._waiting: dict[str, list[int]] = {}
        self._unscored: dict[str, tuple[TokenLogprobs, ...]] = {}
        self._failure = None

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    @property
    def open_sequences(self) -> set[str]:
        return set(self._waiting)

    def fail(self, failure) -> None:
        self._waiting.clear()
        self._fail(failure)

    def give(self, event: SequenceEvent) -> None:
        if event.finish_reason is not None:
            self._waiting.pop(event.sequence_id, None)
        self._deliver([event], EngineStats())

    def _send(self, request: SequenceRequest) -> None:
        self.requests.append(request)
        answer = list(self._script(request))[: request.sampling.max_tokens]
        for position, token_id in enumerate(answer):
            if token_id in request.sampling.ending_token_ids and position >= request.sampling.min_tokens:
                answer = answer[: position + 1]
                break
        emitted = list(request.emitted_token_ids)
        assert answer[: len(emitted)] == emitted, "a resumed answer goes on where it was"
        self._waiting[request.sequence_id] = answer[len(emitted) :]
        if request.sampling.prompt_logprobs is not None and not emitted:
            scores = tuple(TokenLogprobs(i, -1.0) for i in request.prompt_token_ids)
            self._unscored[request.sequence_id] = scores
        self._schedule(request)

    def _schedule(self, request: SequenceRequest) -> None:
        if not self.is_paused:
            asyncio.get_running_loop().call_soon(self._step, request)

    def _step(self, request: SequenceRequest) -> None:
        rest = self._waiting.get(request.sequence_id)
        if rest is None:
            return
        group, rest = rest[: self._group_size], rest[self._group_size :]
        self._waiting[request.sequence_id] = rest
        wants_logprobs = request.sampling.top_logprobs is not None
        reason = None
        if not rest:
            ends = bool(group) and group[-1] in request.sampling.ending_token_ids
            reason = FinishReason.STOP if ends else FinishReason.LENGTH
        self.give(
            SequenceEvent(
                request.sequence_id,
                token_ids=tuple(group),
                logprobs=tuple(TokenLogprobs(i, -0.5, ((i, -0.5), (0, -2.0))) for i in group) if wants_logprobs else (),
                finish_reason=reason,
                num_cached_tokens=3,
                prompt_logprobs=self._unscored.pop(request.sequence_id, ()),
            )
        )
        if rest:
            self._schedule(request)

    def _send_abort(self, sequence_id: str) -> None:
        if self._waiting.pop(sequence_id, None) is not None:
            self.give(SequenceEvent(sequence_id, finish_reason=FinishReason.ABORT))


def served(
    engine: EngineClient,
    *,
    tokenizer: ByteTokenizer | None = None,
    chat_format: LineFormat | None = None,
    **options: object,
) -> ServedModels:
    model = ServedModel(
        names=("toy",),
        tokenizer=tokenizer or ByteTokenizer(),
        chat_format=chat_format or LineFormat(),
        engine=engine,
        max_context=engine.limits.max_context,
        sampling_defaults=SamplingDefaults(),
        created=CREATED,
        **options,
    )
    return ServedModels([model])


async def answer(models, document, *, records=None, **context):
    """The route's answer object for a body: chat when it has messages."""
    prepare = prepare_chat if "messages" in document else prepare_completion
    made = RequestContext(request_id="r1", created=CREATED, **context)
    return await prepare(models, {"model": "toy", **document}, made, (records if records is not None else []).append)


async def whole(models, document, **context):
    made = await answer(models, document, **context)
    async with made.running():
        return orjson.loads(await made.whole())


async def events(models, document, **context):
    """The raw bytes of a stream, cut into events."""
    made = await answer(models, {**document, "stream": True}, **context)
    async with made.running():
        raw = b"".join([item async for item in made.events()])
    assert raw.endswith(b"\n\n")
    return raw.split(b"\n\n")[:-1]


def chunks(raw_events):
    """The JSON of all data events but `[DONE]`, which must be last."""
    lines = [event.split(b"\n")[-1] for event in raw_events]
    assert lines[-1] == b"data: [DONE]"
    assert all(line.startswith(b"data: {") for line in lines[:-1])
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


def text_of(choice):
    """The text in a choice of any shape."""
    if "text" in choice:
        return choice["text"]
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


def joined(raw_events):
    """The text of each choice."""
    texts = {}
    for chunk in chunks(raw_events):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + text_of(choice)
    return texts

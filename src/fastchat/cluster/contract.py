"""The contract between API server, controller and worker: header names, paths and control messages.

Every internal request carries `Authorization: Bearer <cluster token>`. The headers below are believed only with it.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 1

# Headers of a relayed request, API server -> worker.
REQUEST_ID_HEADER = "x-fastchat-request-id"
"""The request's id; the answer's `id` is `chatcmpl-` or `cmpl-` and this."""
CREATED_HEADER = "x-fastchat-created"
"""The answer's `created`, in seconds since 1970."""
SEED_HEADER = "x-fastchat-seed"
"""The seed where the client gave none: a decimal integer in [0, 2**63)."""
TENANT_HEADER = "x-fastchat-tenant"
"""An opaque id of the tenant: salt of the prefix cache, and who the usage belongs to."""
PRIORITY_HEADER = "x-fastchat-priority"
"""An integer; lower runs first; 0 when absent."""
DEADLINE_HEADER = "x-fastchat-deadline"
"""Seconds from now (a decimal number) after which nobody waits for the answer."""
TAGS_HEADER = "x-fastchat-tags"
"""`1` asks for a tag comment before every event of a stream, see `api/streaming.py`."""
RESUME_HEADER = "x-fastchat-resume"
"""`1` says that the body's `resume` field is the API server's and is to be obeyed."""
COUNTED_HEADER = "x-fastchat-counted"
"""Of a resumed request: the final record of a worker that shut down has its prompt and so many of its answer ids."""

# Header of an answer to a client.
IGNORED_HEADER = "x-fastchat-ignored"
"""The request's field names that are unknown here and were ignored, comma separated."""
CLIENT_REQUEST_ID_HEADER = "x-request-id"

# Paths of the controller.
CONNECT_PATH = "/cluster/connect"
"""WebSocket: the one control connection of a worker."""
WATCH_PATH = "/cluster/watch"
"""GET: a stream of JSON lines, one whole table each, at once and after every change, at least every 5 s."""

MODEL_CONTROL_PATH = "/api/v1/models"
"""Of a worker and of the API server: GET tells the models' states, POST of `{model}/{action}` below it changes one."""
ModelAction = Literal["load", "unload", "sleep", "wake", "pin", "unpin"]
MODEL_ACTIONS: tuple[ModelAction, ...] = get_args(ModelAction)
ADAPTERS = "adapters"
"""`{base}/adapters` below it: POST adds an adapter, DELETE of `/{name}` below that removes one."""
ModelState = Literal["asleep", "loading", "awake", "leaving"]

Count = Annotated[int, Field(ge=0, lt=2**48)]
"""So that a sum of many fits the 64 bits of the usage file."""


class Message(BaseModel):
    """Base of what crosses a process border: strict and closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntry(Message):
    """One model as a worker serves it. `max_context` is in tokens; `created` in seconds since 1970.

    `alias_of` is the model's first name where `name` is another one of the same model, else empty.
    """

    name: str
    max_context: int
    created: int
    capabilities: tuple[Literal["chat", "completions", "embeddings"], ...] = ("chat", "completions", "embeddings")
    alias_of: str = ""


class Load(Message):
    """A worker's progress. `progress` only grows; `num_queued_tokens` is what waits or runs, in tokens to compute.

    `states` are those of its models, by every name; one that is not in it is awake.
    """

    progress: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    states: dict[str, ModelState] = {}


class Hello(Message):
    """First message of a worker on its control connection. `address` is the URL that the API server calls."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL_VERSION
    worker_id: str
    address: str
    models: tuple[ModelEntry, ...]


class Models(Message):
    """What a worker serves has changed: all its models from now on."""

    type: Literal["models"] = "models"
    models: tuple[ModelEntry, ...]


class Progress(Message):
    """Every second from a worker."""

    type: Literal["progress"] = "progress"
    load: Load


class FinalRecord(Message):
    """What one request cost; sent once, and again after a reconnect until it is acknowledged.

    `number` counts a worker's records from 1; the controller ignores a number it has seen from that worker id.
    """

    type: Literal["record"] = "record"
    number: Annotated[int, Field(ge=1, lt=2**63)]
    request_id: str
    tenant: str
    model: str
    num_prompt_tokens: Count
    num_cached_tokens: Count
    num_generated_tokens: Count
    reason: Literal["stop", "length", "abort", "error"]


class Goodbye(Message):
    """A worker that shuts down: no new requests for it; running ones go on."""

    type: Literal["goodbye"] = "goodbye"


class Welcome(Message):
    """The controller's answer to `Hello`."""

    type: Literal["welcome"] = "welcome"


class Acknowledge(Message):
    """Records up to and including `number` are kept by the controller."""

    type: Literal["acknowledge"] = "acknowledge"
    number: int


class Refused(Message):
    """The controller will not have this worker; the connection is closed after it."""

    type: Literal["refused"] = "refused"
    reason: str


class WorkerEntry(Message):
    """One worker in the table that the API server watches."""

    worker_id: str
    address: str
    models: tuple[ModelEntry, ...]
    load: Load
    state: Literal["ready", "draining", "hung"]
    is_external: bool = False
    """An OpenAI-compatible server that an operator registered by URL; it is not sent the cluster token."""


class TableSnapshot(Message):
    """The whole table. `version` grows with every change while one controller lives; `epoch` names that controller."""

    epoch: str
    version: int
    workers: tuple[WorkerEntry, ...]


WorkerMessage = Annotated[Hello | Models | Progress | FinalRecord | Goodbye, Field(discriminator="type")]
ControllerMessage = Annotated[Welcome | Acknowledge | Refused, Field(discriminator="type")]

"""What the rest of the system knows of a model's text side: a tokenizer and a chat format. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back, for one checkpoint."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size): the rows of the model's output, padding rows included."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer, from the checkpoint's own files."""

    @property
    def max_id_characters(self) -> int | None:
        """No id stands for more characters of a text than this; None where that cannot be told."""

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the ids the checkpoint puts in front (BOS, or `[gMASK] sop`). Markers stay text."""

    def encode_piece(self, text: str) -> list[int]:
        """A piece of a prompt, nothing in front; markers of special tokens inside stay text."""

    def prefix_ids(self) -> list[int]:
        """The ids `encode` puts in front."""

    def special_token_id(self, name: str) -> int | None:
        """The id of a special token such as `<|user|>`, or None."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. Incomplete characters become U+FFFD; padding rows become ""."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for within a text (for log probabilities)."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, content flattened to text.

    `metadata` is ChatGLM3's first line of an assistant message (a tool's name); `tools` belong to its system message.
    `fields` holds what else the client sent (tool_calls, tool_call_id, name, ...), for templates that read it.
    """

    role: str
    content: str
    metadata: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()  # Any: JSON as the client sent it
    fields: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON as the client sent it


LengthCheck = Callable[[int], None]


def any_length(_num_characters: int) -> None:
    """The `LengthCheck` that lets everything pass."""


class ChatFormat(Protocol):
    """How a conversation becomes a prompt."""

    @property
    def name(self) -> str:
        """Such as `chatglm2`, or `jinja` for the checkpoint's own template."""

    @property
    def source(self) -> str:
        """Where it came from, as a phrase for the log: `tokenizer_config.json`, `the folder's name`."""

    @property
    def roles(self) -> tuple[str, str]:
        """The labels a terminal shows for the user and the assistant (`问`, `答`)."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Text that ends an answer."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer, beside the checkpoint's own."""

    @property
    def message_fields(self) -> frozenset[str]:
        """What a prompt shows of a message beside role and content: some of name, metadata, tool_call_id."""

    @property
    def strips_leading_space(self) -> bool:
        """Whether white space at the start of an answer is dropped (ChatGLM)."""

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        check_length: LengthCheck = any_length,
    ) -> list[int]:
        """Prompt ids. Raises `InvalidRequestError` for a conversation that the format cannot express.

        `check_length` is told the prompt's characters before they are tokenized, and may raise.
        """


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The checkpoint's recommended sampling (`generation_config.json`), else FastChat's. `top_k` 0 means off."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Detokenizing(Protocol):
    """Token ids to text as they come; never half a character."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids make certain, possibly ""."""

    def finish(self) -> str:
        """The rest: an incomplete last character as U+FFFD."""

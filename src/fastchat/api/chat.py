"""POST /v1/chat/completions: a conversation in, assistant messages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastchat.api.answer import Answer, Json, answer_head, plan_choices
from fastchat.api.choice import Choice, Delta, TextRules
from fastchat.api.generation import Generation, RecordHook
from fastchat.api.logprobs import chat_logprobs
from fastchat.api.protocol import ChatCompletionRequest
from fastchat.api.request_context import RequestContext
from fastchat.api.resume import Resume
from fastchat.api.sampling import AnswerLength, base_sampling
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.api.stop_strings import StopStrings
from fastchat.api.text_work import chat_messages, length_check, parsed, render, unread_fields
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.interface import ChatMessage, Tokenizer


async def prepare_chat(
    models: ServedModels,
    document: dict[str, Any],  # Any: JSON has any value
    context: RequestContext,
    on_record: RecordHook,
) -> Answer:
    """A checked and tokenized request; nothing runs yet. Raises `RequestError`."""
    resume = Resume.taken_from(document, context)
    body, ignored = await parsed(ChatCompletionRequest, document)
    model = models.find(body.model)
    resume.check(body.num_choices)
    base = _sampling(body, model, context)
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    messages = chat_messages(body.messages)
    plans = plan_choices(
        [await _prompt(body, model, messages, resume)],
        base,
        AnswerLength(limit),
        choices_per_prompt=body.num_choices,
        max_context=model.max_context,
        resume=resume,
    )
    generation = Generation(
        model,
        body.model,
        context,
        plans,
        _text_rules(body, model),
        choices_per_prompt=body.num_choices,
        cache_salt=cache_salt(context, body.cache_salt),
        on_record=on_record,
    )
    shape = ChatShape(model.tokenizer, has_logprobs=bool(body.logprobs), returns_token_ids=bool(body.return_token_ids))
    ignored = ignored.also(unread_fields(model, messages))
    return Answer(answer_head("chatcmpl", body, model, context), shape, generation, ignored)


def cache_salt(context: RequestContext, salt: str | None) -> str:
    """What separates prefix caches: the tenant, and within it what the client sent."""
    return context.tenant if salt is None else f"{context.tenant}\n{salt}"


class ChatShape:
    """Chat completions' JSON. A delta's text is `content`; only a choice's first chunk has the role."""

    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    opens_at_once = True

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool, returns_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._returns_token_ids = returns_token_ids

    def opening(self, choice: Choice) -> Json:
        chunk: Json = {
            "index": choice.plan.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._returns_token_ids:
            chunk["prompt_token_ids"] = list(choice.plan.prompt_token_ids)
        return chunk

    def chunk(self, choice: Choice, delta: Delta) -> Json:
        chunk: Json = {
            "index": choice.plan.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta) if delta.logprobs else None,
            "finish_reason": delta.ending.value if delta.ending else None,
        }
        if delta.stop_reason is not None:
            chunk["stop_reason"] = delta.stop_reason
        if self._returns_token_ids:
            chunk["token_ids"] = list(delta.token_ids)
        return chunk

    def whole(self, choice: Choice, delta: Delta) -> Json:
        assert delta.ending is not None
        whole: Json = {
            "index": choice.plan.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None, "annotations": []},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.ending.value,
            "stop_reason": delta.stop_reason,
        }
        if self._returns_token_ids:
            whole |= {
                "prompt_token_ids": list(choice.plan.prompt_token_ids),
                "token_ids": list(delta.token_ids),
            }
        return whole

    def extras(self, choices: Sequence[Choice]) -> Json:
        """vLLM has the prompt's ids of a conversation beside `choices`."""
        return {"prompt_token_ids": list(choices[0].plan.prompt_token_ids)} if self._returns_token_ids else {}

    def _logprobs(self, delta: Delta) -> Json | None:
        return chat_logprobs(self._tokenizer, delta.logprobs) if self._has_logprobs else None


def _sampling(body: ChatCompletionRequest, model: ServedModel, context: RequestContext) -> SamplingParams:
    base = base_sampling(body, model, context)
    return replace(
        base,
        eos_token_ids=base.eos_token_ids | model.chat_format.stop_token_ids,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _text_rules(body: ChatCompletionRequest, model: ServedModel) -> TextRules:
    """The template's stop strings count beside the client's; ignore_eos ignores them as it does the template's ids."""
    own = () if body.ignore_eos else model.chat_format.stop_strings
    return TextRules(
        StopStrings((*body.stop, *own)),
        keeps_stop=bool(body.include_stop_str_in_output),
        skips_special_tokens=body.skip_special_tokens is not False,
        strips_leading_space=model.chat_format.strips_leading_space,
    )


async def _prompt(
    body: ChatCompletionRequest, model: ServedModel, messages: Sequence[ChatMessage], resume: Resume
) -> tuple[int, ...]:
    resumed = [resume.choice(index) for index in range(body.num_choices)]
    if resumed[0] is not None and None not in resumed:
        return resumed[0].prompt_token_ids
    return await render(
        model,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        check_length=length_check(model, param="messages"),
    )

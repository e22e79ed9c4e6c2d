"""POST /v1/completions: one or many prompts, text or ids, each continued `n` times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastchat.api.answer import Answer, Json, answer_head, plan_choices
from fastchat.api.chat import cache_salt
from fastchat.api.choice import Choice, Delta, TextRules
from fastchat.api.generation import Generation, RecordHook
from fastchat.api.logprobs import completion_logprobs
from fastchat.api.protocol import CompletionRequest
from fastchat.api.request_context import RequestContext
from fastchat.api.resume import Resume
from fastchat.api.sampling import AnswerLength, base_sampling
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.api.stop_strings import StopStrings
from fastchat.api.text_work import check_lengths, parsed, prompts_ids, prompts_texts
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.detokenizer import Detokenizer
from fastchat.models.interface import Tokenizer

DEFAULT_MAX_TOKENS = 16


async def prepare_completion(
    models: ServedModels,
    document: dict[str, Any],  # Any: JSON has any value
    context: RequestContext,
    on_record: RecordHook,
) -> Answer:
    """A checked and tokenized request; nothing runs yet. Raises `RequestError`."""
    resume = Resume.taken_from(document, context)
    body, ignored = await parsed(CompletionRequest, document)
    model = models.find(body.model)
    resume.check(len(body.prompt) * body.num_choices)
    base = _sampling(body, model, context)
    check_lengths(model, body.prompt, param="prompt")
    prompts = await prompts_ids(model, body.prompt, param="prompt")
    plans = plan_choices(
        prompts,
        base,
        AnswerLength(body.max_tokens, default=DEFAULT_MAX_TOKENS, param="prompt"),
        choices_per_prompt=body.num_choices,
        max_context=model.max_context,
        resume=resume,
    )
    generation = Generation(
        model,
        body.model,
        context,
        plans,
        _text_rules(body),
        choices_per_prompt=body.num_choices,
        cache_salt=cache_salt(context, body.cache_salt),
        on_record=on_record,
    )
    echoes = await prompts_texts(model, body.prompt) if body.echo else None
    shape = CompletionShape(
        model.tokenizer,
        has_logprobs=body.logprobs is not None,
        echoes=echoes,
        choices_per_prompt=body.num_choices,
        returns_token_ids=bool(body.return_token_ids),
    )
    return Answer(answer_head("cmpl", body, model, context), shape, generation, ignored)


class CompletionShape:
    """Completions' JSON. With `echo` the prompt's text, and its log probabilities, come before the answer's."""

    whole_kind = "text_completion"
    chunk_kind = "text_completion"
    opens_at_once = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        has_logprobs: bool,
        echoes: Sequence[str] | None,
        choices_per_prompt: int,
        returns_token_ids: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._echoes = echoes
        self._choices_per_prompt = choices_per_prompt
        self._returns_token_ids = returns_token_ids

    def opening(self, choice: Choice) -> Json | None:
        if self._echoes is None and not self._returns_token_ids:
            return None
        logprobs = self._echoed_logprobs(choice) if self._has_logprobs and choice.prompt_logprobs else None
        chunk = self._choice(choice, self._echo(choice), logprobs)
        return chunk | self._ids(prompt_token_ids=choice.plan.prompt_token_ids)

    def chunk(self, choice: Choice, delta: Delta) -> Json:
        logprobs = self._logprobs(choice, delta) if self._has_logprobs and delta.logprobs else None
        return self._choice(choice, delta.text, logprobs, delta) | self._ids(token_ids=delta.token_ids)

    def whole(self, choice: Choice, delta: Delta) -> Json:
        logprobs = None
        if self._has_logprobs:
            echoed, answered = self._echoed_logprobs(choice), self._logprobs(choice, delta)
            logprobs = {name: echoed[name] + answered[name] for name in answered}
        ids = self._ids(prompt_token_ids=choice.plan.prompt_token_ids, token_ids=delta.token_ids)
        return self._choice(choice, self._echo(choice) + delta.text, logprobs, delta) | ids

    def extras(self, choices: Sequence[Choice]) -> Json:  # noqa: ARG002 - the shape's interface
        """None: prompts differ between choices."""
        return {}

    def _choice(self, choice: Choice, text: str, logprobs: Json | None, delta: Delta | None = None) -> Json:
        ending = delta.ending.value if delta and delta.ending else None
        body: Json = {"index": choice.plan.index, "text": text, "logprobs": logprobs, "finish_reason": ending}
        if ending is not None and delta is not None:
            body["stop_reason"] = delta.stop_reason
        return body

    def _ids(self, **token_ids: Sequence[int]) -> Json:
        return {name: list(ids) for name, ids in token_ids.items()} if self._returns_token_ids else {}

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.plan.index // self._choices_per_prompt] if self._echoes is not None else ""

    def _logprobs(self, choice: Choice, delta: Delta) -> Json:
        start = len(self._echo(choice))
        return completion_logprobs(self._tokenizer, delta.logprobs, [start + offset for offset in delta.text_offsets])

    def _echoed_logprobs(self, choice: Choice) -> Json:
        """Offsets are those of the prompt's pieces, one after the other."""
        places = choice.prompt_logprobs if self._echoes is not None else ()
        detokenizer = Detokenizer(self._tokenizer)
        offsets = [0]
        for place in places:
            offsets.append(offsets[-1] + len(detokenizer.push((place.token_id,))))
        return completion_logprobs(self._tokenizer, places, offsets[: len(places)])


def _sampling(body: CompletionRequest, model: ServedModel, context: RequestContext) -> SamplingParams:
    return replace(
        base_sampling(body, model, context),
        top_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _text_rules(body: CompletionRequest) -> TextRules:
    return TextRules(
        StopStrings(body.stop),
        keeps_stop=bool(body.include_stop_str_in_output),
        skips_special_tokens=body.skip_special_tokens is not False,
    )

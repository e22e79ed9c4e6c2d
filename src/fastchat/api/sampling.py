"""A request's sampling options as `SamplingParams`: the client's values, else the checkpoint's, else FastChat's."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from fastchat.api.protocol import GenerationBody
from fastchat.api.request_context import RequestContext
from fastchat.api.served_model import ServedModel
from fastchat.api.text_work import check_token_ids
from fastchat.engine.sampling_params import SamplingParams
from fastchat.errors import ContextLengthError

MAX_ANSWER = 2**31


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """How long an answer may be: `asked` by the client (does not fit: refused), else `default` (None: what is left)."""

    asked: int | None
    default: int | None = None
    param: str = "messages"

    def max_tokens(self, num_prompt_tokens: int, max_context: int) -> int:
        """The limit in tokens. Raises `ContextLengthError` with both counts."""
        left = max_context - num_prompt_tokens
        if self.asked is not None and self.asked <= left:
            return self.asked
        if self.asked is not None or left < 1:
            raise ContextLengthError(
                num_prompt_tokens=num_prompt_tokens, max_tokens=self.asked, max_context=max_context, param=self.param
            )
        return left if self.default is None else min(self.default, left)


def base_sampling(body: GenerationBody, model: ServedModel, context: RequestContext) -> SamplingParams:
    """The options that all choices of a request share. Raises `InvalidRequestError` for ids outside the vocabulary."""
    defaults = model.sampling_defaults
    check_token_ids(model, body.stop_token_ids, param="stop_token_ids")
    check_token_ids(model, [token_id for token_id, _ in body.logit_bias], param="logit_bias")
    return SamplingParams(
        max_tokens=MAX_ANSWER,
        min_tokens=body.min_tokens or 0,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=body.top_p or defaults.top_p,
        top_k=max(0, defaults.top_k if body.top_k is None else body.top_k),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        repetition_penalty=body.repetition_penalty or defaults.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        seed=_seed(body, model, context),
        eos_token_ids=model.tokenizer.eos_token_ids,
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
    )


def choice_sampling(base: SamplingParams, *, max_tokens: int, choice: int) -> SamplingParams:
    """The options of one choice; `choice` counts within its prompt. Raises when min_tokens is above max_tokens."""
    return replace(base, max_tokens=max_tokens, choice=choice)


def _seed(body: GenerationBody, model: ServedModel, context: RequestContext) -> int:
    """The client's seed, else the worker's `--seed`, else the API server's, else a new one."""
    for seed in (body.seed, model.default_seed, context.seed):
        if seed is not None:
            return seed
    return secrets.randbits(63)

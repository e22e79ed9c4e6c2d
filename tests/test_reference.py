"""Token-exact in float32: all thirty reference cases, through the engine alone and over HTTP."""

import asyncio

import openai
import pytest

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.weights import load_model
from tests.reference import FOLDER, NAMES, Case, cases, needs_reference
from tests.system import running_system

pytestmark = needs_reference
NUM_NEW = 32


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(checkpoint):
    model = load_model(Checkpoint.open(FOLDER / checkpoint), device="cpu", dtype="float32")
    make_lean(model)
    return model


@pytest.mark.parametrize("max_batch_tokens", [7, 512])
@pytest.mark.parametrize("at_once", [False, True])
def test_engine_gives_the_original_ids(checkpoint, model, at_once, max_batch_tokens):
    """One by one and all in flight, with prompts whole and in small chunks."""
    expected = cases(checkpoint)
    engine = Engine(model, EngineConfig(2048, kv_cache_bytes=2**28, max_batch_tokens=max_batch_tokens))
    ids: dict[str, list[int]] = {case.name: [] for case in expected}

    def run() -> None:
        while engine.has_work:
            for event in engine.step():
                ids[event.sequence_id] += event.token_ids

    for case in expected:
        engine.add(SequenceRequest(case.name, case.input_ids, SamplingParams(max_tokens=NUM_NEW, temperature=0.0)))
        if not at_once:
            run()
    run()
    assert ids == {case.name: list(case.greedy_ids) for case in expected}
    assert engine.is_empty


@pytest.fixture(scope="module")
def system(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    (folder / checkpoint).symlink_to(FOLDER / checkpoint)
    flags = ("--model-path", folder / checkpoint, "--dtype", "float32")
    with running_system(folder, worker_flags=flags, model_names=[checkpoint]) as running:
        yield running


GREEDY = {"max_tokens": NUM_NEW, "temperature": 0.0}
EXTRAS = {"ignore_eos": True, "return_token_ids": True}


async def ask(client: openai.AsyncOpenAI, model_name: str, case: Case) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids as the API tells them."""
    if case.messages is None:
        answer = await client.completions.create(model=model_name, prompt=case.text, extra_body=EXTRAS, **GREEDY)
    else:
        answer = await client.chat.completions.create(
            model=model_name, messages=case.messages, extra_body=EXTRAS, **GREEDY
        )
    choice = answer.choices[0].model_extra
    return choice["prompt_token_ids"], choice["token_ids"]


async def stream(client: openai.AsyncOpenAI, model_name: str, case: Case) -> tuple[list[int], list[int]]:
    """The same from a stream."""
    prompt_ids: list[int] = []
    answer_ids: list[int] = []
    if case.messages is None:
        chunks = await client.completions.create(
            model=model_name, prompt=list(case.input_ids), stream=True, extra_body=EXTRAS, **GREEDY
        )
    else:
        chunks = await client.chat.completions.create(
            model=model_name, messages=case.messages, stream=True, extra_body=EXTRAS, **GREEDY
        )
    async for chunk in chunks:
        extra = chunk.choices[0].model_extra
        prompt_ids += extra.get("prompt_token_ids", [])
        answer_ids += extra.get("token_ids", [])
    return prompt_ids, answer_ids


@pytest.mark.parametrize("at_once", [False, True])
def test_http_gives_the_original_ids(checkpoint, system, at_once):
    """Prompt ids from text and conversations, answer ids from the engine; whole and streamed together."""
    expected = cases(checkpoint)

    async def main() -> list[tuple[list[int], list[int]]]:
        async with openai.AsyncOpenAI(base_url=system.api_url + "/v1", api_key="EMPTY") as client:
            calls = [function(client, checkpoint, case) for function in (ask, stream) for case in expected]
            return await asyncio.gather(*calls) if at_once else [await call for call in calls]

    answers = asyncio.run(main())
    assert answers == [(list(case.input_ids), list(case.greedy_ids)) for case in expected] * 2

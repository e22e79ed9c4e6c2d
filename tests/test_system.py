"""Laws of the whole system: real controller, worker and API server, real clients, real faults."""

import asyncio
import json
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack

import openai
import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import ROOT, start_command
from tests.system import MODEL_NAME, System, running_system, wait_for_models

MESSAGES = [{"role": "user", "content": "你是谁？"}]
CONTEXT = 32768
ENDLESS = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": CONTEXT - 100, "extra_body": {"ignore_eos": True}}
"""An answer of tens of thousands of steps: whatever stalls, it has not ended when a test acts on it."""

AT_ONCE_S = 15.0
"""For what takes no time at all, on a machine that may stall."""


def client_of(system: System) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=system.api_url + "/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    write_checkpoint(folder / MODEL_NAME, "chatglm2", config={"seq_length": CONTEXT})
    flags = ("--model-path", folder / MODEL_NAME, "--kv-cache-memory", "64MiB")
    exact = ("--dtype", "float32")  # in which text does not depend on the batch
    with running_system(folder, worker_flags=(*flags, *exact)) as running:
        yield running


@pytest.fixture(scope="module")
def later_processes():
    """What a test starts in the place of a killed part of `system`, for the tests after it."""
    with ExitStack() as processes:
        yield processes


def test_models_has_exactly_the_fields_of_the_guide(system):
    """What old clients and scripts read from the list is there, and nothing else."""
    (card,) = system.get("/v1/models")["data"]
    assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "permission"]
    assert (card["id"], card["owned_by"], card["root"], card["parent"]) == (MODEL_NAME, "fastchat", MODEL_NAME, None)
    (permission,) = card["permission"]
    assert list(permission) == [
        "id",
        "object",
        "created",
        "allow_create_engine",
        "allow_sampling",
        "allow_logprobs",
        "allow_search_indices",
        "allow_view",
        "allow_fine_tuning",
        "organization",
        "group",
        "is_blocking",
    ]
    assert len(permission["id"]) == len("modelperm-37FkwejmTx3qArXrHS5uSv")


def test_the_curl_examples_work(system):
    """Every command of examples/curl.sh, the 404 of an unknown model included."""
    result = subprocess.run(
        ["bash", "examples/curl.sh", MODEL_NAME],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OPENAI_BASE_URL": system.api_url + "/v1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "vicuna-7b-v1.3" in result.stderr
    assert MODEL_NAME in result.stderr


def test_thirty_two_streams_give_what_each_gives_alone(system):
    """Greedy and seeded streams side by side equal the whole answers one by one, byte for byte."""
    requests = [
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": f"问题 {index}: Hello!"}],
            "max_tokens": 24,
            "temperature": index % 2,
            "seed": index,
        }
        for index in range(32)
    ]

    async def read_stream(client, request) -> str:
        stream = await client.chat.completions.create(stream=True, **request)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> None:
        async with client_of(system) as client:
            together = await asyncio.gather(*(read_stream(client, request) for request in requests))
            alone = [
                (await client.chat.completions.create(**request)).choices[0].message.content for request in requests
            ]
            assert together == alone

    asyncio.run(main())


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_sequence(system, streams):
    """The worker's running count falls to nothing, and the request is counted as one that was given up."""

    async def main() -> None:
        num_aborted = counted(system, ABORTED)
        async with client_of(system) as client:
            task = asyncio.create_task(client.chat.completions.create(stream=streams, **ENDLESS))
            await until_counted(system, RUNNING, 1)
            if streams:
                stream = await task
                await stream.close()
            else:
                task.cancel()
                await asyncio.wait([task])
            await until_counted(system, RUNNING, 0)
            await until_counted(system, ABORTED, num_aborted + 1)

    asyncio.run(main())


RUNNING = "fastchat_num_requests_running{"
ABORTED = 'fastchat_request_success_total{finished_reason="abort"'


async def until_counted(system: System, begin: str, count: int) -> None:
    """Wait until the sum of those metrics is `count`."""
    deadline = time.monotonic() + 60
    while await asyncio.to_thread(counted, system, begin) != count:
        assert time.monotonic() < deadline, f"{begin} was never {count}"
        await asyncio.sleep(0.02)


def counted(system: System, begin: str) -> int:
    """The sum of the worker's metrics whose lines begin like this."""
    token = (system.state_dir / "cluster-token").read_text().strip()
    command = ["curl", "-fsS", "-H", f"Authorization: Bearer {token}", f"{system.worker.url}/metrics"]
    metrics = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return round(sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(begin)))


def test_another_openai_server_can_be_a_worker(system, tmp_path):
    """Registered by URL with the cluster token, it is listed and answers, whole and streamed; it is told no secret."""
    num_logged = system.api.log.count("request_id")
    with (
        start_command("controller", "--port", "0", state_dir=tmp_path) as controller,
        start_command(
            "openai_api_server", "--port", "0", "--controller-address", controller.url, state_dir=tmp_path
        ) as api,
    ):
        body = {"worker_name": system.api_url, "check_heart_beat": False}
        status = {"model_names": [MODEL_NAME], "speed": 1, "queue_length": 0}
        request = urllib.request.Request(
            f"{controller.url}/register_worker",
            json.dumps({**body, "worker_status": status}).encode(),
            {"Authorization": f"Bearer {(tmp_path / 'cluster-token').read_text().strip()}"},
        )
        urllib.request.urlopen(request, timeout=60).close()
        here = System(api, controller, system.worker, tmp_path, ())
        wait_for_models(here, [MODEL_NAME])

        async def main() -> None:
            async with client_of(here) as client:
                asked = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
                whole = (await client.chat.completions.create(**asked)).choices[0].message.content
                stream = await client.chat.completions.create(stream=True, **asked)
                assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == whole

        asyncio.run(main())
    assert system.api.log.count("request_id") > num_logged


def test_a_restarted_controller_disturbs_nobody(system, later_processes):
    """Streams go on, new requests are answered from the last table, and the model is in the new controller's table."""

    async def main() -> None:
        async with client_of(system) as client:
            stream = await client.chat.completions.create(stream=True, **ENDLESS)
            chunks = aiter(stream)
            await anext(chunks)
            system.controller.kill()
            answer = await client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=2)
            assert answer.choices[0].finish_reason
            controller = start_command("controller", *system.controller_flags, state_dir=system.state_dir)
            later_processes.enter_context(controller)
            controller.wait_for_line("worker registered")
            wait_for_models(system, [MODEL_NAME])
            assert await asyncio.to_thread(counted, system, RUNNING) == 1
            assert (await anext(chunks)).choices[0].finish_reason is None
            await stream.close()

    asyncio.run(main())


def test_a_killed_worker_is_gone_at_once_and_its_clients_are_told(system):
    """A stream that has begun ends with an error, never with a made-up finish; the next request gets 404 or 503. The
    last test of this instance.
    """

    async def main() -> None:
        async with client_of(system) as client:
            stream = await client.chat.completions.create(stream=True, **ENDLESS)
            await anext(aiter(stream))
            system.worker.signal(signal.SIGKILL)
            with pytest.raises(openai.APIError) as caught:
                [chunk async for chunk in stream]
            assert "worker" in str(caught.value)
            began = time.monotonic()
            with pytest.raises((openai.InternalServerError, openai.NotFoundError)):
                await client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=2)
            assert time.monotonic() - began < AT_ONCE_S
            wait_for_models(system, [], limit_s=AT_ONCE_S)

    asyncio.run(main())


def test_two_models_in_one_worker_as_in_the_guide(tmp_path):
    """Both are listed and answer at the same time, one's error leaves the other alone, both come back by themselves."""
    first, second = "chatglm2-6b-cmeee_eie001", "chatglm2-6b"
    for number, name in enumerate((first, second)):
        write_checkpoint(tmp_path / name, "chatglm2", seed=number)
    flags = [
        *("--model-path", tmp_path / first, "--model-names", first),
        *("--model-path", tmp_path / second, "--model-names", second),
        *("--dtype", "float32"),  # in which text does not depend on the batch
    ]
    with running_system(
        tmp_path, worker_module="multi_model_worker", worker_flags=flags, model_names=[first, second]
    ) as system:

        async def main() -> None:
            async with client_of(system) as client:
                answers = await asyncio.gather(
                    *(
                        client.chat.completions.create(
                            model=name, messages=MESSAGES, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
                        )
                        for name in (first, second) * 2
                    )
                )
                texts = [answer.choices[0].message.content for answer in answers]
                assert texts[:2] == texts[2:]
                assert texts[0] != texts[1]
                with pytest.raises(openai.BadRequestError, match="context"):
                    await client.chat.completions.create(model=first, messages=MESSAGES, max_tokens=10**6)

        asyncio.run(main())
        system.controller.kill()
        with start_command("controller", *system.controller_flags, state_dir=tmp_path / "state") as controller:
            controller.wait_for_line("worker registered")
            wait_for_models(system, [first, second])

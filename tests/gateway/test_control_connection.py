"""What a controller answers to a worker that breaks the protocol of the control connection."""

import asyncio

import pytest

from fastchat.cluster.contract import CONNECT_PATH, Hello, ModelEntry
from tests.gateway.canned_worker import CannedWorker
from tests.gateway.conftest import TOKEN
from tests.gateway.test_record_inbox import RECORD


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"{}", "frame of bytes"),
        ({"number": 2**63}, "record.number"),
        ({"number": 1, "num_prompt_tokens": -1}, "record.num_prompt_tokens"),
        ({"number": 1, "num_generated_tokens": 2**64}, "record.num_generated_tokens"),
    ],
    ids=repr,
)
def test_what_is_no_message_is_refused_with_its_reason(cluster, thread, frame, reason):
    async def law(address):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = cluster.controller_url + CONNECT_PATH
        async with asyncio.timeout(60), cluster.session.ws_connect(url, headers=headers) as socket:
            hello = Hello(worker_id="w1", address=address, models=(ModelEntry(name="m", max_context=8, created=1),))
            await socket.send_str(hello.model_dump_json())
            assert (await socket.receive_json())["type"] == "welcome"
            if isinstance(frame, bytes):
                await socket.send_bytes(frame)
            else:
                await socket.send_json({"type": "record", **RECORD, **frame})
            refused = await socket.receive_json()
            assert refused["type"] == "refused"
            assert reason in refused["reason"]

    with thread.serve(CannedWorker().app) as address:
        thread.run(law(address))

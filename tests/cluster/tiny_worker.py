"""A worker without a model: /livez and a real control connection, steered by lines on its standard input.

`records N` adds N final records, `drain` says goodbye, `stop` leaves the connection in order and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from aiohttp import web

from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection
from fastchat.ops.logs import configure_logging


async def run(arguments: argparse.Namespace) -> None:
    load = Load()

    def get_load() -> Load:
        nonlocal load
        load = Load(progress=load.progress + 1)
        return load

    async def livez(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "worker_id": arguments.answers_as or arguments.worker_id})

    app = web.Application()
    app.router.add_get("/livez", livez)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    connection = ControlConnection(
        controller_address=arguments.controller_address,
        token=arguments.token,
        hello=Hello(
            worker_id=arguments.worker_id,
            address=arguments.worker_address or f"http://127.0.0.1:{port}",
            models=(ModelEntry(name=arguments.model, max_context=2048, created=int(time.time())),),
        ),
        get_load=get_load,
    )
    async with connection.keep_open():
        while line := await asyncio.to_thread(sys.stdin.readline):
            word, _, number = line.strip().partition(" ")
            if word == "records":
                for _ in range(int(number)):
                    connection.add_record(
                        request_id="r",
                        tenant="t",
                        model=arguments.model,
                        num_prompt_tokens=3,
                        num_cached_tokens=1,
                        num_generated_tokens=2,
                        reason="stop",
                    )
            elif word == "drain":
                connection.drain()
            elif word == "stop":
                break
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--controller-address", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--worker-id", default="w1")
    parser.add_argument("--answers-as", default="")
    parser.add_argument("--worker-address", default="")
    parser.add_argument("--model", default="tiny")
    configure_logging("tiny_worker")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

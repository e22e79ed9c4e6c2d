"""People chatting with the page at once: the time between two updates that a browser gets, for one and for many.

    python benchmarks/web_users.py --page-url http://127.0.0.1:7860 --model NAME [--users 50] [--max-tokens 200]

Each user is what a browser is to the page: posts one message and reads the events of its session. The page needs no
account for this. The first figure of each user, from the message to the first update, is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class User:
    """What one user saw, in seconds."""

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_updates: int = 0


async def main() -> None:
    """Measure one user, then many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-url", default="http://127.0.0.1:7860")
    parser.add_argument("--model", required=True)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(f"{arguments.page_url}/config") as response:
            number = ask_event(await response.json())
        for num_users in (1, arguments.users):
            began = time.monotonic()
            users = await asyncio.gather(
                *(chat(session, arguments.page_url, number, arguments, index) for index in range(num_users))
            )
            report(num_users, users, time.monotonic() - began)


def ask_event(config: dict) -> int:
    """The number of the event that a sent message triggers."""
    box = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "message")
    return next(each["id"] for each in config["dependencies"] if [box, "submit"] in each["targets"])


async def chat(
    session: aiohttp.ClientSession, url: str, number: int, arguments: argparse.Namespace, index: int
) -> User:
    """One message and its answer."""
    user, session_hash = User(), secrets.token_hex(6)
    data = [f"Write a long story, number {index}.", [], arguments.model, "", 1.0, 1.0, str(arguments.max_tokens), "1"]
    event = {"data": data, "fn_index": number, "session_hash": session_hash, "trigger_id": None}
    began = last = time.monotonic()
    async with session.post(f"{url}/gradio_api/queue/join", json=event) as response:
        response.raise_for_status()
    async with session.get(f"{url}/gradio_api/queue/data", params={"session_hash": session_hash}) as response:
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            message = json.loads(line[5:])
            if message["msg"] == "process_completed":
                assert message["success"], message
                break
            if message["msg"] != "process_generating":
                continue
            now = time.monotonic()
            user.num_updates += 1
            if user.num_updates == 2:  # the first is the question itself
                user.first_s = now - began
            elif user.num_updates > 2:
                user.gaps_s.append(now - last)
            last = now
    return user


def report(num_users: int, users: list[User], wall_s: float) -> None:
    """One line for a number of users."""
    gaps = sorted(gap for user in users for gap in user.gaps_s)
    p99 = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]
    print(
        f"users={num_users} updates={sum(user.num_updates for user in users)} wall={wall_s:.1f}s "
        f"first p50={statistics.median(user.first_s for user in users) * 1000:.0f}ms "
        f"between updates p50={statistics.median(gaps) * 1000:.0f}ms p99={p99 * 1000:.0f}ms max={gaps[-1] * 1000:.0f}ms"
    )


if __name__ == "__main__":
    asyncio.run(main())

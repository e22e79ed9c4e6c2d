"""A server that fails as its model's name says, for clients that must see each failure as an error of its own class."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAILING_MODELS = ("answers-429", "answers-500", "breaks-off")
_CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "breaks-off",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}, "finish_reason": None}],
}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = body["model"].removeprefix("answers-")
        if status.isdecimal():
            error = {"message": "No luck.", "type": "server_error", "param": None, "code": f"failed_{status}"}
            self._answer(int(status), "application/json", json.dumps({"error": error}))
        else:  # a stream whose end is missing
            self._answer(200, "text/event-stream", f"data: {json.dumps(_CHUNK)}\n\n")

    def _answer(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Nothing."""


@contextmanager
def registered_failing_server(controller_url: str, token: str) -> Iterator[None]:
    """While the block runs, the controller knows such a server as one of another kind, with `FAILING_MODELS`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            status = {"model_names": FAILING_MODELS, "speed": 1, "queue_length": 0}
            address = f"http://127.0.0.1:{server.server_port}"
            body = {"worker_name": address, "check_heart_beat": False, "worker_status": status}
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            url = f"{controller_url}/register_worker"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60):
                yield
        finally:
            server.shutdown()
            thread.join()

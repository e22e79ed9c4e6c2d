"""What the tests of adapters at run time act on: an API server over two workers, and a stream meanwhile."""

import threading

import httpx2
import orjson

from tests.worker.conftest import TOKEN, wait_until

PATH = "/api/v1/models"
BASE = "chatglm2-6b"
PROMPT = list(range(30, 50))


class System:
    """Two workers of one base, one with its engine in a process of its own, behind one API server with keys."""

    def __init__(self, url, keys, workers, restarted_controller):
        self.url, self.keys, self.workers = url, keys, workers
        self.restarted_controller = restarted_controller

    def ask(self, method, path, key="operator", **options):
        headers = {"authorization": f"Bearer {self.keys[key]}"}
        return httpx2.request(method, self.url + path, headers=headers, timeout=60, **options)

    def add(self, name, path=None, *, base=BASE, worker=None, **options):
        query = f"?worker={worker.runtime.worker_id}" if worker else ""
        body = {"name": name} if path is None else {"name": name, "path": str(path)}
        return self.ask("POST", f"{PATH}/{base}/adapters{query}", json=body, **options)

    def remove(self, name, *, base=BASE, worker=None, **options):
        query = f"?worker={worker.runtime.worker_id}" if worker else ""
        return self.ask("DELETE", f"{PATH}/{base}/adapters/{name}{query}", **options)

    def complete(self, model, **options):
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **options}
        return self.ask("POST", "/v1/completions", "client", json=body)

    def text(self, model, **options):
        answer = self.complete(model, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def names(self):
        return {card["id"] for card in self.ask("GET", "/v1/models").json()["data"]}

    def rows(self, base=BASE):
        return [row for row in self.ask("GET", PATH).json()["data"] if row["id"] == base]

    def code(self, answer):
        return answer.status_code, answer.json()["error"]["code"]

    def cleared(self):
        """No adapter is left of what a test added."""
        for worker in self.workers:
            (row,) = (row for row in self.rows() if row["worker"] == worker.runtime.worker_id)
            for name in row["adapters"]:
                assert self.remove(name, worker=worker).status_code == 200
        wait_until(lambda: self.names() == {BASE, "vicuna-7b-v1.3"})


class Stream:
    """A long stream, read by a thread; `text` waits for its end."""

    def __init__(self, system, model, worker):
        self._begun = threading.Event()
        self.lines = []
        body = {"model": model, "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        self._thread = threading.Thread(target=self._read, args=(worker, {**body, "stream": True}))
        self._thread.start()
        assert self._begun.wait(60)

    def _read(self, worker, body):
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx2.stream("POST", f"{worker.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)
                self._begun.set()

    def text(self):
        self._thread.join(60)
        chunks = [orjson.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        assert self.lines[-2] == "data: [DONE]"
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

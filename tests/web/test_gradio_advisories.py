"""What was published against Gradio, id by id, on the running page; docs/page-security.md has the same ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib import resources

import pytest

from tests.processes import ROOT
from tests.web.browser import OVER_THE_NETWORK
from tests.web.canary import AT_ONCE_S, Canary, call

FORM = {"content_type": "multipart/form-data; boundary=b"}
JSON = {"content_type": "application/json"}


@dataclass(frozen=True)
class Probe:
    """A request that must be refused. `{url}` stands for a server that counts who calls it."""

    path: str
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def joined(value):
    """The value as the data of an event of the page."""
    return Probe("/gradio_api/queue/join", json.dumps({"data": [value], "fn_index": 0, "session_hash": "a"}), JSON)


def uploaded(name, content):
    text = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n{content}\r\n--b--\r\n'
    return [Probe(path, text, FORM) for path in ("/gradio_api/upload", "/upload")]


def component_server(name):
    body = json.dumps({"session_hash": "a", "component_id": 1, "fn_name": name, "data": "/etc/passwd"})
    return [Probe(path, body, JSON) for path in ("/gradio_api/component_server", "/component_server")]


REFUSED = {
    "CVE-2023-34239": [Probe("/file/etc/passwd"), Probe("/proxy={url}")],
    "CVE-2023-51449": [Probe("/file=../../../../etc/passwd"), Probe("/gradio_api/file/..%2f..%2fetc/passwd")],
    "CVE-2024-1561": component_server("move_resource_to_block_cache"),
    "CVE-2024-1728": [joined({"path": "/etc/passwd"})],
    "CVE-2024-4325": [joined({"path": "{url}", "url": "{url}"}), Probe("/gradio_api/file={url}")],
    "CVE-2024-4940": [Probe("/file={url}"), Probe("/gradio_api/file=//evil.example")],
    "CVE-2024-8021": [Probe("/%5cevil.example"), Probe("/gradio_api/%2f%2fevil.example")],
    "CVE-2024-8966": [Probe("/gradio_api/upload", "--b" + "-" * 2**20, FORM)],
    "CVE-2024-10569": [*uploaded("bomb.csv.gz", "\x1f\x8b"), joined([{"path": "{url}/bomb.csv.gz"}])],
    "CVE-2024-10648": [
        joined({"path": "a.wav", "format": "../../x"}),
        Probe("/gradio_api/stream/a/1/1/..%2fplaylist-file"),
    ],
    "CVE-2024-34511": component_server("__init__"),
    "CVE-2024-47164": [Probe("/gradio_api/file=/tmp/gradio/../../etc/passwd"), Probe("/file=/tmp/..//etc/passwd")],
    "CVE-2024-47166": [Probe(f"/custom_component/{'0' * 32}/client/component/../config.json")],
    "CVE-2024-47167": [joined({"path": "{url}", "meta": {"_type": "gradio.FileData"}}), joined([{"url": "{url}"}])],
    "CVE-2024-47168": [Probe("/monitoring"), Probe("/gradio_api/monitoring"), Probe("/monitoring/summary")],
    "CVE-2024-47868": [joined([{"role": "user", "content": {"file": {"path": "/etc/passwd"}}}])],
    "CVE-2024-47869": [Probe(f"/monitoring/{key}") for key in ("a", "a" * 43)],
    "CVE-2024-47872": [*uploaded("x.svg", "<svg onload=alert(1)>"), *uploaded("x.html", "<script>alert(1)</script>")],
    "CVE-2024-51751": [joined({"path": "/etc/passwd", "orig_name": "x", "meta": {"_type": "gradio.FileData"}})],
    "CVE-2026-27167": [Probe("/login/huggingface"), Probe("/login/callback?code=1&state=1")],
    "CVE-2026-28414": [
        Probe("/static//windows/win.ini"),
        Probe("/static/C:/windows/win.ini"),
        Probe("/assets//etc/passwd"),
    ],
    "CVE-2026-28415": [Probe("/login/huggingface?_target_url=https://evil.example")],
    "CVE-2026-28416": [Probe("/gradio_api/proxy={url}"), Probe("/proxy=http://169.254.169.254/")],
    "CVE-2026-48545": [Probe("/gradio_api/proxy=https://a.hf.space/"), Probe("/proxy=https://a.hf.space/")],
    "CVE-2026-59806": [Probe("/gradio_api/file={url}"), Probe("/gradio_api/file=http%3A%2F%2F169.254.169.254%2F")],
}


@pytest.fixture
def port(page_server):
    """The page's; whatever was tried, it answers others at once."""
    yield page_server.port
    answer = call(page_server.port, "GET", "/page/models")
    assert (answer.status, answer.seconds < AT_ONCE_S) == (200, True)


@pytest.mark.parametrize("advisory", REFUSED)
def test_what_was_published_is_refused(port, advisory):
    """At once, without a redirect, a file's content, or a call to anybody."""
    with Canary() as canary:
        for probe in REFUSED[advisory]:
            path, body = (text.replace("{url}", canary.url) for text in (probe.path, probe.body))
            answer = call(port, "POST" if body else "GET", path, body.encode("latin-1"), **probe.headers)
            assert 400 <= answer.status < 500, (probe, answer)
            assert answer.seconds < AT_ONCE_S
            assert b"root:" not in answer.body
            assert "location" not in answer.headers
        assert canary.num_calls == 0


def test_cve_2024_10624_no_expression_runs_away(port):
    """A box for dates matched with an expression that backtracks: there is none, and long blanks cost nothing."""
    config = json.loads(call(port, "GET", "/config").body)
    assert not {"datetime", "dataframe", "audio", "file"} & {each["type"] for each in config["components"]}
    box = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "message")
    number = next(each["id"] for each in config["dependencies"] if [box, "submit"] in each["targets"])
    data = ["now" + " " * 10**6 + "x", [], None, "", 0.7, 1, "", ""]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "blanks", "trigger_id": box})
    assert call(port, "POST", "/gradio_api/queue/join", body.encode(), **JSON).seconds < AT_ONCE_S


@pytest.mark.parametrize(
    "origin", ["null", "https://evil.example", "http://localhost:1", "http://127.0.0.1.evil.example"]
)
def test_cve_2024_47084_and_cve_2024_47165_no_other_origin_reads(port, origin):
    """With or without cookies, whatever the address in front says."""
    for host in (f"127.0.0.1:{port}", OVER_THE_NETWORK):
        for path in ("/", "/config", "/page/models", "/gradio_api/startup-events"):
            headers = call(port, "GET", path, origin=origin, cookie="access-token=x", host=host).headers
            assert not [name for name in headers if name.startswith("access-control")]


def test_cve_2024_47870_one_visitor_s_headers_change_nothing_for_another(port):
    """Where the page believes itself to be is worked out for each request."""
    for name in ("x_forwarded_host", "host", "x_forwarded_proto", "x_gradio_server"):
        call(port, "GET", "/config", **{name: "evil.example"})
        assert b"evil.example" not in call(port, "GET", "/config").body
        assert b"evil.example" not in call(port, "GET", "/").body


def test_cve_2024_47867_and_cve_2024_47871_no_tunnel(port):
    """The program for share links is not there, and `--share` is refused (see test_page_command.py)."""
    assert not [each for each in resources.files("gradio").iterdir() if each.name.startswith("frpc")]
    assert json.loads(call(port, "GET", "/config").body).get("is_space") is not True
    assert b"gradio.live" not in call(port, "GET", "/").body


def test_the_page_s_table_names_what_is_probed():
    """Every row has a probe here or in test_advisories.py, and every probe here a row."""
    rows = set(re.findall(r"^\| (CVE-\d+-\d+) \|", (ROOT / "docs" / "page-security.md").read_text(), re.MULTILINE))
    text = (ROOT / "tests" / "web" / "test_gradio_advisories.py").read_text()
    here = {f"CVE-{year}-{number}" for year, number in re.findall(r"(?i)cve[-_](\d{4})[-_](\d+)", text)}
    assert rows == here

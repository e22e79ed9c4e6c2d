"""Each known hole of FastChat's and Gradio's pages, probed on the running page."""

from __future__ import annotations

import json

import pytest

from tests.web.canary import AT_ONCE_S, Canary, call

BOUNDARY = "----b"
MULTIPART = {"content_type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"content_type": "application/json"}
UPLOADS = ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/gradio_api/process_recording", "/login")


@pytest.fixture
def canary():
    with Canary() as canary:
        yield canary


@pytest.fixture(scope="module")
def port(page_server):
    return page_server.port


@pytest.fixture(autouse=True)
def still_alive(port):
    """Whatever was tried, the page answers others at once."""
    yield
    answer = call(port, "GET", "/page/models")
    assert (answer.status, answer.seconds < AT_ONCE_S) == (200, True)


@pytest.mark.parametrize("path", UPLOADS)
def test_junk_after_a_multipart_boundary(port, path):
    """CVE-2024-10907, Gradio CVE-2024-8966: refused at once, without a parse."""
    body = f"--{BOUNDARY}".encode() + b"-" * 2**20
    answer = call(port, "POST", path, body, **MULTIPART)
    assert (400 <= answer.status < 500, answer.seconds < AT_ONCE_S) == (True, True)


@pytest.mark.parametrize("path", UPLOADS)
def test_huge_names_of_uploads(port, path):
    """CVE-2024-10912: 10 MB of file name are refused."""
    name = "a" * 10 * 2**20
    body = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nx\r\n--{BOUNDARY}--'
    assert 400 <= call(port, "POST", path, body.encode(), **MULTIPART).status < 500


@pytest.mark.parametrize(
    "path",
    [
        "/file={url}",
        "/file/{url}",
        "/gradio_api/file={url}",
        "/gradio_api/proxy={url}",
        "/proxy={url}",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=../../../../etc/passwd",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/..%2f..%2f..%2fetc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets//etc/passwd",
        "/svelte/../../../etc/passwd",
        "/custom_component/x/client/component/../../../../etc/passwd",
        "/gradio_api/custom_component/x/client/component/..%2f..%2fetc%2fpasswd",
        "/gradio_api/stream/x/1/1/playlist-file",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/mcp/sse",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
        "/gradio_api/token",
        "/monitoring",
        "/monitoring/summary",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_is_fetched_handed_out_or_shown(port, canary, path):
    """CVE-2024-1561, -1728, -4325, -4940, -51751, CVE-2023-51449, CVE-2026-28414, -28416, -59806: not there."""
    answer = call(port, "GET", path.format(url=canary.url))
    assert answer.status == 404
    assert b"root:" not in answer.body
    assert canary.num_calls == 0


@pytest.mark.parametrize(
    "path",
    [
        "//evil.example/",
        "///evil.example",
        "/%2f/evil.example",
        "/\\evil.example",
        "/http://evil.example",
        "/file=https://evil.example",
        "/gradio_api/file=https://evil.example",
        "/logout?_target_url=https://evil.example",
        "/login?_target_url=https://evil.example",
        "/login/huggingface?_target_url=https://evil.example",
        "/config//evil.example/..",
        "/?__theme=//evil.example",
    ],
)
def test_nobody_is_sent_to_another_origin(port, path):
    """CVE-2024-10908, CVE-2024-8021, CVE-2026-28415: no redirect leaves the page."""
    location = call(port, "GET", path).headers.get("location", "")
    assert "evil" not in location.replace("/config", "")


def event(number, data):
    return json.dumps({"data": data, "fn_index": number, "session_hash": "abc", "trigger_id": 1}).encode()


FILE = {"path": "{url}", "url": "{url}", "meta": {"_type": "gradio.FileData"}}
COMPONENT = {"component": "image", "value": FILE, "constructor_args": {"value": "{url}"}, "props": {}}


@pytest.mark.parametrize(
    "content",
    [[{"type": "file", "file": FILE}], [COMPONENT], [{"file": FILE}], {"path": "/etc/passwd"}, FILE],
    ids=lambda content: json.dumps(content)[:20],
)
def test_no_message_names_a_file_an_address_or_a_component(port, canary, content):
    """CVE-2024-11603, CVE-2024-12376, FastChat's load_image: refused before Gradio looks at it."""
    text = json.dumps([["x", [{"role": "user", "content": content}], "m", "", 0.7, 1, "", ""]])
    (data,) = json.loads(text.replace("{url}", canary.url))
    answer = call(port, "POST", "/gradio_api/queue/join", event(0, data), **JSON)
    assert answer.status == 400
    assert canary.num_calls == 0


@pytest.mark.parametrize("name", ["ask", "answer_again", "try_again", "predict", "lambda"])
@pytest.mark.parametrize("route", ["api", "run", "call", "call/v2"])
def test_events_are_no_public_api(port, name, route):
    """What the page's buttons do can be asked by its buttons only."""
    assert call(port, "POST", f"/gradio_api/{route}/{name}", b'{"data": []}', **JSON).status == 404


@pytest.mark.parametrize("body", [b"[" * 10**6, b'{"data":' + b"[" * 100 + b"]" * 100 + b"}", b"not json", b"[]"])
def test_bodies_that_are_no_event(port, body):
    """Deep, broken and foreign JSON ends at the guard."""
    answer = call(port, "POST", "/gradio_api/queue/join", body, **JSON)
    assert (answer.status, answer.seconds < AT_ONCE_S) == (400, True)


def test_bodies_have_a_limit(port):
    """33 MB are not kept."""
    assert call(port, "POST", "/gradio_api/queue/join", b" " * 33 * 2**20, **JSON).status == 413


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://localhost.evil.example"])
def test_other_origins_read_nothing(port, origin):
    """Gradio CVE-2024-47084, -47165: no answer allows a foreign origin to read it."""
    for path in ("/", "/config", "/page/models"):
        headers = call(port, "GET", path, origin=origin, host=f"127.0.0.1:{port}").headers
        assert "access-control-allow-origin" not in headers


def test_other_sites_write_nothing(port):
    """A page of another site that posts here is refused, whatever it posts."""
    for headers in ({"sec_fetch_site": "cross-site"}, {"origin": "null"}):
        assert call(port, "POST", "/gradio_api/queue/join", event(0, []), **headers).status == 403


def test_every_answer_keeps_the_browser_here(port):
    """The policy allows nothing from elsewhere, and no script without the nonce of this very answer."""
    first, second = (call(port, "GET", "/").headers["content-security-policy"] for _ in range(2))
    assert first != second
    for part in ("default-src 'self'", "object-src 'none'", "form-action 'self'", "connect-src 'self'"):
        assert part in first
    assert "http" not in first
    assert "'unsafe-inline'" not in first.split("script-src")[1].split(";")[0]


def test_the_html_names_no_other_host(port):
    """Not even in a preview card."""
    html = call(port, "GET", "/").body.decode()
    assert "huggingface.co" not in html.split("window.gradio_config")[0]
    assert "githubusercontent" not in html

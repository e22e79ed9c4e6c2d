"""What a model or a person writes is text: it runs nothing, fetches nothing and covers nothing."""

from __future__ import annotations

import json

import pytest

HOSTILE = {
    "script": "<script>window.broken = 1</script>",
    "image handler": '<img src="x" onerror="window.broken = 1">',
    "image": "![x](https://evil.example/x.png)",
    "reference image": "![x][y]\n\n[y]: https://evil.example/x.png",
    "html image": '<img src="https://evil.example/y.png">',
    "picture": '<picture><source srcset="https://evil.example/z.png"><img src="https://evil.example/z.png"></picture>',
    "video": '<video src="https://evil.example/v.mp4" autoplay></video><audio src="https://evil.example/a.mp3">',
    "frame": '<iframe src="https://evil.example"></iframe><iframe srcdoc="<script>parent.broken = 1</script>">',
    "object": '<object data="https://evil.example/o"></object><embed src="https://evil.example/e">',
    "link": '[click](javascript:window.broken=1) <a href="javascript:window.broken=1">click</a>',
    "encoded link": '<a href="java&#10;script:window.broken=1">click</a> [click](data:text/html,<script>1</script>)',
    "svg": '<svg onload="window.broken=1"><image href="https://evil.example/s.png"/><script>window.broken=1</script></svg>',
    "svg use": '<svg><use href="https://evil.example/u.svg#a"/><style>@import "https://evil.example/c.css"</style></svg>',
    "style": "<style>body { display: none; background: url(https://evil.example/b.png) }</style>",
    "style attribute": '<div style="background: url(https://evil.example/d.png)">x</div>',
    "escaped style": '<div style="background: u\\72l(https://evil.example/d.png)">x</div>',
    "background": '<table background="https://evil.example/t.png"><tr><td background="https://evil.example/u.png">x',
    "cover": '<div style="position: fixed; inset: 0; background: red; z-index: 9999">x</div>',
    "form": '<form action="https://evil.example"><input name="a" autofocus onfocus="window.broken=1"></form>',
    "meta": '<meta http-equiv="refresh" content="0; url=https://evil.example"><base href="https://evil.example/">',
    "sheet": '<link rel="stylesheet" href="https://evil.example/l.css">',
    "formula": "$\\href{javascript:window.broken=1}{x}$ "
    "$\\includegraphics{https://evil.example/k.png}$ \\(\\url{javascript:1}\\)",
    "diagram": '```mermaid\ngraph TD\nA["<img src=https://evil.example/m.png onerror=window.broken=1>"] --> B\n```',
    "math": '<math><mtext><img src="x" onerror="window.broken=1"></mtext></math>',
    "details": '<details open ontoggle="window.broken=1"><summary>x</summary></details>',
    "noscript": '<noscript><p title="</noscript><img src=x onerror=window.broken=1>">',
    "button": '<button onclick="window.broken=1" formaction="https://evil.example">x</button>',
    "ours": '<b data-press="language-switch">x</b><b data-word="nonsense"></b>',
    "looks": '<div id="page-end-box" class="note can-vote">x</div>',
    "code": "```html\n<img src=https://evil.example/c.png onerror=window.broken=1>\n```",
}


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_hostile_text_stays_text(visit, tmp_path, role):
    """All of it at once, from either side: shown, run and fetched by nobody, without a complaint in the console."""
    texts = [f"{name}\n\n{text}" for name, text in HOSTILE.items()]
    messages = [{"role": role, "content": text} for text in texts]
    conversations = [{"title": "<img src=x onerror=window.broken=1>", "messages": messages}]
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps({"format": "fastchat-conversations", "version": 1, "conversations": conversations}))
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#import")
    chooser.value.set_files(path)
    side = "user" if role == "user" else "bot"
    shown = visit.page.locator(f"#chat [data-testid={side}]")
    visit.wait_for(lambda: shown.count() == len(texts), what="all messages")
    for number in range(len(texts)):
        shown.nth(number).scroll_into_view_if_needed()
    for link in visit.page.locator("#chat .message a").all():
        assert not (link.get_attribute("href") or "").lower().replace("\n", "").startswith(("javascript", "data"))
    visit.page.wait_for_timeout(500)
    assert visit.page.locator("#chat .message :is([data-press], [data-word])").count() == 0
    placed = "[...document.querySelectorAll('#chat .message *')].map(e => getComputedStyle(e).position)"
    assert not {"fixed", "sticky"} & set(visit.page.evaluate(placed))
    assert visit.page.evaluate("window.broken") is None
    assert visit.page.evaluate("document.elementFromPoint(5, 400).closest('#sidebar') !== null")
    assert visit.page.locator("#send").is_visible()
    assert (
        visit.page.locator("#chat .message :is(img, iframe, video, audio, object, embed, form, input, style)").count()
        == 0
    )


SHOW = r"""([tags, ticks]) => {
  const began = performance.now();
  document.createElement("template").innerHTML = tags;
  const shown = ticks.replace(new RegExp("\\\\\\[([\\s\\S]+?)\\\\\\]", "g"), "");
  return [shown === ticks, performance.now() - began];
}"""
"""As Gradio does before it shows a message."""


def test_text_that_closes_nothing_costs_no_time(visit):
    """Neither of tags nor of code: what each of their beginnings costs does not grow with the text behind it."""
    is_the_same, took_ms = visit.page.evaluate(SHOW, ["<div " + "<a" * 60_000, "$\n" + "`" * 250_000 + "x`"])
    assert is_the_same
    assert took_ms < 1000  # some 5000 when it does

"""Conversations are kept in the browser: list, rename, delete, export, import."""

from __future__ import annotations

import json

from tests.web.browser import visiting

HELLO = "Hello! What is your name?"
SAVED_BY_FASTCHAT = {
    "template_name": "chatglm2",
    "system_message": "Be brief.",
    "roles": ["问", "答"],
    "messages": [["问", "你好"], ["答", "你好！有什么可以帮你？"], ["问", "再见"], ["答", None]],
    "offset": 0,
}


def write(path, document):
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def import_file(visit, path):
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#import")
    chooser.value.set_files(path)


def exported(visit, tmp_path):
    with visit.page.expect_download() as download:
        visit.page.click("#export")
    download.value.save_as(tmp_path / "export.json")
    return json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))


def test_each_conversation_is_listed_and_can_be_opened_again(visit):
    """The newest first; what is shown is what was said there."""
    first = visit.ask(HELLO)
    visit.page.click("#new-chat")
    visit.wait_for(lambda: visit.questions() == [], what="an empty conversation")
    visit.ask("Who made you?")
    assert visit.titles() == ["Who made you?", HELLO]
    visit.page.locator("#conversation-list .conversation", has_text=HELLO).click()
    visit.wait_for(lambda: visit.answers() == [first], what="the first conversation")
    assert visit.questions() == [HELLO]


def test_conversations_can_be_renamed_and_deleted(visit):
    """And stay so after a reload."""
    visit.ask(HELLO)
    visit.page.once("dialog", lambda dialog: dialog.accept("Names"))
    visit.page.locator("#conversation-list li").hover()
    visit.page.locator("#conversation-list [aria-label=Rename]").click()
    visit.wait_for(lambda: visit.titles() == ["Names"], what="the new name")
    visit.reload()
    assert visit.titles() == ["Names"]
    visit.page.once("dialog", lambda dialog: dialog.accept())
    visit.page.locator("#conversation-list li").hover()
    visit.page.locator("#conversation-list [aria-label=Delete]").click()
    visit.wait_for(lambda: visit.titles() == [] and visit.questions() == [], what="nothing is left")
    assert visit.page.locator("#no-conversations").is_visible()
    assert "Hello" not in visit.page.evaluate("JSON.stringify(localStorage)")


def test_what_is_exported_is_imported_exactly(visit, browser, page_server, tmp_path):
    """Another browser shows the same conversations, judged as they were, and exports the same file."""
    first = visit.ask(HELLO)
    visit.page.click("#judge-up")
    visit.page.locator("#judge-up[aria-pressed=true]").wait_for()
    visit.page.click("#new-chat")
    visit.wait_for(lambda: visit.questions() == [], what="an empty conversation")
    visit.open_settings()
    visit.page.fill("#system textarea", "Be brief.")
    second = visit.ask("Who made you?")
    document = exported(visit, tmp_path)
    assert document["conversations"][1]["messages"][0] == {"role": "user", "content": HELLO}
    assert document["conversations"][1]["messages"][1]["answer"]["vote"] == "up"
    with visiting(browser, page_server.url) as other:
        other.open()
        import_file(other, tmp_path / "export.json")
        other.wait_for(lambda: other.answers() == [second], what="the imported conversation")
        assert other.titles() == ["Who made you?", HELLO]
        other.page.locator("#judge-up[aria-pressed=false]").wait_for()
        other.page.locator("#conversation-list .conversation", has_text=HELLO).click()
        other.wait_for(lambda: other.answers() == [first], what="the first conversation")
        other.page.locator("#judge-up[aria-pressed=true]").wait_for()
        assert exported(other, tmp_path) == document


def test_marks_that_no_page_wrote_are_left_out(visit, tmp_path):
    """A file may say anything of an answer; what cannot be so is not shown, and the text is."""
    marks = ({"answer_id": 5, "model": "x"}, {"answer_id": "a b", "model": "x"}, {"answer_id": "a"}, "up", None, [])
    messages = [{"role": "assistant", "content": f"{number}", "answer": mark} for number, mark in enumerate(marks)]
    messages += [{"role": "user", "content": "q", "answer": {"answer_id": "a", "model": "x", "vote": "up"}}]
    messages += [{"role": "assistant", "content": "r", "answer": {"answer_id": "a", "model": "x", "vote": "best"}}]
    conversations = [{"messages": messages}]
    document = {"format": "fastchat-conversations", "version": 1, "conversations": conversations}
    import_file(visit, write(tmp_path / "marks.json", document))
    visit.wait_for(lambda: len(visit.answers()) == len(marks) + 1, what="the imported conversation")
    kept = exported(visit, tmp_path)["conversations"][0]["messages"]
    assert [message.get("answer") for message in kept[:-1]] == [None] * (len(marks) + 1)
    assert kept[-1]["answer"] == {"answer_id": "a", "model": "x", "vote": None}


def test_files_that_fastchat_saved_can_be_imported(visit, tmp_path):
    """What `!!save` of its terminal wrote, without the answer that never came."""
    import_file(visit, write(tmp_path / "saved.json", SAVED_BY_FASTCHAT))
    visit.wait_for(lambda: visit.questions() == ["你好", "再见"], what="the imported conversation")
    assert visit.answers() == ["你好！有什么可以帮你？"]
    assert visit.titles() == ["你好"]


def test_other_files_are_refused_readably(visit, tmp_path):
    """And nothing that was there is touched."""
    visit.ask(HELLO)
    for name, text in {"a.json": "[1, 2", "b.json": '{"messages": 5}', "c.json": "null"}.items():
        (tmp_path / name).write_text(text)
        import_file(visit, tmp_path / name)
        visit.page.locator(".note", has_text="holds no conversation").last.wait_for()
    assert visit.titles() == [HELLO]


def test_text_comes_back_as_it_was_written(visit, tmp_path):
    """Tabs, indentation, blank lines and angle brackets survive the server, the storage and an export."""
    text = "if x:\n\tif y:\n\t    return <b>1</b>\n\n\n    end  &lt; &"
    with visit.answering():
        visit.send(text)
    assert exported(visit, tmp_path)["conversations"][0]["messages"][0]["content"] == text

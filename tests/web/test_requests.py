"""What the page sends of a conversation, and says of an answer."""

from __future__ import annotations

import pytest

from fastchat.web.answering import Answer
from fastchat.web.api_client import Message, as_messages
from fastchat.web.arena_client import turn_body
from fastchat.web.chat_tab import _status
from fastchat.web.translation import translate

UNANSWERED = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
SENT = [("system", "S"), ("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]


def test_questions_without_an_answer_between_them_are_one_message():
    """The first one's answer was stopped before its first word; a prompt format may want roles to take turns."""
    assert [(message.role, message.text) for message in as_messages("S", UNANSWERED)] == SENT
    body = turn_body({"a": UNANSWERED, "b": UNANSWERED[:1]}, {}, system="S")
    assert [(message["role"], message["content"]) for message in body["side_messages"]["a"]] == SENT
    assert body["side_messages"]["b"][1:] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(("finish_reason", "key"), [("stop", "empty_answer"), ("length", "cut_off")])
def test_an_answer_without_a_word_is_told(finish_reason, key):
    """Else nothing at all would be seen."""
    answer = Answer()
    answer.facts.finish_reason = finish_reason
    assert translate("zh", key) in _status(answer, "zh")
    answer.text, answer.facts.finish_reason = "好", "stop"
    assert "notice" not in _status(answer, "zh")

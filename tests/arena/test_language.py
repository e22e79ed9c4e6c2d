"""Laws of the language that a conversation is filed under."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat.arena.language import LANGUAGES, language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("你好，请介绍一下北京。", "zh"),
        ("請用繁體中文回答", "zh"),
        ("用 Python 写一个 quicksort", "zh"),
        ("一", "zh"),
        ("日本の首都はどこですか？", "ja"),
        ("カタカナ", "ja"),
        ("한국의 수도는 어디입니까?", "ko"),
        ("Привет, как дела?", "ru"),
        ("Привіт, як твої справи?", "other"),
        ("Why is the sky blue?", "en"),
        ("Implement binary search tree insertion", "en"),
        ("Hi", "en"),
        ("What does naïve mean in a long and ordinary English sentence like this one?", "en"),
        ("Wie heißt die Hauptstadt von Frankreich?", "other"),
        ("Comment allez vous", "other"),
        ("¿Cuál es la capital de España?", "other"),
        ("ما هي عاصمة مصر؟", "other"),
        ("สวัสดีครับ", "other"),
        ("12345 !?", "other"),
        ("", "other"),
        ("解释这段代码\n```python\ndef add(first, second):\n    return first + second\n```", "zh"),
        ("这个链接 https://example.org/a/very/long/english/path 打不开", "zh"),
    ],
)
def test_language_is_told_from_the_script(text, language):
    """One example for each rule of the module."""
    assert language_of([text]) == language


def test_all_messages_count_together():
    """A Chinese conversation with one English word stays Chinese."""
    assert language_of(["你是谁？", "ok", "再说一遍，用中文"]) == "zh"


@given(st.lists(st.text(max_size=200), max_size=4))
def test_any_text_has_one_of_the_languages_and_always_the_same(texts):
    """Nothing fails, nothing depends on chance."""
    assert language_of(texts) in LANGUAGES
    assert language_of(texts) == language_of(texts)

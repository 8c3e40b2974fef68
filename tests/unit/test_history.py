"""Conversations: kept line by line, found again, private."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from dynrun.errors import NotFoundError, UsageError
from dynrun.paths import chats_dir
from dynrun.runtime.history import Chat, Message, find_chat, list_chats, new_chat, request_messages

QUESTION, ANSWER = Message("user", "Why is\nthe sky blue?"), Message("assistant", "Because.", reasoning="Hm.")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def test_nothing_is_written_before_something_is_said() -> None:
    new_chat("demo")
    assert not chats_dir().exists()


def test_a_conversation_is_found_again_as_it_was() -> None:
    chat = new_chat("demo:Q3_K_M", "Be brief.").said(QUESTION).said(ANSWER)
    found = find_chat(chat.id)
    assert found == chat
    assert (found.model, found.system, found.messages) == ("demo:Q3_K_M", "Be brief.", (QUESTION, ANSWER))
    assert found.title == "Why is the sky blue?"


def test_only_the_user_may_read_it() -> None:
    chat = new_chat("demo").said(QUESTION)
    assert chat.path.stat().st_mode & 0o777 == 0o600
    assert chat.path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_taken_back_is_gone_for_the_model_and_for_a_later_run() -> None:
    chat = new_chat("demo").said(QUESTION, ANSWER).taken_back(1).said(Message("assistant", "Scattering."))
    assert [m.text for m in chat.messages] == [QUESTION.text, "Scattering."]
    assert find_chat(chat.id) == chat


def test_a_line_torn_by_a_kill_costs_that_line_only() -> None:
    chat = new_chat("demo").said(QUESTION)
    with chat.path.open("a") as stream:
        stream.write('{"role": "assistant", "te')
    assert find_chat(chat.id).messages == (QUESTION,)
    assert find_chat(chat.id).said(ANSWER).messages == find_chat(chat.id).messages == (QUESTION, ANSWER)


def aged(name: str, seconds: int) -> Chat:
    chat = Chat(name, "demo", chats_dir() / f"{name}.jsonl").said(QUESTION)
    os.utime(chat.path, (seconds, seconds))
    return chat


def test_conversations_are_listed_the_latest_first_and_found_by_the_beginning_of_their_id() -> None:
    one, other = aged("20261101-120000-aaaa", 2_000), aged("20261101-120500-bbbb", 1_000)
    (chats_dir() / "stray.jsonl").write_text('["no chat"]\n')
    assert list_chats() == [one, other]
    assert find_chat("last") == one
    assert find_chat("20261101-1205") == other
    with pytest.raises(UsageError, match="several conversations"):
        find_chat("20261101")
    with pytest.raises(NotFoundError, match="no conversation 'x'"):
        find_chat("x")


def test_the_last_of_none_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="--chats"):
        find_chat("last")


def test_images_travel_inside_the_message(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(PNG)
    (system, asked) = request_messages("Be brief.", [Message("user", "What is it?", images=(str(image),))])
    assert system == {"role": "system", "content": "Be brief."}
    url = asked["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == PNG
    assert asked["content"][1] == {"type": "text", "text": "What is it?"}


def test_thoughts_are_not_sent_back() -> None:
    assert request_messages("", [QUESTION, ANSWER])[1] == {"role": "assistant", "content": "Because."}


def test_an_image_that_is_none_or_is_gone_is_told(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("no image")
    with pytest.raises(UsageError, match="no image"):
        request_messages("", [Message("user", "x", images=(str(text),))])
    with pytest.raises(NotFoundError, match=r"gone\.png"):
        request_messages("", [Message("user", "x", images=(str(tmp_path / "gone.png"),))])

"""The Chat room by keys, against a scripted llama-server: what it shows, what it keeps, and what goes wrong."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual import events
from textual.widgets import Input, Markdown

from dynrun.runtime.history import Message, list_chats, new_chat
from dynrun.tui.messages import Visit
from dynrun.tui.screens.chat import ChatScreen
from dynrun.tui.widgets.composer import Composer
from dynrun.tui.widgets.engine_card import EngineCard
from dynrun.tui.widgets.markdown_piece import MarkdownPiece
from dynrun.tui.widgets.message_view import MessageView
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, paste, running_app, screen_text, shows, type_text, wait_until
from tests.tui.scripted_server import DIE, GATE, RAW, Piece, Scripted, scripted_server

pytestmark = pytest.mark.tui


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_embd=32, n_block=1, n_ff=32, n_head=2, n_head_kv=1)


@asynccontextmanager
async def chatting(
    model: Path, *answers: list[Piece], size: tuple[int, int] = (80, 24)
) -> AsyncIterator[tuple[AppPilot, Scripted]]:
    """The app in a chat with a model that will say ``answers``."""
    with scripted_server(model, Scripted(list(answers))) as script:
        async with running_app(size, visit=Visit("chat", model=str(model))) as pilot:
            await wait_until(pilot, lambda: isinstance(pilot.app.screen, ChatScreen), "the room")
            await shows(pilot, "of 4k")
            yield pilot, script


async def ask(pilot: AppPilot, text: str) -> None:
    await type_text(pilot, text)
    await pilot.press("enter")


def views(pilot: AppPilot) -> list[MessageView]:
    return list(pilot.app.screen.query(MessageView))


async def answered(pilot: AppPilot, n_messages: int) -> None:
    """Until the conversation on disk has so many messages."""
    await wait_until(pilot, lambda: n_messages <= len(chat_of(pilot)), f"{n_messages} messages")


def chat_of(pilot: AppPilot) -> tuple[object, ...]:
    assert isinstance(pilot.app.screen, ChatScreen)
    return pilot.app.screen.chat.messages


async def test_what_is_typed_behind_enter_is_not_lost(model: Path) -> None:
    async with chatting(model, ["Hello."]) as (pilot, _):
        await type_text(pilot, "Hi")
        # As fast as a terminal hands them over: nothing is awaited in between.
        for key in (events.Key("enter", "\r"), events.Key("x", "x"), events.Key("y", "y")):
            pilot.app.post_message(key)
        await answered(pilot, 2)
        assert [m.text for m in list_chats()[0].messages] == ["Hi", "Hello."]
        assert pilot.app.screen.query_one(Composer).text == "xy"


async def test_control_characters_of_a_model_do_not_reach_the_terminal(model: Path) -> None:
    said = "be\x1bfore \x1b]0;title\x07 \x1bP \x9b31m \x7f**bold**\n\n```\n\x1b[2Jcode\x1b\n```\n\nafter"
    async with chatting(model, [("reasoning_content", "\x1b[1;1Hthought"), said]) as (pilot, _):
        await ask(pilot, "a\x1bsk")
        await shows(pilot, "after")
        await answered(pilot, 2)
        await shows(pilot, "tokens, ")
        await pilot.press("up", "t")
        await shows(pilot, "[1;1Hthought")
        text = screen_text(pilot)
        assert [c for c in text if c != "\n" and unicodedata.category(c) == "Cc"] == []
        for shown in ("before ]0;title P 31m bold", "[2Jcode"):
            assert shown in text
        assert list_chats()[0].messages[1].text == said, "what is kept is what was said"


async def test_an_answer_streams_with_its_thoughts_folded_and_is_kept(model: Path) -> None:
    pieces: list[Piece] = [
        ("reasoning_content", "Let me "),
        ("reasoning_content", "think."),
        "Hello ",
        (GATE, 0),
        "**you**",
    ]
    async with chatting(model, pieces) as (pilot, script):
        await ask(pilot, "Hi there")
        await shows(pilot, "Hello")
        assert [m.text for m in list_chats()[0].messages] == ["Hi there"], "kept before it is answered"
        script.gate.set()
        await answered(pilot, 2)
        await shows(pilot, "4 tokens, 100.0 a second")
        await shows(pilot, "Hello you")
        assert "Let me think." not in screen_text(pilot)
        kept = list_chats()[0].messages[1]
        assert (kept.text, kept.reasoning, kept.stop) == ("Hello **you**", "Let me think.", "end")
        await pilot.press("up", "t")
        await shows(pilot, "Let me think.")


async def test_the_screen_follows_a_long_answer_after_thoughts(model: Path) -> None:
    pieces: list[Piece] = [("reasoning_content", "Hm. "), *(f"Paragraph {n}\n\n" for n in range(40)), "The end."]
    async with chatting(model, pieces) as (pilot, _):
        await ask(pilot, "Talk")
        await shows(pilot, "The end.")
        await shows(pilot, "tokens, ")


async def test_enter_sends_and_ctrl_j_makes_a_line(model: Path) -> None:
    async with chatting(model, ["ok"]) as (pilot, script):
        await type_text(pilot, "one")
        await pilot.press("ctrl+j")
        await type_text(pilot, "two")
        await pilot.press("enter")
        await answered(pilot, 2)
        assert script.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


async def test_ctrl_c_stops_an_answer_and_what_came_is_kept(model: Path) -> None:
    async with chatting(model, ["Once upon", (GATE, 0), " a time"], ["again"]) as (pilot, _):
        await ask(pilot, "Tell me")
        await shows(pilot, "Once upon")
        await pilot.press("ctrl+c")
        await shows(pilot, "stopped")
        kept = list_chats()[0].messages[1]
        assert (kept.text, kept.stop) == ("Once upon", "cancelled")
        await pilot.press("ctrl+r")
        await shows(pilot, "again")
        assert [m.text for m in list_chats()[0].messages] == ["Tell me", "again"]


async def test_an_edited_question_branches_and_the_old_conversation_stays(model: Path) -> None:
    async with chatting(model, ["first"], ["second"], ["third"]) as (pilot, script):
        await ask(pilot, "a")
        await answered(pilot, 2)
        await ask(pilot, "b")
        await answered(pilot, 4)
        views(pilot)[0].focus()
        await pilot.press("e")
        await wait_until(pilot, lambda: pilot.app.screen.is_modal, "the question")
        await pilot.press("ctrl+j", "c")
        await paste(pilot, "d" * 3000)
        await pilot.press("enter")
        await shows(pilot, "third")
        changed = "a\nc" + "d" * 3000
        chats = {tuple(m.text for m in chat.messages) for chat in list_chats()}
        assert chats == {("a", "first", "b", "second"), (changed, "third")}
        assert [m["content"] for m in script.requests[-1]["messages"]] == [changed]


async def test_an_empty_answer_is_told(model: Path) -> None:
    async with chatting(model, []) as (pilot, _):
        await ask(pilot, "a")
        await shows(pilot, "the answer is empty")


async def test_conversations_are_found_by_what_was_said_and_go_on(model: Path) -> None:
    async with chatting(model, ["about llamas"], ["about bees"], ["more"]) as (pilot, script):
        await ask(pilot, "first")
        await answered(pilot, 2)
        await pilot.press("ctrl+n")
        await shows(pilot, "context 0 of 4k")
        await ask(pilot, "second")
        await answered(pilot, 2)
        await pilot.press("ctrl+l")
        await shows(pilot, "now second")
        await type_text(pilot, "llamas")
        await pilot.press("enter", "enter")
        await shows(pilot, "about llamas")
        assert "about bees" not in screen_text(pilot)
        await ask(pilot, "go on")
        await answered(pilot, 4)
        assert [m["content"] for m in script.requests[-1]["messages"]] == ["first", "about llamas", "go on"]


async def test_each_conversation_has_one_line_of_the_list() -> None:
    async with running_app((120, 40), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query("#chats"), "the room")
        for said in ("a long question " * 10, "short"):
            new_chat("m").said(Message("user", said))
        await pilot.press("ctrl+l")
        await shows(pilot, "now short")
        lines = [line for line in screen_text(pilot).splitlines() if "question" in line]
        assert len(lines) == 1
        assert "now a long question" in lines[0]
        assert "…" in lines[0]


async def test_a_long_paste_is_attached_and_backspace_takes_it_away(model: Path) -> None:
    async with chatting(model, ["ok"]) as (pilot, script):
        await paste(pilot, "x" * 5000)
        await shows(pilot, "[pasted text, 5,000 characters]")
        await pilot.press("backspace")
        await wait_until(pilot, lambda: "pasted text" not in screen_text(pilot), "it to go")
        await paste(pilot, "short")
        await paste(pilot, "y" * 3000)
        await pilot.press("enter")
        await answered(pilot, 2)
        assert script.requests[0]["messages"][0]["content"].endswith(f"{'y' * 3000}\n```\n\nshort")


async def test_copying_goes_to_the_terminal(model: Path) -> None:
    async with chatting(model, ["Text\n\n```python\nprint(1)\n```\n\n```\nprint(2)\n```\n"]) as (pilot, _):
        await ask(pilot, "code")
        await answered(pilot, 2)
        await pilot.press("up", "b")
        assert pilot.app.clipboard == "print(1)\n"
        await pilot.press("b")
        assert pilot.app.clipboard == "print(2)\n"
        await pilot.press("y")
        assert pilot.app.clipboard.startswith("Text\n")


async def test_system_prompt_and_sampling_are_sent(model: Path) -> None:
    async with chatting(model, ["ok"], size=(140, 40)) as (pilot, script):
        await pilot.press("ctrl+t")
        await type_text(pilot, "Be brief.")
        pilot.app.screen.query_one("#set-temperature", Input).value = "0.25"
        pilot.app.screen.query_one("#set-seed", Input).value = "7"
        pilot.app.screen.query_one("#set-top_p", Input).value = "7"
        await shows(pilot, "--top-p is 7.0")
        pilot.app.screen.query_one("#set-top_p", Input).value = ""
        await pilot.press("escape")
        await ask(pilot, "Hi")
        await answered(pilot, 2)
        sent = script.requests[0]
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (sent["temperature"], sent["seed"], "top_p" in sent) == (0.25, 7, False)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([(DIE, 0)], id="dies at once"),
        pytest.param(["Half an ", "answer", (DIE, 0)], id="dies in the middle"),
        pytest.param(["Half an ", "answer", (RAW, b"data: {broken\n\n")], id="malformed event"),
        pytest.param(["Half an ", "answer", (RAW, b'data: {"error": {"message": "no"}}\n\n')], id="error event"),
    ],
)
async def test_when_the_engine_fails_a_card_says_so_and_one_key_asks_again(model: Path, bad: list[Piece]) -> None:
    async with chatting(model, bad, ["well again"], size=(100, 40)) as (pilot, _):
        await ask(pilot, "Are you there")
        await wait_until(pilot, lambda: pilot.app.screen.query(EngineCard), "the card")
        await shows(pilot, "Nothing is lost")
        texts = [m.text for m in list_chats()[0].messages]
        assert texts == ["Are you there", *(["Half an answer"] if len(bad) > 1 else [])]
        await pilot.press("enter")
        await shows(pilot, "well again")
        assert [m.text for m in list_chats()[0].messages] == ["Are you there", "well again"]
        assert not pilot.app.screen.query(EngineCard)


async def test_slow_tokens_and_a_very_long_answer_lose_nothing(model: Path) -> None:
    def words() -> Iterator[Piece]:
        yield "slow"
        yield (GATE, 0)
        for n in range(20_000):
            yield f" w{n}" if n % 100 else f"\n\nParagraph {n}:"

    async with chatting(model, list(words())) as (pilot, script):
        await ask(pilot, "count")
        await shows(pilot, "slow")
        script.gate.set()
        await wait_until(pilot, lambda: len(chat_of(pilot)) == 2, "the end", 120)
        whole = "".join(piece for piece in words() if isinstance(piece, str))
        assert list_chats()[0].messages[1].text == whole
        pieces = list(views(pilot)[1].query(MarkdownPiece))
        assert "".join(piece.text for piece in pieces) == whole
        await wait_until(pilot, lambda: pieces[0].asleep and not pieces[0].children, "what is far to sleep")
        assert pieces[-1].query_one(Markdown).source == pieces[-1].opener + pieces[-1].text
        await shows(pilot, "w19999")


async def test_many_messages_are_laid_out_as_they_are_asked_for(model: Path) -> None:
    async with chatting(model, ["answer"]) as (pilot, _):
        for n in range(13):
            await ask(pilot, f"q{n}")
            await answered(pilot, 2 * n + 2)
        chat = list_chats()[0]
        assert len(chat.messages) == 26
        await pilot.press("ctrl+l")
        await shows(pilot, "now q0")
        await pilot.press("enter", "enter")
        await wait_until(pilot, lambda: len(views(pilot)) == 20, "the last twenty")
        views(pilot)[0].focus()
        await pilot.press("up", "enter")
        await wait_until(pilot, lambda: len(views(pilot)) == 26, "all")


async def test_panels_take_the_place_of_the_conversation_where_there_is_no_room(model: Path) -> None:
    async with chatting(model, ["ok"]) as (pilot, _):
        for key, text in (("ctrl+t", "system prompt"), ("ctrl+l", "search what was said")):
            await pilot.press(key)
            await shows(pilot, text)
            assert "Ask something" not in screen_text(pilot)
        assert "system prompt" not in screen_text(pilot)
        await pilot.press("ctrl+l")
        await shows(pilot, "Ask something")
        await ask(pilot, "Hi")
        await shows(pilot, "ok")

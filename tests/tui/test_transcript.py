"""Long conversations: documents in pieces that read as one, of which only those near the screen have widgets."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.widgets import Markdown

from dynrun.runtime.history import Message, new_chat
from dynrun.tui.messages import Visit
from dynrun.tui.widgets.growing_markdown import GrowingMarkdown, cut, parts
from dynrun.tui.widgets.markdown_piece import MarkdownPiece
from dynrun.tui.widgets.transcript import Transcript
from tests.tui.driving import AppPilot, one, running_app, screen_text, shows, wait_until

pytestmark = pytest.mark.tui
CODE = "".join(f"x{n} = {n}\n" for n in range(3000))


def test_a_document_is_cut_at_an_empty_line_outside_of_any_fence() -> None:
    assert cut("one\n\ntwo") == (5, "")
    assert cut("one\n\n    indented") == (0, "")
    assert cut("one\n\n```\na\n\nb\n```\nc") == (5, "")
    assert cut("no place") == (0, "")


def test_a_long_fence_is_cut_at_a_line_and_opened_again() -> None:
    assert cut("```python\na\nb\nc") == (14, "```python\n")
    assert cut("a\nb", "~~~~ js\n") == (0, "")
    assert cut("aaaaaa\nb\nc", "~~~~\n") == (9, "~~~~\n")
    assert cut("  ```\na\nb\nc") == (0, ""), "it belongs to a list"
    found = list(parts(f"Before\n\n```python\n{CODE}```\n\nAfter"))
    assert {opener for _, opener in found[2:]} == {"```python\n"}
    assert all(len(text) < 6_100 for text, _ in found)


WORDS = st.sampled_from(["word ", "\n", "\n\n", "```\n", "~~~~ py\n", "- a\n", "    x\n", "é" * 900])


@given(st.lists(WORDS, max_size=60))
def test_parts_are_the_whole_text(words: list[str]) -> None:
    text = "".join(words)
    assert "".join(part for part, _ in parts(text)) == text


def awake(pilot: AppPilot) -> list[MarkdownPiece]:
    return [piece for piece in pilot.app.screen.query(MarkdownPiece) if not piece.asleep]


async def test_only_what_is_near_the_screen_has_widgets_wherever_one_looks() -> None:
    answers = [f"Begin {n}\n\n" + "".join(f"Paragraph {n}.{i}\n\n" for i in range(200)) + f"End {n}" for n in range(8)]
    messages = [Message(*said) for n, text in enumerate(answers) for said in (("user", f"q{n}"), ("assistant", text))]
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        transcript = one(pilot, "#transcript", Transcript)
        await transcript.show(new_chat("m").said(*messages))
        await shows(pilot, "End 7")
        await wait_until(pilot, lambda: 0 < len(awake(pilot)) <= 4, "the rest to sleep")
        transcript.scroll_home(animate=False)
        await shows(pilot, "Begin 0")
        await wait_until(pilot, lambda: 0 < len(awake(pilot)) <= 4, "the end to sleep")
        assert len(transcript.query(Markdown)) == len(awake(pilot))
        transcript.scroll_end(animate=False)
        await shows(pilot, "End 7")


async def test_what_is_read_stays_where_it_is_when_what_is_above_wakes() -> None:
    # Lists are higher than they are thought to be, tables lower.
    text = "".join(f"- item {n}\n\n  more of it\n\n" if n % 2 else f"para {n}\ngoes on\n\n" for n in range(400))
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        transcript = one(pilot, "#transcript", Transcript)
        await transcript.show(new_chat("m").said(Message("user", "q"), Message("assistant", f"{text}The end")))
        await shows(pilot, "The end")
        for _ in range(12):
            before = screen_text(pilot).splitlines()[4]
            transcript.scroll_relative(y=-5, animate=False)
            await pilot.pause()
            await pilot.app.workers.wait_for_complete()
            await pilot.pause()
            assert before == screen_text(pilot).splitlines()[9]


async def test_an_answer_that_ends_before_it_was_ever_laid_out_is_seen() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        transcript = one(pilot, "#transcript", Transcript)
        for ended in (True, False):
            view = await transcript.add(0, Message("assistant", ""), "m")
            # As between two layouts of a screen that is slow.
            transcript._changed = True
            if ended:
                await view.grow("again", "")
                await view.finish(Message("assistant", "again"), "")
                await transcript._wake_what_is_near()
            else:
                await transcript._wake_what_is_near()
                await view.grow("again", "")
            await shows(pilot, "again")
            await pilot.app.workers.wait_for_complete()
            await pilot.pause()
            assert screen_text(pilot).count("again") == 1
            await view.remove()


async def test_an_answer_that_begins_far_from_the_screen_is_there_once() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        transcript = one(pilot, "#transcript", Transcript)
        long = "".join(f"Paragraph {i}\n\n" for i in range(100))
        await transcript.show(
            new_chat("m").said(Message("user", "q"), Message("assistant", long), Message("user", "r"))
        )
        await shows(pilot, "Paragraph 99")
        view = await transcript.add(3, Message("assistant", ""), "m")
        transcript.scroll_home(animate=False)
        await wait_until(pilot, lambda: view.query_one(MarkdownPiece).asleep, "the answer to sleep")
        await view.grow("It begins", "")
        transcript.scroll_end(animate=False)
        await shows(pilot, "It begins")
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()
        assert screen_text(pilot).count("It begins") == 1


async def test_what_is_near_is_looked_at_where_it_is_however_late_it_gets_there() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        transcript = one(pilot, "#transcript", Transcript)
        long = "".join(f"Paragraph {i}\n\n" for i in range(400))
        await transcript.show(new_chat("m").said(Message("user", "q"), Message("assistant", long)))
        await shows(pilot, "Paragraph 399")
        transcript.scroll_to(y=0, animate=False, immediate=True)
        # It has other things to do: its screen is at rest before it hears of the scrolling.
        transcript.call_later(asyncio.sleep, 0.3)
        await shows(pilot, "Paragraph 0")
        await wait_until(pilot, lambda: transcript.query(MarkdownPiece).last().asleep, "the end to sleep")


async def test_a_long_block_of_code_grows_in_pieces_that_look_as_one() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        view = await one(pilot, "#transcript", Transcript).add(0, Message("assistant", ""), "m")
        whole = f"```python\n{CODE[:12_000]}"
        for at in range(0, len(whole), 500):
            await view.grow(whole[at : at + 500], "")
        await view.finish(Message("assistant", whole), "")
        assert one(pilot, "GrowingMarkdown", GrowingMarkdown).text == whole
        await shows(pilot, whole.splitlines()[-1])
        pieces = list(pilot.app.screen.query(MarkdownPiece))
        assert len(pieces) > 4
        for piece in pieces[1:3]:
            assert piece.size.height == len(piece.text.splitlines()), "no gap between it and those beside it"
        assert all(line.startswith(" ▎   x") for line in screen_text(pilot).splitlines()[1:10]), "indented as the first"

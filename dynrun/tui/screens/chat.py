"""Talking to a model: conversations that are kept, answers that stream, an engine that may die and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.dom import DOMNode

from dynrun.errors import DynrunError
from dynrun.runtime.history import Chat, Message, list_chats, new_chat
from dynrun.runtime.sampling import Sampling
from dynrun.tui import conversing
from dynrun.tui.chatting import AnswerEnded, AnswerGrew, Engine, EngineFailed, EngineNote, EngineReady, stats
from dynrun.tui.jobs import Job, start_job, stop_jobs
from dynrun.tui.messages import JobDone, JobFailed, Visit
from dynrun.tui.screens.confirm import ConfirmScreen
from dynrun.tui.screens.prompt import PromptScreen, RewriteScreen
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.widgets.attachments import Attachments
from dynrun.tui.widgets.chat_list import ChatList
from dynrun.tui.widgets.chat_settings import ChatSettings
from dynrun.tui.widgets.chat_status import ChatStatus
from dynrun.tui.widgets.composer import Composer
from dynrun.tui.widgets.engine_card import EngineCard
from dynrun.tui.widgets.message_view import MessageView
from dynrun.tui.widgets.transcript import Transcript
from dynrun.tui.words import model_name

if TYPE_CHECKING:
    from dynrun.runtime.placement import Placement

ENGINE, ANSWER, CHATS = "chat.engine", "chat.answer", "chat.chats"


class ChatScreen(RoomScreen):
    """One conversation in front, one engine behind it."""

    MODE = "chat"
    CSS_PATH = "chat.tcss"
    KEYED: ClassVar[tuple[type[DOMNode], ...]] = (MessageView, Composer, EngineCard, ChatList)
    HELP = """
# Chat

**Enter** sends, **Shift+Enter** or **Ctrl+J** makes a new line; **Ctrl+C** stops an answer, or copies what is selected.
**Up** leaves the question for the messages above it: there `e` edits a question and branches off a new conversation
(the old one is kept), `r` answers again, `y` copies, `b` copies the next block of code, `t` unfolds thoughts.

A long paste and files (**Ctrl+G**) are attached; Backspace in an empty question takes the last one away. Everything
that was said is on disk before it is answered.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+n", "new", "New chat", id="chat.new"),
        Binding("ctrl+r", "again", "Again", id="chat.again"),
        Binding("ctrl+l", "chats", "Chats", id="chat.chats"),
        Binding("ctrl+t", "settings", "Settings", id="chat.settings"),
        Binding("ctrl+g", "attach", "Attach", id="chat.attach"),
        Binding("ctrl+s", "model", "Model", id="chat.model"),
        Binding("escape", "compose", "Write", show=False, id="chat.compose"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.chat: Chat = new_chat("")
        self._engine: Engine | None = None
        self._sampling = Sampling()
        self._answering: MessageView | None = None
        self._vision = False

    def body(self) -> ComposeResult:
        with Horizontal(id="chat-panes"):
            yield ChatList(id="chats")
            with Vertical(id="talk"):
                yield Transcript(id="transcript")
                yield Attachments()
                yield Composer()
                yield ChatStatus(id="chat-status")
            yield ChatSettings(id="chat-settings")

    def on_mount(self) -> None:
        for panel in ("#chats", "#chat-settings"):
            self._show_panel(panel, shown=False)
        self.query_one(Composer).focus()

    # Models and conversations

    async def visit(self, visit: Visit) -> None:
        if visit.model:
            await self._open_chat(new_chat(visit.model, self.chat.system), visit.placement)
        if visit.path is not None:
            self.query_one(Attachments).add_file(visit.path)
        self.query_one(Composer).focus()

    async def _open_chat(self, chat: Chat, placement: Placement | None = None) -> None:
        """Put ``chat`` in front; the engine is kept where the model is the same."""
        self.stop()
        self.chat, self._answering = chat, None
        self.query_one(ChatSettings).show_system(chat.system)
        await self.query_one(Transcript).show(chat)
        self.query_one(ChatStatus).begin(chat.model)
        if self._engine is None or self._engine.model != chat.model or placement is not None:
            self._change_engine(chat.model, placement)

    def _change_engine(self, model: str, placement: Placement | None) -> None:
        former, self._engine = self._engine, Engine(model, placement) if model else None
        self.query_one(ChatStatus).reset()
        engine = self._engine

        def work(job: Job) -> None:
            if former is not None:
                former.close()
            if engine is not None:
                engine.start(job)

        start_job(self, work, group=ENGINE, name=model)

    def _show_chats(self) -> None:
        if self.query_one(ChatList).display:
            start_job(self, lambda _: list_chats(), group=CHATS, exclusive=True)

    def on_job_done(self, message: JobDone) -> None:
        if message.group == CHATS:
            self.query_one(ChatList).show(message.result)

    @on(ChatList.Chosen)
    async def _chosen(self, message: ChatList.Chosen) -> None:
        await self._open_chat(message.chat)
        if self.has_class("-narrow"):
            self._show_panel("#chats", shown=False)
        self.query_one(Composer).focus()

    @on(ChatList.Unwanted)
    def _unwanted(self, message: ChatList.Unwanted) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                message.chat.path.unlink(missing_ok=True)
                self._show_chats()

        self.app.push_screen(ConfirmScreen(f"Delete the conversation {message.chat.title!r}?", "Delete"), answered)

    @on(ChatSettings.Changed)
    def _settings_changed(self, message: ChatSettings.Changed) -> None:
        self._sampling = message.sampling
        if message.system != self.chat.system and not self._busy:
            self.chat = conversing.changed(self.chat, system=message.system)

    # Questions and answers

    @property
    def _busy(self) -> bool:
        return self._answering is not None

    @on(Composer.Sent)
    async def _sent(self, message: Composer.Sent) -> None:
        attachments = self.query_one(Attachments)
        if self._busy or not (message.text.strip() or attachments.held):
            return
        if self._engine is None:
            await self.action_model()
            return
        question = conversing.question(message.text.strip(), attachments.held)
        if question.images and not self._vision:
            self.notify("this model has no image encoder (mmproj) beside it", severity="warning")
            return
        self.query_one(Composer).taken(message.text)
        attachments.drop_all()
        await self._say(question)

    async def _say(self, question: Message) -> None:
        """Keep the question, show it, have it answered."""
        try:
            self.chat = await asyncio.to_thread(self.chat.said, question)
        except DynrunError as error:
            self.notify(str(error), severity="error")
            return
        await self.query_one(Transcript).add(len(self.chat.messages) - 1, question, "you")
        await self._answer()

    async def _answer(self) -> None:
        engine, chat = self._engine, self.chat
        if engine is None or not chat.messages or chat.messages[-1].role != "user":
            return
        transcript = self.query_one(Transcript)
        await transcript.drop_cards()
        index = len(chat.messages)
        self._answering = await transcript.add(index, Message("assistant", ""), model_name(chat.model))
        sampling = self._sampling
        start_job(
            self,
            lambda job: engine.ask(job, chat.messages, chat.system, sampling),
            group=ANSWER,
            name=chat.id,
        )

    async def on_answer_grew(self, message: AnswerGrew) -> None:
        view = self._answering
        if view is None:
            return
        if message.restarted:
            await view.restart()
        await view.grow(message.text, message.thought)
        self.query_one(ChatStatus).growing(message.n_tokens, message.n_per_second)

    async def on_answer_ended(self, message: AnswerEnded) -> None:
        view, self._answering = self._answering, None
        answer = message.answer
        said = Message("assistant", answer.text, answer.reasoning, stop=answer.stop)
        if view is None:
            return
        if answer.text or answer.reasoning:
            self.chat = await asyncio.to_thread(self.chat.said, said)
            await view.finish(said, stats(answer))
        else:
            await view.remove()
            self.notify("the answer is empty", timeout=3)
        self.query_one(ChatStatus).ended(answer)
        self._show_chats()

    async def on_engine_failed(self, message: EngineFailed) -> None:
        """A card in the place of the answer; what came of it is kept."""
        view, self._answering = self._answering, None
        if view is not None:
            if message.partial:
                said = Message("assistant", message.partial, stop="died")
                self.chat = await asyncio.to_thread(self.chat.said, said)
                await view.finish(said, "")
            else:
                await view.remove()
        self.query_one(ChatStatus).note = ""
        await self.query_one(Transcript).add_card(EngineCard(message))
        # What is dead is not asked again.
        if self._engine is not None:
            self._engine = Engine(self._engine.model, self._engine.placement)

    @on(EngineCard.Retry)
    async def _retry(self) -> None:
        await self.query_one(Transcript).drop_cards()
        if self.chat.messages and self.chat.messages[-1].stop == "died":
            self.chat = await asyncio.to_thread(self.chat.taken_back, 1)
            await self.query_one(Transcript).show(self.chat)
        if self.chat.messages and self.chat.messages[-1].role == "user":
            await self._answer()
        elif self._engine is not None:
            self._change_engine(self._engine.model, self._engine.placement)
        self.query_one(Composer).focus()

    def on_engine_note(self, message: EngineNote) -> None:
        self.query_one(ChatStatus).note = message.text

    def on_engine_ready(self, message: EngineReady) -> None:
        self._vision = message.vision
        self.query_one(ChatStatus).n_ctx = message.n_ctx
        self.query_one(ChatSettings).recommended(message.metadata)

    def on_job_failed(self, message: JobFailed) -> None:
        self._answering = None
        self.notify(message.message, severity="error", timeout=10)

    @on(MessageView.Wanted)
    async def _wanted(self, message: MessageView.Wanted) -> None:
        if self._busy:
            self.notify("an answer is being given; Ctrl+C stops it", timeout=2)
        elif message.what == "edit":
            self._edit(message.index)
        else:
            await self._again(message.index)

    def _edit(self, index: int) -> None:
        """Ask again what was asked, in other words, in a conversation of its own."""
        chat = self.chat
        at = index if chat.messages[index].role == "user" else index - 1
        if at < 0:
            return

        async def edited(text: str | None) -> None:
            if text:
                question = replace(chat.messages[at], text=text)
                await self._open_chat(conversing.branched(chat, at))
                await self._say(question)

        self.app.push_screen(RewriteScreen("Another question in its place:", chat.messages[at].text), edited)

    async def _again(self, index: int) -> None:
        """Have the question at or before ``index`` answered again; later messages are taken back, or branched off."""
        after = index + 1 if self.chat.messages[index].role == "user" else index
        if after < len(self.chat.messages) - 1:
            await self._open_chat(conversing.branched(self.chat, after))
        elif after < len(self.chat.messages):
            self.chat = await asyncio.to_thread(self.chat.taken_back, len(self.chat.messages) - after)
            await self.query_one(Transcript).show(self.chat)
        await self._answer()

    # Attachments

    @on(Composer.Pasted)
    def _pasted(self, message: Composer.Pasted) -> None:
        self.query_one(Attachments).add(message.attachment)

    @on(Composer.Emptied)
    def _emptied(self) -> None:
        self.query_one(Attachments).drop_last()

    @on(Composer.Up)
    def _up(self) -> None:
        views = self.query_one(Transcript).query(MessageView)
        if views:
            views.last().focus()

    # Keys

    def stop(self) -> bool:
        if self._answering is None or self._engine is None:
            return False
        self._engine.cancel()
        return True

    async def leave(self) -> None:
        engine, self._engine = self._engine, None
        stop_jobs(self, ENGINE)
        if engine is not None:
            await asyncio.to_thread(engine.close)

    async def action_new(self) -> None:
        await self._open_chat(new_chat(self.chat.model, self.chat.system))
        self.query_one(Composer).focus()

    async def action_again(self) -> None:
        if self.chat.messages and not self._busy:
            await self._again(len(self.chat.messages) - 1)

    def action_chats(self) -> None:
        self._toggle("#chats", "#chat-search")
        self._show_chats()

    def action_settings(self) -> None:
        self._toggle("#chat-settings", "#system")

    def _toggle(self, panel: str, first: str) -> None:
        shown = not self.query_one(panel).display
        self._show_panel(panel, shown=shown)
        (self.query_one(first) if shown else self.query_one(Composer)).focus()

    def _show_panel(self, panel: str, *, shown: bool) -> None:
        """Where there is no room for more, one panel takes the place of the conversation."""
        panels = {name: self.query_one(name) for name in ("#chats", "#chat-settings")}
        for name, other in panels.items():
            if name == panel or (shown and self.has_class("-narrow")):
                other.display = shown and name == panel
        self.set_class(any(one.display for one in panels.values()), "-panel")

    def action_compose(self) -> None:
        self.query_one(Composer).focus()

    def action_attach(self) -> None:
        def named(text: str | None) -> None:
            if text:
                self.query_one(Attachments).add_file(Path(text).expanduser())

        self.app.push_screen(PromptScreen("File to attach (text or an image):"), named)

    async def action_model(self) -> None:
        """Another model, in the same conversation."""
        from dynrun.models import list_models

        async def named(text: str | None) -> None:
            if text:
                await self._open_chat(conversing.changed(self.chat, model=text))

        known = [listed.name for listed in await asyncio.to_thread(list_models)]
        self.app.push_screen(PromptScreen("Talk to which model?", known, self.chat.model), named)

    def commands(self) -> Iterable[SystemCommand]:
        yield SystemCommand("Export the conversation", "as a Markdown file", self._export)
        yield SystemCommand("Copy the conversation", "as Markdown", self._copy_all)

    def _copy_all(self) -> None:
        self.app.copy_to_clipboard(conversing.as_markdown(self.chat))

    def _export(self) -> None:
        from dynrun.artifacts import write_text

        def named(text: str | None) -> None:
            if not text:
                return
            try:
                write_text(Path(text).expanduser(), conversing.as_markdown(self.chat))
            except (DynrunError, OSError) as error:
                self.notify(str(error), severity="error")
            else:
                self.notify(f"written to {text}")

        self.app.push_screen(PromptScreen("Write it to:", value=str(Path.cwd() / f"{self.chat.id}.md")), named)

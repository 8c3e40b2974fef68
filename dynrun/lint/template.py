"""The chat template: is there one, does it render, do its turns end where the model stops?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.template import ChatTemplate, template_of
from dynrun.errors import DynrunError
from dynrun.lint.finding import Finding, Subject, shown
from dynrun.lint.tokens import control_tokens, ends_a_turn

KEY = "tokenizer.chat_template"
_ANSWER = "The answer is 4."
# What looks like a special token and is none where the vocabulary has it not.
_MARKS = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_turn>")


def check_template(subject: Subject) -> Iterator[Finding]:
    """Rendered in a child process, as llama-server would."""
    source = subject.header.metadata.get(KEY)
    if source is None:
        expected = "a template, unless the model is a base model: without one chats are given as plain text"
        yield Finding("template-missing", "warning", KEY, expected, "none")
        return
    if not isinstance(source, str) or not source.strip():
        yield Finding("template-empty", "error", KEY, "a Jinja template", shown(source))
        return
    with template_of(subject.header, subject.token("bos"), subject.token("eos")) as template:
        try:
            asked = template.render(_conversation(answered=False), add_generation_prompt=True)
            bare = template.render(_conversation(answered=False))
            answered = template.render(_conversation(answered=True))
        except DynrunError as error:
            yield Finding("template-broken", "error", KEY, "it renders", shown(error.message))
            return
        yield from _system(template)
    if asked == bare:
        yield Finding("template-no-prompt", "warning", KEY, "a beginning of the answer (add_generation_prompt)", "none")
    yield from _content(asked, answered)
    yield from _marks(subject, answered)
    yield from _turn_end(subject, answered)
    bos = subject.token("bos")
    if bos and answered.startswith(bos * 2):
        yield Finding("template-bos-twice", "warning", KEY, f"{shown(bos)} once", "twice")


def _conversation(*, answered: bool, system: bool = False) -> Conversation:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    if system:
        messages.insert(0, {"role": "system", "content": "Answer in one sentence."})
    if answered:
        messages += [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": "And 3 + 3?"}]
    return Conversation("lint", "lint", messages)


def _system(template: ChatTemplate) -> Iterator[Finding]:
    try:
        text = template.render(_conversation(answered=False, system=True))
    except DynrunError as error:
        yield Finding("template-system", "warning", KEY, "it takes a system message", shown(error.message))
        return
    if "Answer in one sentence." not in text:
        yield Finding("template-system", "warning", KEY, "it takes a system message", "it leaves it out")


def _content(asked: str, answered: str) -> Iterator[Finding]:
    if "What is 2 + 2?" not in asked or _ANSWER not in answered:
        yield Finding("template-content", "error", KEY, "every message's text", "it leaves messages out")


def _marks(subject: Subject, text: str) -> Iterator[Finding]:
    known = set(subject.tokens)
    unknown = sorted({mark for mark in _MARKS.findall(text) if mark not in known})
    if unknown and known:
        found = f"{', '.join(unknown[:4])}, no tokens of its vocabulary"
        yield Finding("template-unknown-token", "warning", KEY, "special tokens of the vocabulary", shown(found))


def _turn_end(subject: Subject, text: str) -> Iterator[Finding]:
    """The first special token behind an answer must be one that llama.cpp stops at, or the model talks on."""
    behind = text.partition(_ANSWER)[2].partition("And 3 + 3?")[0]
    places = [(behind.find(token), -len(token), token) for token in control_tokens(subject) if token in behind]
    if not places:
        return
    token = min(places)[2]
    if not ends_a_turn(subject, token):
        eos = subject.token("eos")
        expected = f"{shown(token)} as EOS or EOT: the template ends answers with it"
        yield Finding("eot-mismatch", "error", "tokenizer.ggml.eos_token_id", expected, shown(eos or "none"))

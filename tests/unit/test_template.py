"""Chat templates: rendered in a sandbox, the simpler form where a template refuses, plain text without one."""

from __future__ import annotations

import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.template import ChatTemplate
from dynrun.errors import DynrunError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}"
)
TALK = Conversation(
    "t",
    "everyday",
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ],
)


def test_a_conversation_is_rendered_by_the_models_template() -> None:
    assert ChatTemplate(CHATML).render(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )


def test_without_a_template_the_text_is_plain() -> None:
    assert ChatTemplate(None).render(TALK) == "Be brief.\n\nHi\n\nHello.\n"


def test_a_template_that_refuses_system_roles_gets_the_simpler_form() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert "<|im_start|>user\nBe brief.\n\nHi<|im_end|>" in ChatTemplate(strict).render(TALK)


def test_a_template_that_refuses_everything_is_an_error_that_names_the_conversation() -> None:
    with pytest.raises(DynrunError, match="conversation t: never"):
        ChatTemplate("{{ raise_exception('never') }}").render(TALK)


def test_bos_and_dates_are_the_same_every_day() -> None:
    template = ChatTemplate("{{ bos_token }}{{ strftime_now('%Y') }}", bos="<s>")
    assert template.render(TALK) == "<s>2026"


def test_tool_calls_are_written_out_for_templates_that_know_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = Conversation(
        "c", "tools", [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    assert '{"name": "add", "arguments": {"a": 1}}' in ChatTemplate(CHATML).render(talk)


def test_json_in_templates_is_not_escaped_for_html() -> None:
    assert (
        ChatTemplate("{{ messages[0]['content'] | tojson }}").render(
            Conversation("j", "x", [{"role": "user", "content": "a < b & c"}])
        )
        == '"a < b & c"'
    )


def test_a_template_cannot_reach_internals() -> None:
    with pytest.raises(DynrunError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(TALK)


def test_broken_jinja_is_one_line() -> None:
    with pytest.raises(DynrunError, match="not valid Jinja"):
        ChatTemplate("{% for %}")

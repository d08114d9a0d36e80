"""Chat templates: as transformers renders them, and what hostile ones can cost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shoal.runtime.errors import InvalidRequest
from shoal.runtime.template import ChatTemplate

from ..tiny import TEMPLATE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": ["<&'"]}}}]
CHAT = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "1 < 2 & 'é' 👍\n"},
    {"role": "assistant", "content": "<think>hm</think> yes"},
    {"role": "user", "content": "why?"},
]

# Idioms of real models' templates, each in a template of its own.
TEMPLATES = {
    "chatml": TEMPLATE,
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] | trim %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
        "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (sys if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' ~ message.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "qwen3": (
        "{%- set ns = namespace(last=-1, seen=false) %}\n"
        "{%- for m in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if not ns.seen and m.role == 'user' and m.content is string %}\n"
        "        {%- set ns.seen = true %}{%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for m in messages %}\n    {%- if m.role == 'assistant' and '</think>' in m.content %}\n"
        "        {{- m.content.split('</think>')[-1].lstrip('\\n') }}\n"
        "    {%- else %}{{- '<' + m.role + '>' + m.content.replace('\\n', ' ') + (ns.last | string) }}{%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}{{- 'A:' }}{%- endif %}"
    ),
    "tools": (
        "{% if tools is not none and tools is defined %}{% for t in tools %}{{ t | tojson }}\n"
        "{{ t.function | tojson(indent=2) }}{% endfor %}{% endif %}"
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
    "macro": (
        "{% macro show(m, tail='') %}{% generation %}[{{ m.role | upper }}] {{ m['content'] | trim }}{{ tail }}"
        "{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ show(m, tail='|') }}{% endfor %}"
        "{% set text %}{{ messages[0].content | indent(2) }}{% endset %}{{ text }}"
        "{{ '%s-%d' | format('a', 3) }} {{ 'x{}y{:02d}'.format(1, 2) }} {{ '{a}'.format_map({'a': 1}) }}"
        "{{ ['a', 'b'] + ['c'] }} {{ {'k': (1, 2)}.items() | list }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_as_transformers_renders_it(name: str, generate: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[CHAT], tools=TOOLS, chat_template=TEMPLATES[name], add_generation_prompt=generate, **SPECIAL
    )
    got = ChatTemplate(TEMPLATES[name], SPECIAL).render(CHAT, tools=TOOLS, add_generation_prompt=generate)
    assert got == expected[0]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_the_last_message_can_be_continued_as_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [*CHAT, {"role": "assistant", "content": "Because "}]
    expected, _ = render_jinja_template(
        conversations=[chat], chat_template=TEMPLATES[name], continue_final_message=True, **SPECIAL
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    got = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert got == expected[0]
    assert got.endswith("Because ")
    with pytest.raises(InvalidRequest, match="exclude"):
        template.render(chat, continue_final_message=True)


def test_a_stripped_last_message_is_continued_stripped() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }};{% endfor %}")
    chat = [{"role": "assistant", "content": " so far \n"}]
    assert template.render(chat, add_generation_prompt=False, continue_final_message=True) == "so far"
    silent = ChatTemplate("{{ messages | length }}")
    with pytest.raises(InvalidRequest, match="continued"):
        silent.render(chat, add_generation_prompt=False, continue_final_message=True)


def test_parts_and_roles() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "developer", "content": parts}]) == "system=a\nb;"
    assert template.render([{"role": "tool", "content": "4"}]) == "tool=4;"
    knows = ChatTemplate("{% if messages[0].role == 'developer' %}dev{% endif %}")
    assert knows.render([{"role": "developer", "content": "x"}]) == "dev"
    calls = ChatTemplate("{{ messages[0].content is none }}{{ messages[0].tool_calls | length }}")
    assert calls.render([{"role": "assistant", "content": None, "tool_calls": [{}]}]) == "True1"


@pytest.mark.parametrize(
    "messages",
    [
        [], "hi", [1], [{}], [{"role": "wizard", "content": "x"}], [{"role": ["user"], "content": "x"}],
        [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        ChatTemplate(TEMPLATE).render(messages)


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(CHAT)


def test_kwargs_reach_the_template_but_replace_nothing_of_ours() -> None:
    template = ChatTemplate("{{ enable_thinking is false }}{{ messages | length }}")
    assert template.render(CHAT, template_kwargs={"enable_thinking": False}) == "True4"
    for name in ("messages", "raise_exception", "__class__", "a b"):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            template.render(CHAT, template_kwargs={name: 1})


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x", "{% for %}", "{% include 'x' %}{% endfor %}", "(" * 10 + "{{" + "(" * 5000]
)
def test_a_broken_template_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        ChatTemplate(source).render(CHAT)


DOUBLE = "".join("{% set x = " + op + " %}" for op in ["x ~ x"] * 60)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": LOOPS.replace("BODY", "{% set x = a %}"),
    "idle loops": LOOPS.replace("BODY", "").replace("for b in range(99999)", "for b in range(99999) if b < 0"),
    "output": LOOPS.replace("BODY", "0123456789"),
    "captured": "{% set x %}" + LOOPS.replace("BODY", "0123456789") + "{% endset %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "times": "{{ 'a' * 10000000000 }}",
    "times nested": "{% set x = 'a' * 100000 %}{% set x = x * 100000 %}{{ x }}",
    "lists": "{% set x = [0] * 10000000000 %}",
    "power": "{{ 9 ** 99999 }}",
    "product": "{% set ns = namespace(x=3) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "concat": "{% set x = 'ab' %}" + DOUBLE,
    "plus": "{% set x = 'ab' %}" + DOUBLE.replace("~", "+"),
    "list plus": "{% set x = [1] %}" + DOUBLE.replace("~", "+"),
    "block set": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "laughs": "{% set x = [1] %}" + DOUBLE.replace("x ~ x", "[x, x]") + "{{ x }}",
    "dict laughs": "{% set x = {} %}" + DOUBLE.replace("x ~ x", "{'a': x, 'b': x}") + "{{ x | tojson }}",
    "tuple laughs": "{% set x = (1,) %}" + DOUBLE.replace("x ~ x", "(x, x)") + "{{ x == x }}",
    "namespace laughs": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "ljust filter": "{{ 'a' | center(9999999999) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "format star": "{{ '%*d' % (9999999999, 1) }}",
    "str format": "{{ '{:>9999999999}'.format(1) }}",
    "str format nested": "{{ '{:>{w}}'.format(1, w=9999999999) }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x * 1000) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x | replace('a', x * 1000) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(range(99999) | map('string')) }}",
    "join filter": "{% set x = 'a' * 1000000 %}{{ range(99999) | join(x) }}",
    "indent": "{{ '\n' * 10000000 | indent('a' * 10000000) }}",
    "tojson indent": "{{ [1] | tojson(indent=1000000000) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "range": "{{ range(10000000000) | list }}",
    "to_bytes": "{{ (1).to_bytes(10000000000) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "mutate": "{{ messages.append(1) }}",
    "ns": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "ns call": "{{ namespace(__a=1) }}",
    "type": "{{ dict.fromkeys([1]) }}",
    "import": "{% import 'os' as os %}",
    "types": "{{ 1 + 'a' }}",
    "zero": "{{ 1 / 0 }}",
    "missing": "{{ missing.attribute }}",
    "unhashable": "{{ {[]: 1} }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_with_the_requests_error(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match="chat template") as error:
        ChatTemplate(HOSTILE[name], time_limit_s=0.3, max_characters=2**20).render(CHAT)
    assert time.monotonic() - start < 2
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ '' | attr('__class__') }}", "{{ ''.__class__ }}", "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}", "{{ ''.format.__globals__ }}", "{{ messages.__init__ }}", "{{ (1).real }}",
    ],
)  # fmt: skip
def test_nothing_of_python_is_seen(source: str) -> None:
    assert ChatTemplate(source).render(CHAT) == ""


def test_a_long_conversation_is_no_attack() -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": f"line {i}\n" * 100} for i in range(1000)]
    for source in (TEMPLATES["chatml"], TEMPLATES["qwen3"]):
        assert len(ChatTemplate(source, SPECIAL).render(chat)) > 500_000

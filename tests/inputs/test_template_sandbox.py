"""A chat template is untrusted code: it is stopped early, takes little memory and raises one clear error."""

import threading
import time

import pytest

from llava_fast.errors import CheckpointError, RequestError
from llava_fast.inputs.chat.rendering import checkpoint_template
from llava_fast.inputs.chat.sandbox import MOST_SOURCE, PROMPT, CompiledTemplate, TemplateLimitError

LONG = "takes longer than any prompt needs"
LARGE = "makes more text than any prompt has"
WIDE = "a width of more than"
DIGITS = "numbers of more than"
REPEATED = "{{% set ns = namespace(x={start}) %}}{{% for i in range(100) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"


def repeated(start, step):
    """`step` a hundred times, then the value."""
    return REPEATED.format(start=start, step=step)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # time
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", LONG),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(99) }}", LONG),
        ("{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}", LONG),
        # text
        ("{{ 'a' * 10 ** 10 }}", LARGE),
        ("{{ 10000000000 * 'a' }}", LARGE),  # a constant, which Jinja would compute while compiling
        ("{% set x = [0] * 10 ** 10 %}", LARGE),
        ("{{ 'a'.encode() * 10 ** 10 }}", LARGE),
        (repeated("'aaaa'", "{% set ns.x = ns.x + ns.x %}"), LARGE),
        (repeated("'aaaa'", "{% set ns.x = ns.x ~ ns.x %}"), LARGE),
        (repeated("'aaaa'", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"), LARGE),
        (repeated("[1]", "{% set ns.x = ns.x + ns.x %}"), LARGE),
        ("{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}", LARGE),
        (
            "{% macro m() %}" + "x" * 10000 + "{% endmacro %}{% for i in range(9999) %}{% set x = m() %}{% endfor %}",
            LARGE,
        ),
        ("{{ 'a' | center(10000000000) }}", LARGE),
        ("{{ 'a'.zfill(10000000000) }}", LARGE),
        ("{{ 'a\n' | indent(10000000000) }}", LARGE),
        ("{{ [1, 2] | tojson(indent=10000000000) }}", LARGE),
        ("{{ [1] | batch(10000000000, 0) | list }}", LARGE),
        ("{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}", LARGE),
        ("{% set x = 'a' * 99999 %}{{ ([x] * 9999) | join(x) }}", LARGE),
        ("{% set x = 'a' * 99999 %}{{ x.join([x] * 9999) }}", LARGE),
        ("{{ ([[0] * 1000] * 4000) | sum(start=[]) }}", LARGE),
        # a list within a list: few references, text without end
        (repeated("[1]", "{% set ns.x = [ns.x, ns.x] %}"), LARGE),
        (repeated("(1,)", "{% set ns.x = (ns.x, ns.x) %}"), LARGE),
        (repeated("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"), LARGE),
        (repeated("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}"), "writes out a namespace"),
        # widths and numbers
        ("{{ '{:10000000000}'.format(1) }}", WIDE),
        ("{{ '{:{}}'.format('a', 10000000000) }}", WIDE),
        ("{{ '%10000000000d' % 1 }}", WIDE),
        ("{{ '%*d' % (10000000000, 1) }}", WIDE),
        ("{{ '%10000000000d' | format(1) }}", WIDE),
        ("{{ 9 ** (9 ** 9) }}", DIGITS),
        (repeated("10", "{% set ns.x = ns.x * ns.x %}"), DIGITS),
        ("{{ 1.5 | round(1000000000, 'ceil') }}", "rounds to more than"),
        # what Jinja's or Python's compiler refuses
        ("a" * (MOST_SOURCE + 1), "characters, more than"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "not valid Jinja"),
        ("{{ 1 | nonsense }}", "not valid Jinja"),
    ],
)
def test_a_template_without_end_is_refused_when_it_is_loaded(source, message):
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=message):
        checkpoint_template(source, {})
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    "source", ["{% for i in range(10 ** 12) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_what_jinja_and_python_bound_themselves(source):
    with pytest.raises(RequestError, match="rejects these messages"):
        checkpoint_template(source, {}).render([{"role": "user", "content": "Hi"}])


def test_a_template_that_is_slow_only_later_is_stopped_when_it_renders():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Yo"},
    ]
    template = checkpoint_template("{% if messages | length > 1 %}{{ 'a' * 10 ** 9 }}{% endif %}", {})
    assert template.render(turns[:1]) == ""
    with pytest.raises(RequestError, match=LARGE):
        template.render(turns)


def test_the_bound_holds_in_any_thread_and_ends_with_a_rendering():
    compiled = CompiledTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}done")
    found = []

    def run(size):
        try:
            found.append(compiled.render({"n": size}, type(PROMPT)(0.05, 1000))[0])
        except TemplateLimitError as error:
            found.append(str(error))

    threads = [threading.Thread(target=run, args=(size,)) for size in (99999, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(found) == ["done", f"it {LONG}"]
    run(3)
    assert found[-1] == "done"


def test_long_conversations_are_rendered():
    """As long as the longest contexts: nothing here comes near a bound."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% for item in m.content %}"
        "{% if item.type == 'text' %}{{ item.text.split('</think>')[-1].replace('<|im_end|>', '<|end|>') | trim }}"
        "{% endif %}{% endfor %}{% if loop.index0 == messages | length - 1 %}<|last|>{% endif %}<|im_end|>{% endfor %}"
    )
    turns = [{"role": role, "content": f"{'word ' * 800}."} for role in ("user", "assistant")] * 250
    text = checkpoint_template(source, {}).render(turns)
    assert text.count("word") == 800 * 500
    assert text.endswith("<|last|><|im_end|>")

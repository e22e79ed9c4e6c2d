"""A chat template that nobody vouches for: no rendering takes long or much memory, whatever it does (control C08)."""

import threading
import time
import tracemalloc

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from fastchat.models.template_sandbox import MAX_TEMPLATE_CPU_S, TemplateSandbox

MIB = 2**20

SILENT_LOOPS = {
    "nested loops over one list": "{% set l = range(3000)|list %}{% for a in l %}{% for b in l %}{% for c in l %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops that only assign": "{% set n = namespace(i=0) %}{% set l = 'x' * 9999 %}{% for a in l %}{% for b in l %}"
    "{% for c in l %}{% set n.i = n.i + 1 %}{% endfor %}{% endfor %}{% endfor %}",
    "a filter in a loop": "{% set l = range(9000)|list %}{% for a in l %}{% for b in l %}{% set x = l|sort|length %}"
    "{% endfor %}{% endfor %}",
    "a loop with a test that is never true": "{% set l = range(9999)|list %}{% for a in l %}{% for b in l if b < 0 %}"
    "{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{% set x = m(60) %}",
    "a recursive loop": "{% set l = [1, 2] %}{% for a in l recursive %}{% if loop.depth < 60 %}{% set x = loop(l) %}"
    "{% endif %}{% endfor %}",
    "ranges in ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a method in a loop": "{% set t = 'x' * 60000 %}{% set l = range(9999)|list %}{% for a in l %}{% for b in l %}"
    "{% set x = t.count('xx') %}{% endfor %}{% endfor %}",
}

LARGE_VALUES = {
    "a product": "{{ 'x' * 10**9 }}",
    "a product of a product": "{% set t = 'x' * 60000 %}{{ t * 60000 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "sums that double": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "joins that double": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "lists that double": "{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "replace": "{% set t = 'x' * 60000 %}{{ t.replace('x', t)|length }}",
    "replace as a filter": "{% set t = 'x' * 60000 %}{{ t|replace('x', t)|length }}",
    "replace by nothing": "{% set t = 'x' * 60000 %}{{ t|replace('', t)|length }}",
    "join": "{% set t = 'x' * 60000 %}{{ (range(9999)|list)|join(t)|length }}",
    "join with a keyword": "{% set t = 'x' * 60000 %}{{ (range(9999)|list)|join(d=t)|length }}",
    "join as a method": "{% set t = 'x' * 60000 %}{{ t.join(t)|length }}",
    "join of one text often": "{% set t = 'x' * 60000 %}{% set l = [t] * 9999 %}{{ ''.join(l)|length }}",
    "padding": "{{ 'x'.ljust(10**9)|length }}",
    "padding by a power of ten": "{{ 'x'.zfill(1000000000)|length }}",
    "centred": "{{ 'x'|center(1000000000)|length }}",
    "indented": "{{ ('\n' * 60000)|indent(60000, true)|length }}",
    "tabs": "{{ ('\t' * 60000).expandtabs(1000000)|length }}",
    "a format": "{{ '{:1000000000}'.format(1)|length }}",
    "a format with a width that is given": "{{ '{:{}}'.format(1, 1000000000)|length }}",
    "a format of old": "{{ ('%1000000000d' % 1)|length }}",
    "a format of old with a width that is given": "{{ ('%*d' % (1000000000, 1))|length }}",
    "a format as a filter": "{{ '%1000000000d'|format(1)|length }}",
    "a format of one text often": "{% set t = 'x' * 60000 %}{{ ('{0}' * 9999).format(t)|length }}",
    "JSON with a wide indent": "{{ [1]|tojson(indent=1000000000)|length }}",
    "batches": "{{ ([1]|batch(1000000000, 'x')|list)|length }}",
    "slices": "{{ ([1]|slice(1000000000, 'x')|list)|length }}",
    "many large texts": "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set n.l = n.l + ['x' * 60000 ~ i] %}{% endfor %}",
}


def render(template):
    sandbox = TemplateSandbox()
    sandbox.add_filter("tojson", lambda value, indent=None: jinja2.utils.htmlsafe_json_dumps(value, indent=indent))
    return sandbox.render_within_limits(sandbox.from_string(template))


@pytest.mark.parametrize("name", SILENT_LOOPS)
def test_a_template_that_loops_and_writes_nothing_is_stopped(name):
    """By the clock of its own thread, so that a busy machine stops no good template."""
    began = time.thread_time()
    with pytest.raises(SecurityError, match=r"more than .* (seconds|turns)"):
        render(SILENT_LOOPS[name])
    assert time.thread_time() - began < 3 * MAX_TEMPLATE_CPU_S


@pytest.mark.parametrize("name", LARGE_VALUES)
def test_a_template_that_makes_something_large_is_stopped_before_it_is_made(name):
    """What it holds at most stays far below what it asked for."""
    tracemalloc.start()
    try:
        with pytest.raises((SecurityError, TypeError, ValueError)):
            render(LARGE_VALUES[name])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 400 * MIB


def test_endless_recursion_is_an_error_like_others():
    """Python's own limit ends it; the format answers it as a refusal."""
    with pytest.raises((RecursionError, SecurityError)):
        render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ ['b'] }}", "a1None['b']"),
        ("{{ ['a', 'b']|join(', ') }}{{ ', '.join(['a', 'b']) }}{{ ['a', 'b']|join }}", "a, ba, bab"),
        ("{{ [{'k': 1}, {'k': 2}]|join('-', attribute='k') }}", "1-2"),
        ("{{ 'a%s%d' % ('b', 1) }}{{ '%s!'|format('c') }}{{ '{}-{:>3}'.format(1, 2) }}", "ab1c!1-  2"),
        ("{{ 7 % 4 }}{{ 2 * 3 }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 1 + 1 }}", "36abab[1, 2]2"),
        ("{{ 'a b'.replace(' ', '_')|upper }}{{ 'x'|indent(2, true) }}", "A_B  x"),
        ("{% for a in [1, 2] recursive %}{{ a }}{% if a == 1 %}{{ loop([5]) }}{% endif %}{% endfor %}", "152"),
        ("{% for a in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for a in range(3) if a %}{{ loop.index }}{% endfor %}", "12"),
        ("{{ [3, 1]|sort|map('string')|list|last }}", "3"),
    ],
)
def test_what_templates_do_every_day_is_as_ever(template, text):
    assert render(template) == jinja2.Environment(autoescape=False).from_string(template).render() == text


def test_each_rendering_has_a_budget_of_its_own():
    """One after another in a thread, and at once in several."""
    sandbox = TemplateSandbox()
    template = sandbox.from_string("{% for i in range(900) %}{{ 'x' ~ i }}{% endfor %}")
    lengths = []

    def work():
        lengths.extend(len(sandbox.render_within_limits(template)) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [len("".join(f"x{i}" for i in range(900)))] * 12

"""Control C08: what a checkpoint's chat template may do."""

from __future__ import annotations

import ast
import time

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from fastchat.models.template_sandbox import MAX_TEMPLATE_CPU_S, TemplateSandbox
from tests.processes import ROOT

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages.append.__self__.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro')() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ['{0.__class__.__mro__}']|map('format', '')|list }}",
    "{{ (''|attr('format'))('{0.__class__}') .__class__ }}",
    "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% set f = range.__self__ %}{{ f }}{{ f.eval('1') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% extends '/etc/passwd' %}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_c08_no_template_leaves_its_sandbox(template):
    """Refused, or a text in which nothing of Python's inside is seen; the messages stay as they were."""
    messages = [{"role": "user", "content": "hi"}]
    sandbox = TemplateSandbox()
    try:
        text = sandbox.render_within_limits(sandbox.from_string(template), messages=messages)
    except (TemplateError, TypeError, LookupError):
        text = ""
    assert not any(word in text for word in ("<class", "object at", "root:", "uid=", "builtins"))
    assert messages == [{"role": "user", "content": "hi"}]


def test_c08_a_template_that_does_not_end_is_stopped():
    """By its own thread's clock."""
    sandbox = TemplateSandbox()
    began = time.thread_time()
    with pytest.raises(SecurityError):
        sandbox.render_within_limits(
            sandbox.from_string("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}")
        )
    assert time.thread_time() - began < 3 * MAX_TEMPLATE_CPU_S


def test_c08_there_is_one_sandbox():
    """No other file makes an environment of Jinja's."""
    makers = {
        path.name
        for path in (ROOT / "src" / "fastchat").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
        and ast.unparse(node).rpartition(".")[2]
        in ("Environment", "SandboxedEnvironment", "ImmutableSandboxedEnvironment")
        and "jinja2" in path.read_text()
    }
    assert makers == {"template_sandbox.py"}

"""docs/operators.md says what is there: metrics, exit codes, flags, and an example file that is obeyed."""

from __future__ import annotations

import re

import pytest

from fastchat.ops.metrics import ControllerMetrics, GatewayMetrics, WorkerMetrics
from fastchat.serve import arguments
from fastchat.serve.launch import create_serve_parser
from fastchat.serve.option_kind import key_of, options_of, variable_of
from fastchat.serve.settings import resolve
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "operators.md").read_text()


def test_every_metric_is_on_the_page_and_none_else():
    """Ours; the ones about the process and the platform are Prometheus' own."""
    rendered = b"".join(
        metrics.render() for metrics in (WorkerMetrics(["m"]), GatewayMetrics(["/r"]), ControllerMetrics())
    )
    families = set(re.findall(r"^# TYPE (fastchat_\w+) ", rendered.decode(), re.MULTILINE))
    shown = {name for name in families if not name.endswith("_created")}
    assert shown == set(re.findall(r"`(fastchat_[a-z0-9_]*[a-z])`", PAGE))


def test_every_exit_code_is_on_the_page():
    """With the meaning beside it."""
    codes = {0, *(value for name, value in vars(arguments).items() if name.startswith("EXIT_"))}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == codes


def test_named_flags_and_variables_are_real():
    """Whatever the page calls by name."""
    options = options_of(create_serve_parser())
    flags = {f"--{key_of(action)}" for action in options}
    variables = {variable_of(action) for action in options}
    own = {"--config", "--json", "--name", "--expires", "--worker-address"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= flags | own
    special = {"FASTCHAT_CONFIG", "FASTCHAT_STATE_DIR", "FASTCHAT_API_KEYS_FILE"}
    assert set(re.findall(r"FASTCHAT_[A-Z_]*[A-Z]", PAGE)) <= variables | special


@pytest.mark.parametrize("uncommented", [False, True])
def test_example_file_is_obeyed(tmp_path, uncommented):
    """Also with its comments taken away from what they hide."""
    text = (ROOT / "deploy" / "config.toml").read_text()
    if uncommented:
        text = re.sub(r"^# (?=\[\[|[a-z-]+ = )", "", text, flags=re.MULTILINE)
    file = tmp_path / "config.toml"
    file.write_text(text)
    values = resolve(create_serve_parser(), [], {}, default_file=file).values
    assert values.model_names[0] == ("chatglm2-6b", "gpt-3.5-turbo")
    assert len(values.model_path) == (2 if uncommented else 1)

"""Laws of settings: flag > environment > file > default, from the parser's own definitions."""

from __future__ import annotations

import re

import pytest

from fastchat.errors import ConfigFileError
from fastchat.serve.arguments import exit_code_of
from fastchat.serve.launch import create_serve_parser
from fastchat.serve.model_worker import create_model_worker_parser
from fastchat.serve.multi_model_worker import model_specs
from fastchat.serve.openai_api_server import create_api_server_parser
from fastchat.serve.option_kind import key_of, options_of, refusal_of, variable_of
from fastchat.serve.settings import resolve, without_options

MODELS = '[[models]]\npath = "/m/a"\nnames = ["a", "b"]\n[[models]]\npath = "/m/c"\nconv-template = "chatglm2"\n'


@pytest.fixture
def settings(tmp_path):
    """What `fastchat serve` would do."""

    def resolved(text="", *flags, parser=None, **environment):
        file = tmp_path / "config.toml"
        file.write_text(text, encoding="utf-8")
        return resolve(parser or create_serve_parser(), flags, environment, default_file=file)

    return resolved


def test_nearer_places_win(settings):
    """Each place overrides the ones after it, and the origin says which it was."""
    flag, variable, file = ("--port", "1"), {"FASTCHAT_PORT": "2"}, "port = 3"
    for number, origin, given in (
        (1, "flag", settings(file, *flag, **variable)),
        (2, "environment FASTCHAT_PORT", settings(file, **variable)),
        (3, "config.toml", settings(file)),
        (8000, "default", settings()),
    ):
        assert given.values.port == number
        assert given.origins["port"].endswith(origin)


def test_without_anything_the_values_are_argparse_s():
    """The layer adds nothing of its own; a default that is a text is read like one."""
    for parser, flags in ((create_serve_parser(), []), (create_model_worker_parser(), ["--model-path", "x"])):
        plain = vars(parser.parse_args(flags))
        assert vars(resolve(parser, flags, {}).values) == plain


def test_every_type_of_value_can_stand_in_a_file(settings):
    """As TOML has it: numbers, texts, truth values, lists, sizes."""
    text = (
        'host = "0.0.0.0"\napi-keys = ["one", "two"]\nmax-gpu-memory = "13GiB"\nkv-cache-memory = 1000\nssl = true\n'
        'seed = -7\ndtype = "float32"\ndebug = true\nallowed-origins = ["https://a,b"]\ncluster-token-file = "/t"\n'
    )
    values = settings(text).values
    assert (values.host, values.api_keys, values.max_gpu_memory) == ("0.0.0.0", ["one", "two"], 13 * 2**30)
    assert (values.kv_cache_memory, values.ssl, values.seed, values.dtype) == (1000, True, -7, "float32")
    assert (bool(values.debug), values.allowed_origins, str(values.cluster_token_file)) == (True, ["https://a,b"], "/t")


def test_paths_may_begin_at_home(settings, tmp_path, monkeypatch):
    """In a file no shell puts the folder in its place; a secret's file is named by a variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text("one\ntwo\n")
    text = 'cluster-token-file = "~/token"\ngradio-auth-path = "~/accounts"'
    values = settings(text, FASTCHAT_API_KEYS_FILE="~/keys").values
    assert values.cluster_token_file == tmp_path / "token"
    assert values.gradio_auth_path == tmp_path / "accounts"
    assert values.api_keys == ["one", "two"]


def test_file_may_begin_with_a_byte_order_mark(settings):
    """As some editors write UTF-8."""
    assert settings("\ufeffport = 3").values.port == 3


def test_every_type_of_value_can_stand_in_the_environment(settings):
    """As one would write it after the flag; truth values as people write them."""
    environment = {
        "FASTCHAT_API_KEYS": "one,two",
        "FASTCHAT_MAX_GPU_MEMORY": "13GiB",
        "FASTCHAT_SSL": "yes",
        "FASTCHAT_EMBED_IN_TRUNCATE": "0",
        "FASTCHAT_DEBUG": "false",
        "FASTCHAT_SEED": "-7",
        "FASTCHAT_MODEL_PATH": "/m/a",
    }
    values = settings("ssl = false\nembed-in-truncate = true", **environment).values
    assert (values.api_keys, values.max_gpu_memory) == (["one", "two"], 13 * 2**30)
    assert (values.ssl, values.embed_in_truncate, bool(values.debug)) == (True, False, False)
    assert (values.seed, values.model_path) == (-7, ["/m/a"])


def test_yes_means_the_same_everywhere(settings):
    """`no-web = true` starts no page, as `--no-web`; so for every flag without a value."""
    for action in options_of(create_serve_parser()):
        if action.nargs == 0 and refusal_of(action) is None:
            given = [settings(f"{key_of(action)} = true"), settings("", f"--{key_of(action)}")]
            given.append(settings("", **{variable_of(action): "1"}))
            assert [getattr(each.values, action.dest) for each in given] == [True, True, True], action.dest
            assert getattr(settings(f"{key_of(action)} = false").values, action.dest) is False


def test_list_may_be_empty_but_not_that_of_the_keys(settings):
    """No hosts, no networks, no names; an empty list of keys must not open a server."""
    values = settings("allowed-hosts = []\nallowed-workers = []\npin = []\nallowed-methods = []").values
    assert (values.allowed_hosts, values.allowed_workers, values.pin, values.allowed_methods) == ([], [], (), [])
    with pytest.raises(ConfigFileError, match="api-keys: give keys"):
        settings("api-keys = []")


def test_models_are_tables(settings):
    """Each with its own names and format, as repeated flags would give them."""
    specs = model_specs(settings(MODELS).values)
    assert [(str(spec.path), spec.names, spec.conv_template) for spec in specs] == [
        ("/m/a", ("a", "b"), None),
        ("/m/c", (), "chatglm2"),
    ]


def test_models_of_the_command_line_replace_those_of_the_file(settings):
    """All of them: names and formats of the file belong to its own paths."""
    given = settings(MODELS, "--model-path", "/m/z")
    (spec,) = model_specs(given.values)
    assert (str(spec.path), spec.names, spec.conv_template) == ("/m/z", (), None)
    assert given.origins["model_path"] == "flag"


def test_required_flag_may_come_from_elsewhere(settings, capsys):
    """A worker's --model-path stands in its file or environment; where it is nowhere, the parser asks for it."""
    parser = create_model_worker_parser()
    assert settings('model-path = "/m/a"', parser=parser).values.model_path == "/m/a"
    assert settings(parser=parser, FASTCHAT_MODEL_PATH="/m/b").values.model_path == "/m/b"
    with pytest.raises(SystemExit) as ended:
        settings(parser=parser)
    assert ended.value.code == 2
    assert "--model-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "prot is not a setting; did you mean port?"),
        ("max_context = 1", "did you mean max-context?"),
        ("zzzz = 1", "known are adapter-dir, adapter-memory, allow-credentials,"),
        ('port = "8000"', 'port must be a whole number, not the text "8000"'),
        ("port = true", "port must be a whole number, not true"),
        ("port = 99999", "99999 is not a port"),
        ("ssl = 1", "ssl must be true or false, not 1"),
        ("host = 1", "host must be a text in quotation marks, not 1"),
        ('api-keys = "a"', "api-keys must be a list of texts"),
        ('api-keys = ["a,b"]', "without commas"),
        ("api-keys = [1]", "api-keys must be a list of texts"),
        ("max-gpu-memory = 1.5", 'such as "13GiB", or a number of bytes, not 1.5'),
        ('dtype = "int3"', "dtype: 'int3' is not one of 'auto'"),
        ("seed = 2020-01-01", "not a date or time"),
        ("x =", "is not TOML"),
        ("port = 1\nport = 2", "is not TOML"),
        ("models = 3", "write [[models]] before the keys of each model"),
        ("[models]\npath = 'x'", "write [[models]] before the keys of each model"),
        ("[[models]]\nnames = ['a']", "models[1].path is missing"),
        (
            "[[models]]\npath = 'x'\n[[models]]\npaht = 'x'",
            "models[2].paht is not a setting; did you mean models[2].path?",
        ),
        ("[[models]]\npath = 7", "models[1].path must be a text"),
        ("model-path = 'x'", "write a table [[models]] with path"),
        ("xft-dtype = 'fp16'", "xft-dtype is not supported: there is no xFasterTransformer engine"),
    ],
)
def test_what_a_file_says_wrong_is_told_with_what_to_write(settings, text, words):
    """The message names the file; exit code 78."""
    with pytest.raises(ConfigFileError) as told:
        settings(text)
    assert words in told.value.message
    assert "config.toml" in told.value.message
    assert exit_code_of(told.value) == 78


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("FASTCHAT_PORT", "tcp://10.0.0.1:8000", "FASTCHAT_PORT: 'tcp://10.0.0.1:8000' is not a port"),
        ("FASTCHAT_SSL", "maybe", "FASTCHAT_SSL: 'maybe' is not true or false"),
        ("FASTCHAT_SEED", "x", "FASTCHAT_SEED: 'x' is not a whole number"),
        ("FASTCHAT_XFT_DTYPE", "fp16", "FASTCHAT_XFT_DTYPE is not supported"),
        ("FASTCHAT_CONFIG", "/nonexistent.toml", "/nonexistent.toml: No such file"),
        ("FASTCHAT_API_KEYS_FILE", "/nonexistent", "FASTCHAT_API_KEYS_FILE: cannot read /nonexistent"),
    ],
)
def test_variable_that_cannot_be_obeyed_is_named(settings, name, text, words):
    """Not a default, and not ignored."""
    with pytest.raises(ConfigFileError, match=re.escape(words)):
        settings(**{name: text})


def test_other_file_is_named_by_flag_or_variable(settings, tmp_path):
    """The flag wins; an empty variable means none at all."""
    for name, number in (("one.toml", 1), ("two.toml", 2)):
        (tmp_path / name).write_text(f"port = {number}")
    one, two = str(tmp_path / "one.toml"), str(tmp_path / "two.toml")
    assert settings("port = 3", "--config", one, FASTCHAT_CONFIG=two).values.port == 1
    assert settings("port = 3", FASTCHAT_CONFIG=two).values.port == 2
    assert settings("port = 3", FASTCHAT_CONFIG="").values.port == 8000


def test_secret_may_lie_in_a_file(settings, tmp_path):
    """As containers hand them over; one key a line."""
    (tmp_path / "keys").write_text("one\ntwo\n")
    given = settings(parser=create_api_server_parser(), FASTCHAT_API_KEYS_FILE=str(tmp_path / "keys"))
    assert given.values.api_keys == ["one", "two"]


def test_children_hear_nothing_twice():
    """Variables of flags are taken out of their environment; those that are no flags stay."""
    environment = {
        "FASTCHAT_PORT": "1",
        "FASTCHAT_API_KEYS_FILE": "x",
        "FASTCHAT_CONFIG": "x",
        "FASTCHAT_STATE_DIR": "s",
        "FASTCHAT_CLUSTER_TOKEN": "t",
        "PATH": "p",
    }
    assert set(without_options(environment, create_serve_parser())) == {
        "FASTCHAT_STATE_DIR",
        "FASTCHAT_CLUSTER_TOKEN",
        "PATH",
    }

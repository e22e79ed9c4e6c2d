"""How both worker commands run, once their flags are read."""

from __future__ import annotations

import argparse
import gc
import signal

from fastchat.config import read_environment
from fastchat.errors import EngineError
from fastchat.ops.logs import configure_logging, log_arguments
from fastchat.serve.arguments import log_level, tls_files, warn_of_plain_listener
from fastchat.serve.http_server import bind_listeners, run_server
from fastchat.serve.worker_arguments import obey_early_flags, worker_config
from fastchat.worker.config import ModelSpec
from fastchat.worker.model_groups import group_models


def run_worker(process_name: str, arguments: argparse.Namespace, models: tuple[ModelSpec, ...]) -> int:
    """Serve until a signal ends it; returns the exit code. A taken port is told before a model is loaded."""
    configure_logging(process_name, level=log_level(arguments))
    log_arguments(arguments)
    obey_early_flags(arguments)
    environment = read_environment()
    tls = tls_files(arguments, environment)
    listeners = bind_listeners(arguments.host, arguments.port)
    warn_of_plain_listener(arguments)
    config = worker_config(arguments, environment, listeners, models)
    group_models(models)
    # torch and transformers take seconds to import: what is wrong with flags, port or folders is told before.
    from fastchat.worker.app import create_worker_app
    from fastchat.worker.life_cycle import WorkerRuntime

    # Freeing a model takes a collection of all objects, during which nothing runs. What was imported stays anyway: left
    # out, a collection takes milliseconds instead of a fifth of a second.
    gc.freeze()
    app = create_worker_app(config, end_process=lambda: signal.raise_signal(signal.SIGTERM))
    runtime: WorkerRuntime = app.state.runtime
    exit_code = run_server(
        app, listeners, tls=tls, on_stop=runtime.drain, drain_s=arguments.drain_timeout, has_websockets=False
    )
    if runtime.has_failed:
        raise EngineError("an engine died, and with it this worker; the log above has the cause, start it again.")
    return exit_code

"""`fastchat serve`: controller, API server, workers and the page in one go, kept running until Ctrl-C.

One worker process for each model: when one dies the others answer on. A process costs about 0.4 GB of memory beside its
model. Memory is planned for all of them before anything is started, and each worker is told its share. Models that do
not fit together have one worker, in which they take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import structlog

from fastchat.cluster.watcher import TableWatcher
from fastchat.config import PAGE_KEY_VARIABLE, config_file, internal_url, parse_port, read_environment
from fastchat.errors import ConfigError, UnavailableError
from fastchat.ops.key_store import STORE_FILE_NAME, has_keys, new_key
from fastchat.ops.logs import configure_logging
from fastchat.serve import controller, gradio_web_server, openai_api_server, worker_arguments
from fastchat.serve.arguments import (
    add_address_flags,
    add_security_flags,
    cluster_token,
    create_parser,
    flag_type,
    log_level,
    run_command,
    tls_files,
)
from fastchat.serve.demo_model import find_demo_model
from fastchat.serve.http_server import Listeners, bind_listeners
from fastchat.serve.multi_model_worker import create_multi_model_worker_parser, model_specs
from fastchat.serve.posture import harden_process
from fastchat.serve.settings import add_config_flag, parse_settings, without_options
from fastchat.supervisor.front_door import wait_until_ready
from fastchat.supervisor.service_manager import READY, STOPPING, tell_service_manager
from fastchat.supervisor.supervisor import Outcome, ProcessSpec, Supervisor
from fastchat.supervisor.worker_watch import WorkerWatch
from fastchat.worker.memory_remedy import plan_or_refuse
from fastchat.worker.model_groups import BASE_MARK, ModelGroup, group_models, planned_group

INTERNAL_HOST = "localhost"
"""Only the API server is for others."""
ANY_PORTS = range(22_000, 32_000)
"""Below those that kernels hand out by themselves: from 32768 on by Linux, from 49152 on by others."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedWorker:
    """One worker process and its models; `memory_flags` tell it what is planned for it."""

    groups: tuple[ModelGroup, ...]
    memory_flags: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of its models."""
        return tuple(name for group in self.groups for name in group.all_names)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens, for as long as the command runs; `workers` are in the order of the workers."""

    api: int
    controller: int
    workers: tuple[int, ...]
    web: int | None = None


def create_serve_parser() -> argparse.ArgumentParser:
    """The command's flags: its own, and those of the processes that it starts."""
    parser = create_parser(
        "launch",
        "Start everything: controller, API server, a worker for each model, the page; what dies is started again.",
        epilog="Listens on this machine only; --host 0.0.0.0 opens the API server to others, and --api-keys decides to "
        "whom; --web-host and --gradio-auth-path do the same for the page. Controller and workers stay on this "
        "machine. Without --model-path a tiny demo model is served.",
    )
    parser.prog = "fastchat serve"
    worker_arguments.add_model_flags(parser, is_repeatable=True, default_model="the tiny demo model")
    add_address_flags(parser, port=openai_api_server.DEFAULT_PORT)
    for what, default, note in (
        ("controller", controller.DEFAULT_PORT, ""),
        ("worker", worker_arguments.DEFAULT_PORT, "; further workers take the ports after it"),
    ):
        parser.add_argument(
            f"--{what}-port",
            type=flag_type(parse_port),
            default=default,
            metavar="PORT",
            help=f"port of the {what}, 0 for any free one{note} (default: {default})",
        )
    openai_api_server.add_access_flags(parser)
    openai_api_server.add_arena_flags(parser)
    controller.add_allowed_workers_flag(parser)
    gradio_web_server.add_serve_flags(parser)
    worker_arguments.add_pin_flag(parser)
    worker_arguments.add_serving_flags(parser)
    add_security_flags(parser)
    add_config_flag(parser, default="~/.config/fastchat/config.toml, if there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit code."""
    arguments = parse_settings(create_serve_parser(), argv, default_file=config_file())
    configure_logging("serve", level=log_level(arguments))
    worker_arguments.obey_early_flags(arguments)
    environment = read_environment()
    tls_files(arguments, environment)
    harden_process()
    token = cluster_token(arguments, environment)
    workers = _served_workers(arguments)
    ports = _choose_ports(arguments, len(workers))
    outcome = asyncio.run(_supervise(arguments, workers, ports, token))
    if outcome.error is not None:
        sys.stderr.write(f"error: {outcome.error}\n")
    return outcome.exit_code


async def _supervise(
    arguments: argparse.Namespace, served: Sequence[ServedWorker], ports: Ports, token: str
) -> Outcome:
    specs = process_specs(arguments, served, ports)

    async def announce_and_watch(names: Sequence[str]) -> None:
        api_url = internal_url(arguments.host, ports.api, tls=arguments.ssl)
        await wait_until_ready(api_url, sum(spec.is_worker and set(spec.model_names) <= set(names) for spec in specs))
        needs_key = bool(arguments.api_keys) or has_keys(read_environment().state_dir / STORE_FILE_NAME)
        block = ready_block(api_url, names, has_keys=needs_key, page_url=_page_url(arguments, ports))
        with suppress(OSError, AttributeError):  # nobody reads it any more, or it was closed: then it is None
            sys.stdout.write(block)
            sys.stdout.flush()
        tell_service_manager(READY)
        watcher = TableWatcher(controller_address=_internal(ports.controller), token=token)
        workers = [spec.name for spec in specs if spec.is_worker]
        names_by_address = {_internal(port): name for port, name in zip(ports.workers, workers, strict=True)}
        async with watcher.keep_open():
            await WorkerWatch(names_by_address, supervisor.replace).follow(watcher)

    supervisor = Supervisor(
        specs, on_ready=announce_and_watch, environment=_child_environment(), drain_s=arguments.drain_timeout
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored by `nohup`: then it stays ignored
            loop.add_signal_handler(number, partial(_stop, supervisor))
    return await supervisor.run()


def _child_environment() -> dict[str, str]:
    """Ours without the variables that stand for flags: what they say has been heard here and is handed on."""
    parsers = (
        create_serve_parser(),
        controller.create_controller_parser(),
        openai_api_server.create_api_server_parser(),
        create_multi_model_worker_parser(),
    )
    return without_options(os.environ, *parsers)


def _stop(supervisor: Supervisor) -> None:
    tell_service_manager(STOPPING)
    supervisor.stop()


def process_specs(
    arguments: argparse.Namespace, served: Sequence[ServedWorker], ports: Ports
) -> tuple[ProcessSpec, ...]:
    """What runs. Stopped in this order: page and API server finish what they relay, workers, who knows them."""
    security = ["--cluster-token-file", str(arguments.cluster_token_file)] if arguments.cluster_token_file else []
    controller_flags = ["--host", INTERNAL_HOST, "--port", str(ports.controller), *security, *_log_flags(arguments)]
    if arguments.allowed_workers:
        controller_flags.append(f"--allowed-workers={','.join(arguments.allowed_workers)}")
    to_controller = ["--controller-address", _internal(ports.controller), *security]
    api_flags = ["--host", arguments.host, "--port", str(ports.api), *to_controller, *_access_flags(arguments)]
    expected = f"--expect-models={json.dumps([name for worker in served for name in worker.names])}"
    api_flags += [expected, *_log_flags(arguments)]
    worker_flags = [*to_controller, *serving_flags(arguments)]

    def worker_command(worker: ServedWorker, port: int) -> list[str]:
        address = ["--host", INTERNAL_HOST, "--port", str(port)]
        # The share comes last: it replaces the budget for all workers.
        is_alone = len(worker.groups) == 1 and not worker.groups[0].adapters
        module = "model_worker" if is_alone else "multi_model_worker"
        model_flags = [flag for group in worker.groups for flag in _model_flags(group)]
        model_flags += _pin_flags(arguments, worker)
        return _command(module, [*model_flags, *address, *worker_flags, *worker.memory_flags])

    # The page's own: of the keys that `fastchat keys` makes only digests are kept.
    page_key = new_key()
    workers = (
        ProcessSpec(
            name=f"worker of {','.join(worker.names)}",
            command=partial(worker_command, worker, port),
            stop_rank=1,
            model_names=worker.names,
        )
        for worker, port in zip(served, ports.workers, strict=True)
    )
    return (
        ProcessSpec("controller", lambda: _command("controller", controller_flags), stop_rank=2),
        ProcessSpec(
            "API server",
            lambda: _command("openai_api_server", api_flags),
            stop_rank=0,
            environment={PAGE_KEY_VARIABLE: page_key}
            | ({"FASTCHAT_API_KEYS": ",".join(arguments.api_keys)} if arguments.api_keys else {}),
        ),
        *_page_spec(arguments, ports, page_key, expected),
        *workers,
    )


def _page_spec(arguments: argparse.Namespace, ports: Ports, page_key: str, expected: str) -> tuple[ProcessSpec, ...]:
    if ports.web is None:
        return ()
    api_url = internal_url(arguments.host, ports.api, tls=arguments.ssl)
    flags = ["--host", arguments.web_host, "--port", str(ports.web), "--api-url", api_url, expected]
    flags += [f"--allowed-hosts={','.join(arguments.web_allowed_hosts)}"] if arguments.web_allowed_hosts else []
    flags += [f"--gradio-auth-path={arguments.gradio_auth_path.absolute()}"] if arguments.gradio_auth_path else []
    flags += [f"--gradio-root-path={arguments.gradio_root_path}"] if arguments.gradio_root_path else []
    flags += _log_flags(arguments)
    command = _command("gradio_web_server", flags)
    environment = {gradio_web_server.API_KEY_VARIABLE: page_key}
    return (ProcessSpec("page", lambda: command, stop_rank=0, is_essential=False, environment=environment),)


def serving_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of `worker_arguments.add_serving_flags` that are not at their defaults, for a worker's command line."""
    probe = argparse.ArgumentParser(add_help=False)
    worker_arguments.add_serving_flags(probe)
    flags: list[str] = []
    for name, default in vars(probe.parse_args([])).items():
        value = getattr(arguments, name)
        if value != default:
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if value is True else [f"{flag}={value}"]
    return flags


def ready_block(api_url: str, names: Sequence[str], *, has_keys: bool, page_url: str | None = None) -> str:
    """What is said once, when everything answers."""
    key = "'<one of your API keys>'" if has_keys else "EMPTY"
    header = '-H "Authorization: Bearer $OPENAI_API_KEY" ' if has_keys else ""
    body = json.dumps(
        {"model": names[0], "messages": [{"role": "user", "content": "Hello! What is your name?"}]}, ensure_ascii=False
    )
    quoted = body.replace("'", "'\\''")
    page = f"  page    {page_url}\n" if page_url is not None else ""
    return f"""
Ready.

{page}  API     {api_url}/v1
  health  {api_url}/health
  models  {", ".join(names)}

  export OPENAI_BASE_URL={api_url}/v1
  export OPENAI_API_KEY={key}

  curl {api_url}/v1/chat/completions {header}-H 'Content-Type: application/json' \\
    -d '{quoted}'

Ctrl-C stops everything.
"""


def _served_workers(arguments: argparse.Namespace) -> list[ServedWorker]:
    """The models, looked at from outside: what can be told without torch is told before anything is started."""
    if not arguments.model_path:
        _use_demo(arguments)
    groups = group_models(model_specs(arguments))
    names = [name for group in groups for name in group.all_names]
    for name in arguments.pin:
        if name not in names:
            raise ConfigError(f"--pin names {name!r}, but the models here are {', '.join(names)}.")
    engine = worker_arguments.serving_engine_spec(arguments)
    plan = plan_or_refuse([planned_group(group) for group in groups], engine, each_alone=True)
    if not plan.each_alone:
        return [ServedWorker(groups, (f"{plan.budget.flag}={plan.budget.num_bytes}",))]
    return [
        ServedWorker((group,), (f"{plan.budget.flag}={plan.own_budget(share)}",))
        for group, share in zip(groups, plan.shares, strict=True)
    ]


def _use_demo(arguments: argparse.Namespace) -> None:
    demo = find_demo_model()
    _log.info("no model was given: serving the tiny demo; serve a real one with --model-path FOLDER")
    arguments.model_path = [demo]


def _choose_ports(arguments: argparse.Namespace, num_workers: int) -> Ports:
    """The ports asked for, and free ones where any will do. Raises `UnavailableError` for one that is in use."""
    first = arguments.worker_port
    with ExitStack() as held:  # all at once, so that none is chosen twice

        def choose(host: str, port: int, flag: str) -> int:
            try:
                listeners = bind_listeners(host, port) if port else _bind_any(host)
            except UnavailableError:
                raise UnavailableError(
                    f"port {port} of {host} is in use; stop what listens there (another `fastchat serve`?) or give "
                    f"another {flag}."
                ) from None
            for listener in listeners.sockets:
                held.enter_context(listener)
            return listeners.port

        return Ports(
            api=choose(arguments.host, arguments.port, "--port"),
            controller=choose(INTERNAL_HOST, arguments.controller_port, "--controller-port"),
            workers=tuple(
                choose(INTERNAL_HOST, parse_port(first + number) if first else 0, "--worker-port")
                for number in range(num_workers)
            ),
            web=None
            if arguments.no_web
            else choose(arguments.web_host, arguments.web_port, "--web-port (or --no-web)"),
        )


def _bind_any(host: str) -> Listeners:
    """A port of ours alone: each process binds it anew at its every start, and in between the kernel must not give it
    to another listener or connection.
    """
    for port in random.SystemRandom().sample(ANY_PORTS, 100):
        with suppress(UnavailableError):
            return bind_listeners(host, port)
    return bind_listeners(host, 0)


def _model_flags(group: ModelGroup) -> list[str]:
    base = str(group.checkpoint.path.absolute())
    served = [(base, group.names, group.conv_template)] if group.is_asked_for else []
    served += [
        (f"{base}{BASE_MARK}{adapter.folder.path.absolute()}", adapter.names, adapter.conv_template)
        for adapter in group.adapters
    ]
    flags: list[str] = []
    for path, names, template in served:
        flags += [f"--model-path={path}", f"--model-names={','.join(names)}"]
        flags += [f"--conv-template={template}"] if template is not None else []
    return flags


def _pin_flags(arguments: argparse.Namespace, worker: ServedWorker) -> list[str]:
    pinned = [name for name in arguments.pin if name in worker.names]
    return [f"--pin={','.join(pinned)}"] if pinned else []


def _log_flags(arguments: argparse.Namespace) -> list[str]:
    return [f"--log-level={log_level(arguments).lower()}"]


def _access_flags(arguments: argparse.Namespace) -> list[str]:
    flags = [f"--allowed-{what}={json.dumps(getattr(arguments, f'allowed_{what}'))}" for what in _CORS_LISTS]
    flags += ["--allow-credentials"] if arguments.allow_credentials else []
    flags += [f"--drain-timeout={arguments.drain_timeout}"]
    flags += ["--arena-log-text"] if arguments.arena_log_text else []
    flags += [f"--allowed-hosts={','.join(arguments.allowed_hosts)}"] if arguments.allowed_hosts else []
    return [*flags, *(["--ssl"] if arguments.ssl else [])]


_CORS_LISTS = ("origins", "methods", "headers")


def _page_url(arguments: argparse.Namespace, ports: Ports) -> str | None:
    return None if ports.web is None else internal_url(arguments.web_host, ports.web)


def _internal(port: int) -> str:
    return internal_url(INTERNAL_HOST, port)


def _command(module: str, flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"fastchat.serve.{module}", *flags]


if __name__ == "__main__":
    run_command(main)

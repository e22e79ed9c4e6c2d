"""What a process measures, for Prometheus. Parts hand in facts; nothing outside this file knows a metric's name.

Names follow vLLM's under our own prefix, so that dashboards port. Every label comes from a closed set: a model's name
only if it is served, a route only if it was declared. Each process has its own registry; nothing is made at import.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
"""The label of everything outside a closed set."""

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_MODEL = ("model_name",)

FinishedReason = Literal["stop", "length", "abort", "error"]
ModelPlace = Literal["asleep", "loading", "awake", "leaving"]
UnloadReason = Literal["evicted", "idle", "operator"]


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """One request that a worker has ended, by any way. Times are in seconds; None where no token came.

    `num_awaited_tokens` came with the waits in `inter_token_latencies_s`: all but the first of each choice.
    """

    model: str
    reason: FinishedReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    duration_s: float
    time_to_first_token_s: float | None = None
    inter_token_latencies_s: Sequence[float] = ()
    num_awaited_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineCondition:
    """An engine's condition now. `kv_cache_usage` is the share of blocks in use, 0 to 1; the last four only grow."""

    model: str
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    kv_cache_usage: float
    num_preemptions: int
    num_steps: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestRelayed:
    """One request that the API server has answered. `route` is the declared path, such as `/v1/chat/completions`."""

    route: str
    model: str
    status: int
    duration_s: float
    time_to_first_byte_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClusterCondition:
    """What the controller knows: workers by state, and records kept since it started."""

    num_ready: int
    num_draining: int
    num_hung: int
    num_records: int


class _ProcessMetrics:
    """A registry with what every process shows of itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, served as `METRICS_CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: Iterable[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)


class WorkerMetrics(_ProcessMetrics):
    """A worker's metrics, for the models that it serves or has served and no other label."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        super().__init__()
        self._models = frozenset(models)
        self._places = self._gauge("fastchat_model_state", "1 for the state that a model is in", (*_MODEL, "state"))
        self._held = self._gauge("fastchat_model_held_bytes", "Memory that a model takes now, as planned", _MODEL)
        self._loads = self._counter("fastchat_model_loads_total", "Ended loads by outcome", (*_MODEL, "outcome"))
        self._unloads = self._counter("fastchat_model_unloads_total", "Freed models by reason", (*_MODEL, "reason"))
        self._wake = self._histogram(
            "fastchat_model_wake_seconds", "From the beginning of a load to its end", _MODEL, _LATENCY_BUCKETS_S
        )
        self._running = self._gauge("fastchat_num_requests_running", "Sequences in the engine's batch", _MODEL)
        self._waiting = self._gauge("fastchat_num_requests_waiting", "Sequences that wait for the engine", _MODEL)
        self._queued = self._gauge("fastchat_num_queued_tokens", "Tokens that wait or run, to compute", _MODEL)
        self._kv_cache = self._gauge("fastchat_kv_cache_usage_perc", "KV cache blocks in use, 1 is all", _MODEL)
        self._preemptions = self._counter("fastchat_num_preemptions_total", "Preempted sequences", _MODEL)
        self._steps = self._counter("fastchat_num_engine_steps_total", "Forward passes", _MODEL)
        self._drafted = self._counter("fastchat_spec_decode_num_draft_tokens_total", "Tokens looked ahead for", _MODEL)
        self._accepted = self._counter(
            "fastchat_spec_decode_num_accepted_tokens_total", "Tokens looked ahead for that came", _MODEL
        )
        self._shared = self._gauge("fastchat_shared_weight_bytes", "Memory saved by weights that models share")
        self._counted: dict[str, EngineCondition] = {}
        self._prompt = self._counter("fastchat_prompt_tokens_total", "Prompt tokens of ended requests", _MODEL)
        self._queried = self._counter("fastchat_prefix_cache_queries_total", "Prompt tokens looked up", _MODEL)
        self._cached = self._counter("fastchat_prefix_cache_hits_total", "Prompt tokens found in the cache", _MODEL)
        self._generated = self._counter("fastchat_generation_tokens_total", "Generated tokens", _MODEL)
        self._finished = self._counter(
            "fastchat_request_success_total", "Ended requests by reason", (*_MODEL, "finished_reason")
        )
        self._first_token = self._histogram(
            "fastchat_time_to_first_token_seconds", "From arrival to the first token", _MODEL, _LATENCY_BUCKETS_S
        )
        self._per_token = self._histogram(
            "fastchat_time_per_output_token_seconds", "Mean between tokens of a request", _MODEL, _TOKEN_BUCKETS_S
        )
        self._between = self._histogram(
            "fastchat_inter_token_latency_seconds", "From tokens to the next ones", _MODEL, _TOKEN_BUCKETS_S
        )
        self._latency = self._histogram(
            "fastchat_e2e_request_latency_seconds", "From arrival to the end", _MODEL, _LATENCY_BUCKETS_S
        )

    def know_models(self, models: Iterable[str]) -> None:
        """More names are served from now on; those that were stay, for what still runs under them."""
        self._models |= frozenset(models)

    def observe_place(self, model: str, state: ModelPlace, *, held_bytes: int) -> None:
        """Show where a model is; called when metrics are asked for."""
        model = _closed(model, self._models)
        for each in get_args(ModelPlace):
            self._places.labels(model, each).set(each == state)
        self._held.labels(model).set(held_bytes)

    def observe_load(self, model: str, seconds: float | None) -> None:
        """Count a load that has ended; None: it failed."""
        model = _closed(model, self._models)
        self._loads.labels(model, "failed" if seconds is None else "loaded").inc()
        if seconds is not None:
            self._wake.labels(model).observe(seconds)

    def observe_unload(self, model: str, reason: UnloadReason) -> None:
        """Count a model whose memory was freed."""
        self._unloads.labels(_closed(model, self._models), reason).inc()

    def observe_request(self, fact: RequestFinished) -> None:
        """Count one ended request."""
        model = _closed(fact.model, self._models)
        self._prompt.labels(model).inc(fact.num_prompt_tokens)
        self._queried.labels(model).inc(fact.num_prompt_tokens)
        self._cached.labels(model).inc(fact.num_cached_tokens)
        self._generated.labels(model).inc(fact.num_generated_tokens)
        self._finished.labels(model, fact.reason).inc()
        self._latency.labels(model).observe(fact.duration_s)
        if fact.time_to_first_token_s is None:
            return
        self._first_token.labels(model).observe(fact.time_to_first_token_s)
        between = self._between.labels(model)
        for latency_s in fact.inter_token_latencies_s:
            between.observe(latency_s)
        if fact.num_awaited_tokens:
            self._per_token.labels(model).observe(sum(fact.inter_token_latencies_s) / fact.num_awaited_tokens)

    def observe_shared_weights(self, num_bytes: int) -> None:
        """Show what the models of this process save by holding equal tensors once."""
        self._shared.set(num_bytes)

    def observe_engine(self, fact: EngineCondition) -> None:
        """Show an engine's condition; called when metrics are asked for."""
        model = _closed(fact.model, self._models)
        self._running.labels(model).set(fact.num_running)
        self._waiting.labels(model).set(fact.num_waiting)
        self._queued.labels(model).set(fact.num_queued_tokens)
        self._kv_cache.labels(model).set(fact.kv_cache_usage)
        before = self._counted.get(model)
        self._preemptions.labels(model).inc(max(0, fact.num_preemptions - (before.num_preemptions if before else 0)))
        self._steps.labels(model).inc(max(0, fact.num_steps - (before.num_steps if before else 0)))
        drafted, accepted = (before.num_drafted_tokens, before.num_accepted_tokens) if before else (0, 0)
        self._drafted.labels(model).inc(max(0, fact.num_drafted_tokens - drafted))
        self._accepted.labels(model).inc(max(0, fact.num_accepted_tokens - accepted))
        self._counted[model] = fact


class GatewayMetrics(_ProcessMetrics):
    """The API server's metrics. `routes` are its declared paths; models are those served at the moment of the fact."""

    def __init__(self, routes: Iterable[str]) -> None:
        super().__init__()
        self._routes = frozenset(routes)
        labels = ("route", "model_name", "status")
        self._requests = self._counter("fastchat_http_requests_total", "Answered requests", labels)
        self._in_flight = self._gauge("fastchat_http_requests_in_flight", "Requests being answered")
        self._workers = self._gauge("fastchat_workers", "Workers in the table, by state", ("state",))
        self._retries = self._counter("fastchat_relay_retries_total", "Requests sent to a second worker")
        self._first_byte = self._histogram(
            "fastchat_time_to_first_byte_seconds", "From arrival to the first event", _MODEL, _LATENCY_BUCKETS_S
        )
        self._latency = self._histogram(
            "fastchat_e2e_request_latency_seconds", "From arrival to the end", _MODEL, _LATENCY_BUCKETS_S
        )

    def observe_request(self, fact: RequestRelayed, served: Iterable[str]) -> None:
        """Count one answered request; `served` are the names in the table."""
        model = _closed(fact.model, served)
        self._requests.labels(_closed(fact.route, self._routes), model, str(fact.status)).inc()
        self._latency.labels(model).observe(fact.duration_s)
        if fact.time_to_first_byte_s is not None:
            self._first_byte.labels(model).observe(fact.time_to_first_byte_s)

    def observe_retry(self) -> None:
        """Count a request that a second worker was tried for."""
        self._retries.inc()

    def set_condition(self, *, num_in_flight: int, num_ready: int, num_draining: int, num_hung: int) -> None:
        """Show what runs and who is there; called when metrics are asked for."""
        self._in_flight.set(num_in_flight)
        _set_states(self._workers, num_ready=num_ready, num_draining=num_draining, num_hung=num_hung)


class ControllerMetrics(_ProcessMetrics):
    """The controller's metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._workers = self._gauge("fastchat_workers", "Workers in the table, by state", ("state",))
        self._records = self._gauge("fastchat_usage_records", "Final records kept since the start")

    def set_condition(self, fact: ClusterCondition) -> None:
        """Show the table's condition; called when metrics are asked for."""
        _set_states(self._workers, num_ready=fact.num_ready, num_draining=fact.num_draining, num_hung=fact.num_hung)
        self._records.set(fact.num_records)


def _set_states(gauge: Gauge, *, num_ready: int, num_draining: int, num_hung: int) -> None:
    gauge.labels("ready").set(num_ready)
    gauge.labels("draining").set(num_draining)
    gauge.labels("hung").set(num_hung)


def _closed(value: str, allowed: Iterable[str]) -> str:
    return value if value in set(allowed) else OTHER

"""Laws of the metrics: facts in, Prometheus text out, labels from closed sets."""

from __future__ import annotations

from fastchat.ops.metrics import (
    ClusterCondition,
    ControllerMetrics,
    EngineCondition,
    GatewayMetrics,
    RequestFinished,
    RequestRelayed,
    WorkerMetrics,
)


def finished(model: str = "m", *, reason: str = "stop") -> RequestFinished:
    return RequestFinished(
        model=model,
        reason=reason,
        num_prompt_tokens=10,
        num_cached_tokens=4,
        num_generated_tokens=3,
        duration_s=1.0,
        time_to_first_token_s=0.5,
        inter_token_latencies_s=(0.2, 0.3),
        num_awaited_tokens=2,
    )


def condition(num_preemptions: int) -> EngineCondition:
    return EngineCondition("m", 2, 3, 40, 0.25, num_preemptions, 7)


def test_worker_counts_requests_and_tokens():
    """Under vLLM's names with our prefix."""
    metrics = WorkerMetrics(["m"])
    metrics.observe_request(finished())
    metrics.observe_request(finished(reason="abort"))
    text = metrics.render().decode()
    for line in (
        'fastchat_prompt_tokens_total{model_name="m"} 20.0',
        'fastchat_generation_tokens_total{model_name="m"} 6.0',
        'fastchat_prefix_cache_queries_total{model_name="m"} 20.0',
        'fastchat_prefix_cache_hits_total{model_name="m"} 8.0',
        'fastchat_request_success_total{finished_reason="stop",model_name="m"} 1.0',
        'fastchat_request_success_total{finished_reason="abort",model_name="m"} 1.0',
        'fastchat_time_to_first_token_seconds_count{model_name="m"} 2.0',
        'fastchat_time_per_output_token_seconds_sum{model_name="m"} 0.5',
        'fastchat_inter_token_latency_seconds_count{model_name="m"} 4.0',
        'fastchat_inter_token_latency_seconds_sum{model_name="m"} 1.0',
        'fastchat_e2e_request_latency_seconds_sum{model_name="m"} 2.0',
    ):
        assert line in text


def test_engine_totals_are_counters():
    """A total that is seen twice is counted once."""
    metrics = WorkerMetrics(["m"])
    for num_preemptions in (1, 1, 4):
        metrics.observe_engine(condition(num_preemptions))
    text = metrics.render().decode()
    assert 'fastchat_num_preemptions_total{model_name="m"} 4.0' in text
    assert 'fastchat_num_requests_running{model_name="m"} 2.0' in text
    assert 'fastchat_kv_cache_usage_perc{model_name="m"} 0.25' in text


def test_a_model_is_in_one_state_and_its_moves_are_counted():
    """Names that come later are known from then on."""
    metrics = WorkerMetrics(["m"])
    metrics.observe_place("m", "loading", held_bytes=7)
    metrics.observe_place("m", "awake", held_bytes=9)
    metrics.observe_load("m", 0.3)
    metrics.observe_load("m", None)
    metrics.observe_unload("m", "evicted")
    metrics.observe_unload("late", "idle")
    metrics.know_models(["late"])
    metrics.observe_unload("late", "idle")
    text = metrics.render().decode()
    for line in (
        'fastchat_model_state{model_name="m",state="loading"} 0.0',
        'fastchat_model_state{model_name="m",state="awake"} 1.0',
        'fastchat_model_held_bytes{model_name="m"} 9.0',
        'fastchat_model_loads_total{model_name="m",outcome="loaded"} 1.0',
        'fastchat_model_loads_total{model_name="m",outcome="failed"} 1.0',
        'fastchat_model_wake_seconds_sum{model_name="m"} 0.3',
        'fastchat_model_unloads_total{model_name="m",reason="evicted"} 1.0',
        'fastchat_model_unloads_total{model_name="other",reason="idle"} 1.0',
        'fastchat_model_unloads_total{model_name="late",reason="idle"} 1.0',
    ):
        assert line in text


def test_names_that_clients_make_up_make_no_labels():
    """Ten thousand unknown models and routes are one label each."""
    metrics = GatewayMetrics(["/v1/chat/completions"])
    for number in range(10_000):
        metrics.observe_request(RequestRelayed(f"/x{number}", f"model-{number}", 404, 0.1), served=["m"])
    metrics.observe_request(RequestRelayed("/v1/chat/completions", "m", 200, 0.1, 0.05), served=["m"])
    text = metrics.render().decode()
    assert 'fastchat_http_requests_total{model_name="other",route="other",status="404"} 10000.0' in text
    assert 'fastchat_http_requests_total{model_name="m",route="/v1/chat/completions",status="200"} 1.0' in text
    assert "model-1" not in text


def test_processes_do_not_share_a_registry():
    """Two of a kind live in one process: `fastchat serve`, and every test."""
    first, second = ControllerMetrics(), ControllerMetrics()
    first.set_condition(ClusterCondition(num_ready=2, num_draining=1, num_hung=0, num_records=5))
    assert 'fastchat_workers{state="ready"} 2.0' in first.render().decode()
    assert 'fastchat_workers{state="ready"} 2.0' not in second.render().decode()

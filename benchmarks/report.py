"""Make docs/performance.md and its plots from the figures of `compare.py`, `curves.py`, `real_shape.py` and `relay.py`.

python benchmarks/report.py
python benchmarks/report.py --figures .benchmarks/fast --docs .benchmarks/fast     somewhere else
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.goals import (  # noqa: E402 - the line above makes `benchmarks` known
    MAX_FIRST_TOKEN_S,
    OURS,
    Medians,
    memory_limit_bytes,
    outcomes,
)
from benchmarks.plots import Axis, Series, line_plot  # noqa: E402

Figures = Mapping[str, Any]  # Any: JSON
WEIGHTS = ("bfloat16", "int8", "int4")
METRICS = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill"}
LATENCIES = {"first_token_p50_s": "time to first token", "between_tokens_p50_s": "between two tokens"}
HEAD = """\
# Performance

<!-- Made by benchmarks/report.py from measured figures; do not edit. -->

Everything here is measured by `make bench`, and the model of real size by `make bench-6b`; every figure is written by a
script. `make peers` installs the other engines first, each into an environment of its own; one that is not installed is
named as not run. Shared machines drift: compare figures of one table, which were taken in turns, and measure yourself.
"""


def medians_of(turns: Iterable[Figures], key: str) -> dict[tuple[str, int], dict[str, float]]:
    """Medians over the rounds, by `key` and number of streams."""
    groups: dict[tuple[str, int], list[Figures]] = {}
    for turn in turns:
        groups.setdefault((turn[key], turn["streams"]), []).append(turn)
    numbers = [*METRICS, *LATENCIES, "whole_tokens_per_s"]
    return {
        place: {name: statistics.median(turn[name] for turn in group) for name in numbers}
        for place, group in groups.items()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine_section(comparison: Figures) -> Iterator[str]:
    """What it ran on, and how."""
    before, after, settings = comparison["machine_before"], comparison["machine_after"], comparison["settings"]
    num_rounds = 1 + max(turn["round"] for turn in comparison["turns"])
    yield "## Machine and method\n"
    yield (
        f"{before['cores']} cores ({before['instruction_sets']}), {before['memory_gb']:.0f} GB of memory, no GPU used; "
        f"torch {before['torch']}; {before['threads']} threads for every engine. Measured before and after the run:\n"
    )
    rows = [
        ["reading memory, GB/s", *(f"{each['read_gb_per_s']:.1f}" for each in (before, after))],
        ["bfloat16 product, GFLOP/s", *(f"{each['bfloat16_gflop_per_s']:.0f}" for each in (before, after))],
        ["int8 product, Gop/s", *(f"{each['int8_gop_per_s']:.0f}" for each in (before, after))],
    ]
    yield table(["limit of this machine", "before", "after"], rows)
    yield (
        "The model has the shape of Qwen2-0.5B (494 million weights, 988 MB in bfloat16) with random numbers, the same "
        f"for all. Prompts of {settings['prompt_tokens']} random tokens, answers of {settings['answer_tokens']}, "
        "greedy, the end of text ignored; no prompt repeats another, and no engine guesses ahead. All streams of a "
        "turn begin together. Engines take turns, stopped by a signal while another one works; figures are medians "
        f"of up to {num_rounds} rounds. Decode counts tokens after the moment when every stream has its first one; "
        "prefill is all prompt tokens over the time until then.\n"
    )
    rows = [
        [name, each["facts"]["version"], each["facts"]["settings"]] for name, each in comparison["contestants"].items()
    ]
    yield table(["engine", "version", "settings"], rows)
    for name, reason in comparison["not_run"].items():
        yield f"Not run: {name}: {reason}.\n"


def goals_section(medians: Medians) -> Iterator[str]:
    """Ratios against what we want."""
    yield "## Beside others\n"
    rows = []
    for outcome in outcomes(medians):
        goal = outcome.goal
        rows.append(
            [
                METRICS[goal.metric],
                str(goal.streams),
                goal.ours,
                f"{outcome.ours:.1f}",
                outcome.best,
                f"{outcome.other:.1f}",
                f"{outcome.ratio:.2f}",
                f"{goal.factor:.2f}",
                "yes" if outcome.is_met else "**no**",
            ]
        )
    yield table(["tokens/s", "streams", "ours", "median", "best of the others", "median", "ratio", "goal", "met"], rows)


def figures_section(medians: Medians) -> Iterator[str]:
    """Everything that was measured in turns."""
    yield "## All engines\n"
    yield _by_streams(medians, "decode_tokens_per_s", "Decode, tokens/s", "{:.1f}")
    yield _by_streams(medians, "prefill_tokens_per_s", "Prefill, tokens/s", "{:.1f}")
    yield _by_streams(medians, "first_token_p50_s", "Time to first token, median, s", "{:.2f}")


def _by_streams(medians: Medians, metric: str, title: str, form: str) -> str:
    names = list(dict.fromkeys(name for name, _ in medians))
    streams = sorted({number for _, number in medians})
    rows = [
        [name, *(form.format(medians[name, each][metric]) if (name, each) in medians else "-" for each in streams)]
        for name in names
    ]
    return table([f"{title}; streams:", *map(str, streams)], rows)


def memory_section(comparison: Figures) -> Iterator[str]:
    """Memory and the time to the first token of a fresh process."""
    yield "## Memory and start\n"
    yield (
        "Peak anonymous memory of the whole run, sampled; a mapped file, as llama.cpp's weights, is not in it. Start: "
        "from the command to the first token, in a fresh process with the model's file in the page cache.\n"
    )
    rows = []
    for name, each in comparison["contestants"].items():
        facts = each["facts"]
        limit, first = "-", f"{each['first_token_s']:.1f}"
        if name.startswith(OURS):
            most = memory_limit_bytes(facts["weight_bytes"], facts["cache_bytes"])
            limit = f"{most / 1e6:.0f}" + (" met" if each["peak_bytes"] <= most else " **not met**")
            first += " met" if each["first_token_s"] <= MAX_FIRST_TOKEN_S else " **not met**"
        held = f"{facts['weight_bytes'] / 1e6:.0f}" if facts["weight_bytes"] else "-"
        rows.append([name, held, f"{facts['cache_bytes'] / 1e6:.0f}", f"{each['peak_bytes'] / 1e6:.0f}", limit, first])
    yield table(["engine", "weights, MB", "KV cache, MB", "peak, MB", "goal", "first token after, s (goal 10)"], rows)


def real_shape_section(runs: Sequence[Figures]) -> Iterator[str]:
    """One model of real size (`real_shape.py`)."""
    yield "## ChatGLM2-6B's shape\n"
    yield (
        "Random numbers in the original layout. Limit: the rate at which this machine reads memory over the bytes of "
        "weights that a token needs; goals for one stream are 0.8 of it in bfloat16 and 0.65 in int8 and int4, and "
        "0.8 of the speed of reading for loading what need not be converted. Files that are not called cold were in "
        "the system's memory when they were loaded, though perhaps not when they were read.\n"
    )
    rows = []
    for run in runs:
        limit = run["machine_read_gb_per_s"] * 1e9 / run["read_bytes"]
        rows.append(
            [
                run["weights"] + (", cold files" if run["is_cold"] else ""),
                f"{run['loading_s']:.1f} ({run['reading_s'] / run['loading_s']:.2f})",
                f"{run['held_bytes'] / 1e9:.2f}",
                f"{max(run['peak_bytes'], run['loading_peak_bytes']) / 1e9:.2f}",
                f"{run['one_tokens_per_s']:.2f}",
                f"{run['one_tokens_per_s'] / limit:.2f}",
                f"{run['eight_tokens_per_s']:.1f}",
                f"{128 / run['one_first_token_s']:.1f}",
                f"{run['embedding_s']:.1f}",
                f"{run['long_first_token_s']:.0f} ({run['long_tokens']})" if "long_tokens" in run else "",
                f"{run['long_tokens_per_s']:.2f}" if "long_tokens" in run else "",
            ]
        )
    head = [
        "weights",
        "loading, s (of reading's speed)",
        "weights, GB",
        "peak, GB",
        "1 stream, tokens/s",
        "of the limit",
    ]
    head += ["8 streams, tokens/s", "prefill, tokens/s", "embedding of 128 tokens, s"]
    yield table([*head, "long prompt, s (tokens)", "then, tokens/s"], rows)


def relay_section(relay: Figures) -> Iterator[str]:
    """API server and controller before canned workers (`relay.py`)."""
    yield "## Relaying\n"
    names = list(relay)
    many = relay[names[0]]["many_streams"]
    yield (
        "API server and controller alone, before workers that answer from a can, with the clients on the same cores; "
        f"CPU is that of both processes. {many['streams']} streams of 20 events/s at once: {many['errors']} errors, "
        f"{many['memory_kib_per_stream']:.0f} KiB each, {many['gap_ms_p50']:.0f} ms between events (p99 "
        f"{many['gap_ms_p99']:.0f} ms), {many['cpu_us_per_token']:.0f} us of CPU for each.\n"
    )
    rows = {
        "whole answers/s, 32 connections": [each["whole_answers_per_s"] for each in relay.values()],
        "streamed tokens/s, 32 streams": [each["streamed_tokens_per_s"] for each in relay.values()],
        "added time to the first token, ms": [each["added_first_token_ms"] for each in relay.values()],
        "CPU for a whole answer, ms": [each["cpu_ms_per_whole_answer"] for each in relay.values()],
    }
    for length in relay[names[0]]["cpu_us_per_streamed_token"]:
        title = f"CPU for a streamed token, answers of {length} tokens, us"
        rows[title] = [each["cpu_us_per_streamed_token"][length] for each in relay.values()]
    yield table(
        ["", *names, "ratio"],
        ([title, *(f"{value:,.1f}" for value in row), f"{row[0] / row[-1]:.2f}"] for title, row in rows.items()),
    )


def curves_section(curves: Figures) -> Iterator[str]:
    """Our engine alone, over the whole range."""
    yield "## Curves\n"
    yield (
        f"`fastchat serve` with this model gives its first token over HTTP {curves['server_first_token_s']:.1f} s "
        "after the command.\n"
    )
    for name, title in PLOTS.items():
        yield f"![{title}](images/performance-{name}.svg)\n"
    yield "### Context\n"
    yield "Milliseconds per token of one stream; what grows is what attention must read.\n"
    contexts: dict[tuple[str, int], list[float]] = {}
    for turn in curves["contexts"]:
        place = turn["weights"], turn["prompt_tokens"]
        contexts.setdefault(place, []).append(1000 / turn["decode_tokens_per_s"])
    lengths = sorted({length for _, length in contexts})
    rows = []
    for weights in (each for each in WEIGHTS if (each, lengths[0]) in contexts):
        cells = [statistics.median(contexts[weights, length]) for length in lengths]
        rows.append([weights, *(f"{cell:.1f}" for cell in cells), f"{cells[-1] / cells[0]:.2f}"])
    yield table(["weights", *(f"{length} tokens before" for length in lengths), "ratio"], rows)
    yield from _busy_section(curves["busy"])


def _busy_section(busy: Sequence[Figures]) -> Iterator[str]:
    yield "### Two models, aborted requests\n"
    yield (
        f"{busy[0]['streams']} streams on one engine alone, then on each of two engines in one process (goal: 0.9 of "
        "the tokens of one); the same number of requests kept in flight, with every fifth given up at a token drawn by "
        "chance, and with none. Tokens that clients have read, per second.\n"
    )
    rows = []
    for each in busy:
        rates = each["tokens_per_s"]
        cells = [rates["alone"], rates["both"], each["two_models_ratio"], rates["no_aborts"], rates["aborts"]]
        forms = ("{:.1f}", "{:.1f}", "{:.2f}", "{:.1f}", "{:.1f}")
        shown = [form.format(cell) for form, cell in zip(forms, cells, strict=True)]
        rows.append(
            [each["weights"], *shown, f"{each['aborts_ratio']:.2f}", f"{each['free_blocks_after']} of {each['blocks']}"]
        )
    yield table(
        ["weights", "one model", "two models", "ratio", "no aborts", "aborts", "ratio", "blocks free afterwards"], rows
    )


PLOTS = {
    "throughput": "Decode throughput against streams",
    "latency": "Latency against load",
    "prompts": "Prefill against the length of the prompt",
    "roofline": "Roofline of decode",
}


def plots(comparison: Figures, curves: Figures) -> dict[str, str]:
    """File names and contents."""
    drawn = {
        "throughput": throughput_plot(comparison, curves),
        "latency": latency_plot(curves),
        "prompts": prompts_plot(curves),
        "roofline": roofline_plot(comparison, curves),
    }
    return {f"performance-{name}.svg": text for name, text in drawn.items()}


def throughput_plot(comparison: Figures, curves: Figures) -> str:
    """Ours as lines, the others as dots where they were measured."""
    ours = medians_of(curves["streams"], "weights")
    others = medians_of(comparison["turns"], "contestant")
    series = [
        Series(f"{OURS} {weights}", _line(ours, weights, "decode_tokens_per_s"), number)
        for number, weights in enumerate(WEIGHTS)
    ]
    names = [name for name in comparison["contestants"] if not name.startswith(OURS)]
    series += [
        Series(name, _line(others, name, "decode_tokens_per_s"), len(WEIGHTS) + number, is_line=False)
        for number, name in enumerate(names)
    ]
    return line_plot(PLOTS["throughput"], Axis("streams at once", 2), Axis("decode tokens/s"), series)


def latency_plot(curves: Figures) -> str:
    """What one client waits for, over how much all get."""
    ours = medians_of(curves["streams"], "weights")
    series = []
    for number, weights in enumerate(WEIGHTS):
        for metric, title in LATENCIES.items():
            places = [
                (ours[place]["whole_tokens_per_s"], 1000 * ours[place][metric]) for place in ours if place[0] == weights
            ]
            series.append(Series(f"{weights}, {title}", places, number, is_dashed=metric == "between_tokens_p50_s"))
    return line_plot(PLOTS["latency"], Axis("tokens/s of all streams"), Axis("milliseconds, median", 10), series)


def prompts_plot(curves: Figures) -> str:
    """One prompt alone."""
    series = []
    for number, weights in enumerate(WEIGHTS):
        places = [
            (turn["prompt_tokens"], turn["prefill_tokens_per_s"])
            for turn in curves["prompts"]
            if turn["weights"] == weights
        ]
        series.append(Series(weights, places, number))
    return line_plot(PLOTS["prompts"], Axis("tokens of the prompt", 2), Axis("prefill tokens/s"), series)


def roofline_plot(comparison: Figures, curves: Figures) -> str:
    """Operations per second over operations per byte of weights, below what the machine can do."""
    machine = curves["machine"]
    ours = medians_of(curves["streams"], "weights")
    read_bytes = {name: each["facts"]["read_bytes"] for name, each in comparison["contestants"].items()}
    operations = read_bytes[f"{OURS} bfloat16"]  # two for each weight, which has two bytes
    series = []
    for number, weights in enumerate(WEIGHTS):
        places = [
            (operations * streams / read_bytes[f"{OURS} {weights}"], operations * figures["decode_tokens_per_s"] / 1e9)
            for (name, streams), figures in ours.items()
            if name == weights
        ]
        series.append(Series(weights, places, number))
    ends = (0.5, 512.0)
    for colour, (name, peak) in enumerate(
        (("bfloat16", machine["bfloat16_gflop_per_s"]), ("int8", machine["int8_gop_per_s"]))
    ):
        edge = peak / machine["read_gb_per_s"]
        roof = [(ends[0], ends[0] * machine["read_gb_per_s"]), (edge, peak), (max(ends[1], edge), peak)]
        series.append(Series(f"limit, {name}", roof, colour, is_dashed=True))
    return line_plot(PLOTS["roofline"], Axis("operations per byte of weights", 2), Axis("Gop/s", 10), series)


def _line(medians: Medians, name: str, metric: str) -> list[tuple[float, float]]:
    return [(streams, figures[metric]) for (each, streams), figures in medians.items() if each == name]


def page(
    comparison: Figures, curves: Figures | None, real_shapes: Sequence[Figures] = (), relay: Figures | None = None
) -> str:
    """The whole document."""
    medians = medians_of(comparison["turns"], "contestant")
    parts = [HEAD, *machine_section(comparison), *goals_section(medians), *figures_section(medians)]
    parts += memory_section(comparison)
    if curves is not None:
        parts += curves_section(curves)
    if real_shapes:
        parts += real_shape_section(real_shapes)
    if relay is not None:
        parts += relay_section(relay)
    return "\n".join(parts)


def main() -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=ROOT / ".benchmarks", help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to")
    flags = parser.parse_args()
    comparison = json.loads((flags.figures / "comparison.json").read_text())
    curves_file = flags.figures / "curves.json"
    curves = json.loads(curves_file.read_text()) if curves_file.exists() else None
    if curves is not None:
        (flags.docs / "images").mkdir(parents=True, exist_ok=True)
        for name, text in plots(comparison, curves).items():
            (flags.docs / "images" / name).write_text(text)
    real_shapes = [json.loads(file.read_text()) for file in sorted(flags.figures.glob("real-shape-*.json"))]
    relay_file = flags.figures / "relay.json"
    relay = json.loads(relay_file.read_text()) if relay_file.exists() else None
    text = page(comparison, curves, real_shapes, relay)
    (flags.docs / "performance.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

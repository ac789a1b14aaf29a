"""The numbers of bench_step.py's runs: out of Megatron's log and our report, their medians, and a table."""

from __future__ import annotations

import re
import statistics

ITERATION = re.compile(r" iteration +(\d+)/ *\d+ \|.* elapsed time per iteration \(ms\): ([\d.]+) \|")
RANK_PEAK = re.compile(r"\[Rank (\d+)\].* memory \(MB\) .*\| max allocated: ([\d.]+)")
# NCCL takes memory of its own when a communicator is first used, and says no more than that CUDA failed.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|ncclUnhandledCudaError", re.IGNORECASE
)
ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b|\berror: ")


def iteration_times(log: str) -> dict[int, float]:
    """Milliseconds of every iteration, counted from 1, out of Megatron's log."""
    times = {int(number): float(ms) for number, ms in ITERATION.findall(log)}
    if 2 in times:
        # Megatron does not reset its timer after the first line: the second is the mean of both.
        times[2] = round(2 * times[2] - times[1], 1)
    return times


def rank_peaks(log: str) -> dict[int, float]:
    """MiB at the peak of each rank that Megatron's log tells of."""
    peaks: dict[int, float] = {}
    for rank, mib in RANK_PEAK.findall(log):
        peaks[int(rank)] = max(peaks.get(int(rank), 0.0), float(mib))
    return dict(sorted(peaks.items()))


def failure_reason(log: str) -> str:
    """The line of a failed run's log that says why: memory, else the last error, else a signal."""
    lines = [re.sub(r"^\s*(\[\w+\]:)?\s*", "", line).rstrip() for line in log.splitlines()]
    lines = [line for line in lines if line and "ChildFailedError" not in line]  # torchrun's own
    for pattern in (OUT_OF_MEMORY, ERROR, r"\bSignal \d+ \(", ""):
        if found := [line for line in lines if re.search(pattern, line)]:
            return found[-1]
    return "nothing was printed"


def result(name: str, log: str, report: dict, timed: range) -> dict:
    """One run's numbers (units: bench_step.py's docstring), from its log and its ``--agoq-report``."""
    times = iteration_times(log)  # the report's do not wait for the device to end the optimizer's step
    if missing := [i for i in timed if i not in times]:
        return {"name": name, "error": f"the log tells no time of iterations {missing}"}
    step_ms = statistics.median(times[i] for i in timed)
    mib = report["peak_memory_bytes"] and round(report["peak_memory_bytes"] / 2**20, 1)
    peaks = rank_peaks(log)
    return {
        "name": name,
        "step_ms": round(step_ms, 2),
        "tokens_per_s": round(report["tokens"] / report["iterations"] / step_ms * 1e3, 1),
        "peak_allocated_mib": mib,
        "loss": next((h["lm loss"] for h in report["train"] if h["iteration"] == timed.stop), None),
        **({"peaks_mib": peaks} if len(peaks) > 1 else {}),
        "losses": [h["lm loss"] for h in report["train"]],
        "iterations_ms": times,
    }


def summarize(runs: list[dict], names: list[str]) -> list[dict]:
    """For each configuration: medians over its runs, spread, ratio of step times to the first one's."""
    rows: list[dict] = []
    for name in names:
        mine = [run for run in runs if run["name"] == name]
        done = [run for run in mine if "error" not in run]
        row = {"name": name, "runs": len(done), "failed": len(mine) - len(done)}
        if done:
            steps = [run["step_ms"] for run in done]
            row |= {"step_ms": statistics.median(steps), "min_ms": min(steps), "max_ms": max(steps)}
            first = (rows or [row])[0].get("step_ms")
            row["ratio"] = first and round(row["step_ms"] / first, 4)
            row["tokens_per_s"] = statistics.median(run["tokens_per_s"] for run in done)
            row["peak_allocated_mib"] = max(run["peak_allocated_mib"] or 0 for run in done) or None
            row["loss"] = done[-1]["loss"]
            row |= {key: done[-1][key] for key in ("peaks_mib", "predicted_mib") if key in done[-1]}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """What ``summarize`` returns, as text."""
    columns = {"step_ms": ".1f", "min_ms": ".1f", "max_ms": ".1f", "ratio": ".3f"}
    columns |= {"tokens_per_s": ".0f", "peak_allocated_mib": ".0f", "loss": ".4f", "failed": "d"}
    lines = [f"{'name':<16}" + "".join(f"{key:>{len(key) + 4}}" for key in columns)]
    for row in rows:
        shown = {key: "-" if row.get(key) is None else format(row[key], columns[key]) for key in columns}
        lines.append(f"{row['name']:<16}" + "".join(f"{shown[key]:>{len(key) + 4}}" for key in columns))
    return "\n".join(lines)

"""Logs, reports and rows of runs that were never made, for the tests of bench_step.py."""

from __future__ import annotations


def make_log(times: list[float]) -> str:
    """Megatron's lines for iterations of these milliseconds: its second one tells the mean of two."""
    shown = [times[0], (times[0] + times[1]) / 2, *times[2:]]
    line = (
        " [2026-01-02 03:04:05.678901] iteration {:8d}/{:8d} | consumed samples: {:12d} |"
        " elapsed time per iteration (ms): {:.1f} | learning rate: 1.000000E-04 |"
        " global batch size:     4 | lm loss: 1.036146E+01 | loss scale: 1.0 |"
    )
    lines = [line.format(i, len(times), 4 * i, ms) for i, ms in enumerate(shown, start=1)]
    return "\n".join(["using world size: 1", *lines, "[rank0] (after 10 iterations) memory (MB)"])


def make_report(iterations: int, peak: int | None) -> dict:
    return {
        "tokens": iterations * 8 * 4096,
        "iterations": iterations,
        "peak_memory_bytes": peak,
        "train": [{"iteration": i, "lm loss": 11 - i / 10} for i in range(1, iterations + 1)],
    }


TIMES = [9000.0, 700.0, 600.0, 510.0, 500.0, 530.0, 520.0, 550.0, 540.0, 5000.0]


def make_run(name: str, step_ms: float, peak: float | None = 100.0) -> dict:
    return {
        "name": name,
        "step_ms": step_ms,
        "tokens_per_s": 1e6 / step_ms,
        "peak_allocated_mib": peak,
        "loss": 10.25,
    }

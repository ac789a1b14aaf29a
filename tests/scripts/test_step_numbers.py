"""What bench_step.py tells of its runs, on made-up logs."""

from __future__ import annotations

import pytest
import step_numbers
from made_up_runs import TIMES, make_log, make_report, make_run

TIMED = range(4, 10)


def test_the_median_is_of_iterations_4_to_9():
    assert step_numbers.iteration_times(make_log(TIMES)) == dict(enumerate(TIMES, start=1))
    run = step_numbers.result("off", make_log(TIMES), make_report(10, 3 * 2**29), TIMED)
    assert run.pop("iterations_ms") == dict(enumerate(TIMES, start=1))
    assert run.pop("losses") == [11 - i / 10 for i in range(1, 11)]
    assert run == {
        "name": "off",
        "step_ms": 525.0,
        "tokens_per_s": pytest.approx(8 * 4096 / 0.525, abs=0.1),
        "peak_allocated_mib": 1536.0,
        "loss": 10.0,
    }


def test_iterations_added_for_a_trace_do_not_count():
    log = make_log([*TIMES, 9999.0, 9999.0])
    run = step_numbers.result("off", log, make_report(12, None), TIMED)
    assert run["step_ms"] == 525.0 and run["loss"] == 10.0
    assert run["tokens_per_s"] == pytest.approx(8 * 4096 / 0.525, abs=0.1)
    assert run["peak_allocated_mib"] is None


def test_peaks_of_ranks():
    line = (
        "[Rank {}] (after 2 iterations) memory (MB) | allocated: 14.77 | max allocated: {:.2f} | reserved: 9"
    )
    log = "\n".join(line.format(*pair) for pair in ((3, 19.5), (0, 20.25), (3, 21.0), (3, 20.0), (0, 20.25)))
    assert step_numbers.rank_peaks(log) == {0: 20.25, 3: 21.0}
    run = step_numbers.result("off", make_log(TIMES) + "\n" + log, make_report(10, 3 * 2**29), TIMED)
    assert run["peaks_mib"] == {0: 20.25, 3: 21.0}
    assert step_numbers.rank_peaks(make_log(TIMES)) == {}


def test_a_log_without_all_times_is_a_failure():
    run = step_numbers.result("off", make_log(TIMES[:7]), make_report(7, None), TIMED)
    assert run == {"name": "off", "error": "the log tells no time of iterations [8, 9]"}


LAUNCHER = """\
Traceback (most recent call last):
  File "torch/distributed/run.py", line 981, in run
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
pretrain_gpt_agoq.py FAILED
  exitcode  : -15 (pid: 29931)
  traceback : Signal {} received by PID 29931
============================================================
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "  error_injection_type ... transient_error\n"
            "[rank0]: Traceback (most recent call last):\n"
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
            "[rank1]: torch.distributed.DistBackendError: NCCL communicator was aborted\n",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            "[rank0]: KeyError: 'a'\n[rank0]: During handling of the above exception, another:\n"
            "[rank0]: ValueError: no such thing\n[rank0]: frame #3\n",
            "ValueError: no such thing",
        ),
        ("pretrain_gpt_agoq.py: error: --fp8: no.\n", "pretrain_gpt_agoq.py: error: --fp8: no."),
        ("training ...\n", "traceback : Signal 15 (SIGTERM) received by PID 29931"),
    ],
)
def test_the_reason_of_a_failure(log, reason):
    assert step_numbers.failure_reason(log + LAUNCHER.format("15 (SIGTERM)")) == reason


def test_a_failure_without_a_reason():
    assert step_numbers.failure_reason("") == "nothing was printed"
    assert step_numbers.failure_reason("\nlast words\n\n") == "last words"


def test_medians_spread_and_ratio():
    runs = [make_run("off", 200.0), make_run("agoq", 230.0, 50.0), {"name": "bad", "error": "no"}]
    runs += [make_run("off", 190.0), make_run("agoq", 240.0, 51.0), {"name": "bad", "error": "no"}]
    runs += [make_run("off", 220.0), {"name": "agoq", "error": "no"}, {"name": "bad", "error": "no"}]
    off, agoq, bad = rows = step_numbers.summarize(runs, ["off", "agoq", "bad"])
    assert off["step_ms"] == 200 and (off["min_ms"], off["max_ms"]) == (190, 220)
    assert off["ratio"] == 1 and off["tokens_per_s"] == 5000 and off["runs"] == 3
    assert agoq["step_ms"] == 235 and agoq["ratio"] == 1.175 and agoq["peak_allocated_mib"] == 51
    assert (agoq["runs"], agoq["failed"]) == (2, 1)
    assert bad == {"name": "bad", "runs": 0, "failed": 3}
    lines = [line.split() for line in step_numbers.table(rows).splitlines()]
    assert lines[0] == "name step_ms min_ms max_ms ratio tokens_per_s peak_allocated_mib loss failed".split()
    assert lines[2] == "agoq 235.0 230.0 240.0 1.175 4257 51 10.2500 1".split()
    assert lines[3] == ["bad", *"-" * 7, "3"]


def test_no_ratio_where_the_first_configuration_failed():
    rows = step_numbers.summarize(
        [{"name": "off", "error": "no"}, make_run("agoq", 230.0, None)], ["off", "agoq"]
    )
    assert rows[1]["ratio"] is None and rows[1]["peak_allocated_mib"] is None
    assert step_numbers.table(rows).splitlines()[2].split()[4] == "-"

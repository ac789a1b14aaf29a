"""What a pipeline stage holds: by hand, by invariants, and against Megatron's schedules as they run."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections import Counter, deque

import pytest
import schedule_runs
import torch
from schedule_runs import MOST, REAL, REFUSING, STEPS
from torch.overrides import TorchFunctionMode

from agoq_megatron.planning.in_flight import Schedule, paper_bits, stage_bits


def whole_runs(test):
    """Marks of a test that needs the training runs, which the first of them waits for."""
    return pytest.mark.slow(pytest.mark.timeout(300)(test))


@pytest.fixture(scope="module")
def found(launcher, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("in_flight") / "found.json"
    launcher.script(schedule_runs.__file__, out, timeout=280)
    return json.loads(out.read_text())


@pytest.mark.supports("uneven pipeline stages", "interleaved pipeline", "SGD")
@whole_runs
@pytest.mark.parametrize("name", REAL)
def test_megatron_runs_what_is_predicted(found, name):
    real = REAL[name]
    schedule = Schedule(real.stages, real.micro_batches, real.chunks, real.group_size)
    assert len(found[name]) == real.stages
    for stage, rank in enumerate(found[name]):
        assert rank["steps"] == STEPS and sum(rank["layers"]) == real.layers[stage]
        events = list(schedule.events(stage))
        assert [tuple(event) for event in rank["events"]] == events
        # What autograd really keeps, too: all of a micro-batch until its backward, nothing after it.
        assert [tuple(numbers) for numbers in rank["held"]] == running(events, real.chunks)
        assert rank["alive"] == [True] * (real.micro_batches * real.chunks)
        assert max(map(sum, rank["held"])) == schedule.counts(stage)


@whole_runs
@pytest.mark.parametrize("name,stages", REFUSING.items())
def test_megatron_refuses_what_is_refused(found, name, stages):
    every = [[m, group] for m in range(1, MOST + 1) for group in range(1, MOST + 1)]
    possible = [[m, group] for m, group in every if allowed(stages, m, 2, group)]
    assert 0 < len(possible) < len(every)
    assert all(rank["accepted"] == possible for rank in found[name])


def running(events: list[tuple[bool, int]], chunks: int) -> list[tuple[int, ...]]:
    """Micro-batches of each chunk after each event."""
    numbers, result = [0] * chunks, []
    for is_forward, chunk in events:
        numbers[chunk] += 1 if is_forward else -1
        result.append(tuple(numbers))
    return result


def allowed(*values: int | None) -> Schedule | None:
    try:
        return Schedule(*values)
    except ValueError:
        return None


@functools.cache
def every_schedule() -> list[Schedule]:
    """All up to 5 stages, 12 micro-batches, 4 chunks."""
    groups = {v: [None, *range(1, 13)] if v > 1 else [None] for v in range(1, 5)}
    values = (
        (p, m, v, group)
        for p, m, v in itertools.product(range(1, 6), range(1, 13), groups)
        for group in groups[v]
    )
    return [schedule for some in values if (schedule := allowed(*some))]


def test_the_figures_of_the_paper():
    schedule = Schedule(stages=4, micro_batches=8, chunks=2)
    assert [schedule.counts(stage) for stage in range(4)] == [11, 9, 7, 5]
    schedule = Schedule(stages=4, micro_batches=3)
    assert [schedule.counts(stage) for stage in range(4)] == [3, 3, 2, 1]


def test_counts_have_a_closed_form():
    every = every_schedule()
    assert len(every) > 300 and any(s.chunks == 4 and s.group > s.stages for s in every)
    for s in every:
        for stage in range(s.stages):
            later = s.stages - stage - 1
            expected = min(later + 1, s.micro_batches)
            if s.chunks > 1:
                expected = min(2 * later + (s.chunks - 1) * s.group + 1, s.micro_batches * s.chunks)
            assert s.counts(stage) == expected, (s, stage)


def test_each_forward_has_its_backward():
    for s in every_schedule():
        for stage in range(s.stages):
            events = list(s.events(stage))
            each = {(way, chunk): s.micro_batches for way in (True, False) for chunk in range(s.chunks)}
            assert Counter(events) == each, (s, stage)
            after = running(events, s.chunks)
            assert events[0] == (True, 0) and events[-1] == (False, 0)
            assert min(map(min, after)) == 0 and not any(after[-1]), (s, stage)


def test_the_stages_can_run_together():
    """Each waits for what it needs from the others, and all come to their end."""
    for s in every_schedule():
        last = s.stages * s.chunks - 1  # of the parts of the model, chunk by chunk of all stages
        todo = [deque(s.events(stage)) for stage in range(s.stages)]
        done: Counter = Counter()  # by (is it a forward, part)
        moved = True
        while moved:
            moved = False
            for stage, events in enumerate(todo):
                while events:
                    is_forward, chunk = events[0]
                    part = chunk * s.stages + stage
                    if is_forward:
                        ready = part == 0 or done[True, part - 1] > done[True, part]
                    else:
                        ready = done[True, part] > done[False, part]
                        ready &= part == last or done[False, part + 1] > done[False, part]
                    if not ready:
                        break
                    events.popleft()
                    done[is_forward, part] += 1
                    moved = True
        assert not any(todo), s


def test_what_is_held_together():
    # Two stages, two chunks, four micro-batches. Stage 0 runs 4 forwards first: f0 f0 f1 f1, then by turns
    # f0 b1, f0 b1, f1 b0, f1 b0, then b1 b1 b0 b0.
    schedule = Schedule(2, 4, 2)
    order = [(True, 0)] * 2 + [(True, 1)] * 2
    order += [(True, 0), (False, 1)] * 2 + [(True, 1), (False, 0)] * 2
    order += [(False, 1)] * 2 + [(False, 0)] * 2
    assert list(schedule.events(0)) == order
    assert schedule.held(0) == ((3, 2), (4, 1)) and schedule.held(1) == ((2, 1), (3, 0))
    assert schedule.peak(0, (10, 1)) == 41 and schedule.peak(0, (1, 10)) == 23
    assert schedule.peak(0, [0.5, 0.5]) == 2.5 and schedule.peak(1, [0, 0]) == 0
    assert Schedule(1, 7).held(0) == ((1,),) and Schedule(1, 7).peak(0, [3.0]) == 3.0


def test_held_is_the_frontier(seed):
    draw = random.Random(seed)
    for s in every_schedule():
        for stage in range(s.stages):
            after, held = set(running(list(s.events(stage)), s.chunks)), set(s.held(stage))
            frontier = {one for one in after if not any(one != o and covers(o, one) for o in after)}
            assert held == frontier and len(s.held(stage)) == len(held), (s, stage)
            sizes = [draw.random() for _ in range(s.chunks)]
            most = max(sum(n * size for n, size in zip(one, sizes, strict=True)) for one in after)
            assert s.peak(stage, sizes) == pytest.approx(most), (s, stage, sizes)


def covers(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def test_more_micro_batches_hold_more():
    for s in every_schedule():
        larger = allowed(s.stages, s.micro_batches + s.stages, s.chunks)
        if s.group_size is not None or larger is None:
            continue
        for stage in range(s.stages):
            assert all(any(covers(b, a) for b in larger.held(stage)) for a in s.held(stage)), (s, stage)
    # Not so with groups that do not divide them, which is why the default group is all that is promised.
    assert Schedule(2, 5, 2, 3).held(1)[0] == (2, 2) and Schedule(2, 6, 2, 3).held(1) == ((3, 1), (4, 0))


def test_it_makes_no_tensor_and_no_process_group():
    class Forbidden(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    with Forbidden():
        assert Schedule(3, 7, 2, 7).peak(2, [1, 2]) > 0
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("values,message", [
    ((0, 4), "--pipeline-model-parallel-size 0"), ((2, 0), "--global-batch-size.* 0 micro-batches"),
    ((2, 4, 0), "--num-virtual-stages-per-pipeline-rank.* 0 chunks"),
    ((1, 4, 2), "raise --pipeline-model-parallel-size"),
    ((4, 2, 2), "--global-batch-size.* fewer than the 4"),
    ((4, 8, 2, 3), "-virtual-pipeline-stage 3: .* from 4, .* to 8"),
    ((4, 8, 2, 9), "-virtual-pipeline-stage 9: .* from 4, .* to 8"),
    ((4, 6, 2), "-virtual-pipeline-stage 4: .* would have 2.* set it to 6"),
    ((4, 9, 2, 6), "-virtual-pipeline-stage 6: .* would have 3.* set it to 9"),
])  # fmt: skip
def test_what_cannot_run_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*values)


def test_the_remedies_run():
    assert Schedule(4, 6, 2, 6).counts(3) == 7 and Schedule(4, 9, 2, 9) and Schedule(4, 9, 2, 5)


@pytest.mark.parametrize("group_size", [0, 1, 4, 9])
def test_without_interleaving_there_are_no_groups(group_size):
    plain, grouped = Schedule(4, 6), Schedule(4, 6, 1, group_size)
    assert all(list(grouped.events(stage)) == list(plain.events(stage)) for stage in range(4))


@pytest.mark.parametrize("stage", [-1, 2])
def test_a_stage_that_there_is_not(stage):
    with pytest.raises(ValueError, match=f"stage {stage}: there are 2"):
        Schedule(2, 4).events(stage)  # at once, not when the first event is asked for


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_bytes_that_are_none(sizes):
    with pytest.raises(ValueError, match="bytes of"):
        Schedule(2, 4, 2).peak(0, sizes)


def test_paper_bits():
    counts = [11, 9, 7, 5]
    bits = paper_bits(counts)
    assert bits == [4, 5, 6, 8]
    assert [b * n for b, n in zip(bits, counts, strict=True)] == [44, 45, 42, 40]  # 45 is over 44
    assert paper_bits([8, 7]) == [4, 5] and paper_bits([9, 8]) == [4, 4]  # 4.57, and 4.5 between two
    assert paper_bits([7, 4]) == [4, 6] and paper_bits([4, 5, 1]) == [4, 4, 8]  # 7 between 6 and 8
    assert paper_bits([4, 2, 1], base=3) == [3, 6, 8]
    with pytest.raises(ValueError, match="counts"):
        paper_bits([])
    with pytest.raises(ValueError, match="counts"):
        paper_bits([3, 0])
    with pytest.raises(ValueError, match="7 bits"):
        paper_bits(counts, base=7)


def test_stage_bits():
    assert stage_bits(Schedule(4, 8, 2)) == [4, 4, 6, 8]
    assert stage_bits(Schedule(4, 8)) == [4, 5, 8, 8]
    assert stage_bits(Schedule(4, 8, 2), widths=(4, 5, 7)) == [4, 4, 5, 7]
    assert stage_bits(Schedule(4, 8, 2), base=3) == [3, 3, 4, 6]
    assert stage_bits(Schedule(1, 8)) == [4]
    with pytest.raises(ValueError, match="7 bits"):
        stage_bits(Schedule(4, 8), base=7)
    for s in every_schedule():
        counts = [s.counts(stage) for stage in range(s.stages)]
        for bits, n in zip(stage_bits(s), counts, strict=True):
            exact = max(4, 4 * counts[0] // n)
            assert bits * n <= 4 * counts[0] and bits == max(b for b in (4, 5, 6, 8) if b <= exact), s


@pytest.mark.parametrize("layout,stages", [
    ("Et*3|t*3|t*3|t*3L", 2), ("E|t|tt|t*4,L", 2), ("E|(t|)*5,L", 1), ("Ett|t|L", 3), ("Et|tt|ttt|t*4,L", 4),
])  # fmt: skip
def test_layers_of_a_layout(layout, stages, monkeypatch):
    """Those that Megatron's layout gives, which asks the process groups how many chunks there are."""
    from types import SimpleNamespace

    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from agoq_megatron.model.stages import layers_of

    found = PipelineParallelLayerLayout(layout, stages)
    chunks = found.virtual_pipeline_model_parallel_size
    config = SimpleNamespace(
        pipeline_model_parallel_layout=found, pipeline_model_parallel_size=stages, num_layers=7,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, mtp_num_layers=None,
    )  # fmt: skip
    of_all = [layers_of(config, stage) for stage in range(stages)]  # without process groups
    name = "get_virtual_pipeline_model_parallel_world_size"
    monkeypatch.setattr(parallel_state, name, lambda: config.virtual_pipeline_model_parallel_size)
    for stage in range(stages):
        theirs = [
            [number + 1 for number in found.get_layer_id_list(vp_stage=chunk, pp_rank=stage)]
            for chunk in range(chunks)
        ]
        assert of_all[stage] == theirs
    numbers = sorted(n for stage in of_all for part in stage for n in part)
    assert numbers == list(range(1, len(found.flatten_layout) - 1))

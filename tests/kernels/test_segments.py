"""Segments of packed sequences: what they are, and the kernels that take a vector of each off and add it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from agoq_kernels import fused, ops, segments
from agoq_kernels.formats import Format
from agoq_kernels.rotary import common_vectors, rotary_tables
from agoq_kernels.segments import AT_LEAST, by_token, most_segments, segment_bounds, segments_of
from agoq_kernels.triton import launchers

from tests.kernels.heads import DEVICE, Case, Torch, Triton, map_tensors, on_device

to_cpu = partial(map_tensors, function=torch.Tensor.cpu)
FORMAT = Format(8, "int_asym", 64)
ACROSS = Format(4, "int_asym", 128)
"""Its groups are of two heads."""


def random_ends(rng, s: int, documents: int) -> list[int]:
    cuts = torch.randint(1, max(s, 2), (documents - 1,), generator=rng).tolist()
    return sorted({*(c for c in cuts if c < s), s})


@pytest.mark.parametrize("s", [1, 7, AT_LEAST - 1, AT_LEAST, AT_LEAST + 1, 2 * AT_LEAST, 5 * AT_LEAST + 3])
def test_segments_are_whole_documents_of_enough_tokens(rng, s):
    for documents in (1, 2, 9, s):
        ends = random_ends(rng, s, documents)
        bounds = segment_bounds(ends, s)
        assert len(bounds) == most_segments(s) + 1
        assert bounds[0] == 0 and bounds[-1] == s and bounds == sorted(bounds)
        assert set(bounds) <= {0, *ends}
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        assert all(length == 0 or length >= min(AT_LEAST, s) for length in lengths)
        assert lengths[0]  # empty ones are at the end
        last = max(i for i, length in enumerate(lengths) if length)
        assert all(lengths[: last + 1])


def test_bounds_by_hand():
    assert segment_bounds([256, 512, 1024], 1024) == [0, 256, 512, 1024, 1024]
    assert segment_bounds([255, 300, 1000, 1024], 1024) == [0, 300, 1024, 1024, 1024]
    assert segment_bounds([3, 100], 100) == [0, 100]
    assert segment_bounds(list(range(1, 513)), 512) == [0, 256, 512]
    assert segment_bounds([512], 512) == [0, 512, 512]


@pytest.fixture
def short(monkeypatch):
    """Segments of 16 tokens or more, so that short sequences have several."""
    monkeypatch.setattr(segments, "AT_LEAST", 16)


def made(rng, s, b=2, documents=(5, 3)):
    rows = [random_ends(rng, s, n) for n in documents]
    return segments_of([i * s + end for i, ends in enumerate(rows) for end in ends], s, "cpu"), rows


def test_tokens_know_their_segment(rng):
    s, b = 1400, 3
    its, rows = made(rng, s, b, (9, 1, 4))
    k = most_segments(s)
    assert its.of_tokens.dtype == its.bounds.dtype == torch.int32
    for sequence, ends in enumerate(rows):
        bounds = segment_bounds(ends, s)
        assert its.bounds[sequence].tolist() == bounds
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            assert (its.of_tokens[start:end, sequence] == sequence * k + i).all()
    cut = its.first(300)
    assert cut.of_tokens.shape == (300, 1) and cut.bounds.max() == 300
    assert torch.equal(cut.of_tokens, its.of_tokens[:300, :1])


def random_qkv(rng, s, b, groups, r, d, rot):
    qkv = torch.randn(s, b, groups * (r + 2) * d, generator=rng)
    qkv += 5 * torch.randn(b, qkv.shape[2], generator=rng)  # what tokens share
    angles = 9 * torch.randn(s, 1, 1, rot, generator=rng)
    return qkv, rotary_tables(angles)


@pytest.mark.parametrize("interleaved", [False, True])
def test_vectors_are_those_of_the_segments_alone(rng, short, interleaved):
    s, b, groups, r, d = 45, 2, 2, 2, 32
    qkv, tables = random_qkv(rng, s, b, groups, r, d, 32)
    its, rows = made(rng, s, b)
    found = fused.common_vectors(qkv, groups, d, tables, interleaved, its.bounds)
    assert found.shape == (b * 2, groups * (r + 2), d) and found.dtype == torch.float32
    for sequence, ends in enumerate(rows):
        bounds = segment_bounds(ends, s)
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start == end:
                assert not found[sequence * 2 + i].any()
                continue
            turns = tuple(t[start:end] for t in tables)
            alone = common_vectors(qkv[start:end], groups, d, turns, interleaved)[sequence]
            assert torch.allclose(found[sequence * 2 + i], alone, atol=1e-6)
    there = on_device((qkv, tables, its.bounds))
    triton = to_cpu(launchers.common_vectors(*there[:2], groups, d, interleaved, there[2]))
    assert torch.allclose(triton, found, atol=2e-5)
    # A document of a whole sequence is a sequence: bit for bit.
    whole = segments_of([s, 2 * s], s, "cpu").bounds
    one = launchers.common_vectors(*there[:2], groups, d, interleaved, whole.to(DEVICE)).cpu()
    assert torch.equal(one[::2], launchers.common_vectors(*there[:2], groups, d, interleaved).cpu())


@pytest.mark.parametrize(
    "formats", [(FORMAT, FORMAT, FORMAT), (ACROSS, ACROSS, None), (None, FORMAT, ACROSS)]
)
@pytest.mark.parametrize("centre_key", [False, True])
def test_split_takes_off_each_tokens_own(rng, short, formats, centre_key):
    """Triton as torch; and, in torch, as if every token's vector had been taken off before."""
    s, b, groups, r, d = 37, 2, 2, 2, 64
    qkv, tables = random_qkv(rng, s, b, groups, r, d, 64)
    its, _ = made(rng, s, b)
    common = fused.common_vectors(qkv, groups, d, tables, False, its.bounds)
    rest = formats, (1, 2 << 40, 3), common, centre_key, its.of_tokens
    parts, packed = fused.split_qkv(qkv, groups, d, tables, False, *rest)
    there = on_device((qkv, tables, common, its.of_tokens))
    parts_, packed_ = to_cpu(
        launchers.split_qkv(*there[:2], groups, d, False, *rest[:2], there[2], centre_key, there[3])
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parts, parts_, strict=True))
    shifts = by_token(common, its.of_tokens).split([groups * r, groups, groups], 2)
    plain, _ = fused.split_qkv(qkv, groups, d, tables, False, (None,) * 3, (0,) * 3)
    assert torch.equal(parts[1], plain[1] - shifts[1] if centre_key and formats[1] else parts[1])
    for i, fmt in enumerate(formats):
        if fmt is None:
            continue
        expected = ops.quantize((plain[i] - shifts[i]).flatten(2), fmt, rest[1][i])
        assert all(torch.equal(a, b) for a, b in zip(packed[i], expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(packed_[i], expected, strict=True))
        flat = common.split([groups * r, groups, groups], 1)[i].flatten(1)
        for dtype in (torch.float32, torch.bfloat16):
            back = ops.dequantize(*packed[i], fmt, dtype, flat, its.of_tokens)
            on = on_device((packed[i], flat, its.of_tokens))
            assert torch.equal(launchers.dequantize(on[0], fmt, dtype, *on[1:]).cpu(), back)
            assert (back - plain[i].flatten(2)).norm() < 0.2 * (plain[i] - shifts[i]).norm()


def test_a_shift_that_does_not_fit_is_refused(rng):
    x = torch.randn(6, 2, 64, generator=rng)
    packed = ops.quantize(x, FORMAT)
    rows = torch.zeros(6, 2, dtype=torch.int32)
    for shift, its in ((torch.zeros(5, 64), None), (torch.zeros(5, 32), rows), (x[0], rows[:5])):
        with pytest.raises(ValueError, match="shift"):
            ops.dequantize(*packed, FORMAT, torch.float32, shift, its)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("fmt", [FORMAT, ACROSS])
def test_norms_of_heads(rng, short, kind, fmt):
    """Queries and keys with norms: forward, rebuilt, and gradients, as torch does; and as torch does for
    sequences that are one segment each."""
    case = Case(rng, kind, s=33, b=2)
    its, _ = made(rng, 33, 2, (9, 2))
    common = torch.randn(4, case.groups * (case.r + 2), case.d, generator=rng)
    found = []
    for implementation in (Torch, Triton):
        parts, packed = implementation.split(
            case.qkv, *case.layout, case.norm, case.parameters, (fmt,) * 3, (1, 2, 3), common,
            its.of_tokens,
        )  # fmt: skip
        kept = [type(k)(k.kept, k.fmt, k.shift, its.of_tokens) for k in case.kept(packed, fmt, common)]
        rest = case.d, case.tables, case.interleaved, case.norm
        made_again = [
            implementation.from_kept(kept[i], *rest, *case.parameters[2 * i : 2 * i + 2], torch.float32)
            for i in range(2)
        ]
        grad, sums = case.merge(implementation, kept)
        found.append((*parts, *itertools.chain(*packed), *made_again, grad, *sums))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)
    q, k = found[0][12:14]
    for again, part in ((q, found[0][0]), (k, found[0][1])):
        assert (again - part).norm() < 0.3 * part.norm()

"""Attention over ranks that share a sequence against one rank with all of it: four gloo ranks, many cases."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from agoq_kernels.attention import Pattern, attention, attention_backward
from agoq_kernels.blocks import block_attention, block_attention_backward, merge
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm
from launch import spawn_ranks

from agoq_megatron.autograd.attention import Attention
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.context.blocks import GatheredAttention, RingAttention
from agoq_megatron.autograd.context.codes import GradientCodes
from agoq_megatron.autograd.context.context import Context
from agoq_megatron.autograd.context.documents import PackedSequences
from agoq_megatron.autograd.context.heads import HeadExchange
from agoq_megatron.autograd.context.sequence import by_rank, chunks, in_order, piece
from agoq_megatron.autograd.context.wire import Wire, message, read, shapes_of
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.linear import Linear, LinearSpec
from agoq_megatron.autograd.packing import packing_of
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_OUTPUT, ATTENTION_SITES, QKV_SITES
from agoq_megatron.policy.policy import Rule
from tests.autograd.test_layer_gradients import one_rank

B, DIM, H = 2, 32, 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16 if DEVICE == "cuda" else torch.float64]
KEEP, AGAIN = Rule(keep=True), Rule()
INT8, TEN = (Rule(Format(bits, "int", 32, 8)) for bits in (8, 10))
RULES = {
    "off": (KEEP, KEEP, KEEP, KEEP), "agoq": (INT8, TEN, INT8, AGAIN), "again": (KEEP, KEEP, KEEP, AGAIN),
    "kept output": (INT8, INT8, INT8, KEEP),
}  # fmt: skip
# Ranks by which heads are exchanged, and ranks that attend block by block, and how.
KINDS = {
    "p2p": (1, 4, RingAttention), "all_gather": (1, 4, GatheredAttention), "a2a": (4, 1, None),
    "a2a+p2p": (2, 2, RingAttention), "p2p of 2": (1, 2, RingAttention),
    "all_gather of 2": (1, 2, GatheredAttention), "a2a of 2": (2, 1, None),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_query_sees_what_is_before_it(ranks):
    """The pieces of all pairs of ranks are the causal mask, each entry once."""
    rows = 6
    tokens = by_rank(torch.arange(ranks * rows), ranks)
    assert torch.equal(in_order(tokens), torch.arange(ranks * rows))
    times = torch.zeros(ranks * rows, ranks * rows, dtype=torch.int)
    for rank, other in itertools.product(range(ranks), repeat=2):
        first, second = (torch.arange(i * rows // 2, (i + 1) * rows // 2) for i in chunks(rank, ranks))
        assert torch.equal(tokens[rank], torch.cat((first, second)))
        queries, keys, causal, *_ = piece(rank, other, rows)
        q, k = tokens[rank][queries], tokens[other][keys]
        times[q[:, None], k] += (q[:, None] >= k).int() if causal else 1
    assert torch.equal(times, torch.ones_like(times).tril())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_query_sees_what_is_before_it_in_its_document(rng, ranks):
    """The same of packed sequences, by pairs of ranks and of keys that were gathered."""
    rows = 8
    s = ranks * rows
    inside = [torch.randint(1, s, (int(n),), generator=rng).tolist() for n in (0, 3, 9)]
    ends = tuple(tuple(sorted({*some, s})) for some in inside)
    tokens = by_rank(torch.arange(s), ranks)
    packed = PackedSequences(ends, torch.device("cpu"))
    expected = torch.zeros(len(ends), s, s, dtype=torch.int)
    for i, its in enumerate(ends):
        for start, end in itertools.pairwise((0, *its)):
            expected[i, start:end, start:end] = torch.ones(end - start, end - start).tril()
    for gathered in (False, True):
        times = torch.zeros_like(expected)
        for rank, other in itertools.product(range(ranks), range(1 if gathered else ranks)):
            keys = torch.arange(s) if gathered else tokens[other]
            pieces = packed.gathered(rank, ranks) if gathered else packed.pieces(rank, other, ranks)
            for part in pieces:
                q, k = tokens[rank][part.queries], keys[part.keys]
                sees = torch.ones(len(q), len(k), dtype=torch.int)
                if part.causal:
                    cuts = part.documents.cu_seqlens.tolist()
                    own = torch.searchsorted(torch.tensor(cuts), torch.arange(len(q)), right=True)
                    assert cuts[0] == 0 and cuts[-1] == len(q) == len(k)
                    assert part.documents.longest == max(b - a for a, b in itertools.pairwise(cuts))
                    sees = ((own[:, None] == own) & (q[:, None] >= k)).int()
                times[part.sequences, q[:, None], k] += sees
        assert torch.equal(times, expected)


def test_a_message_holds_tensors_of_all_kinds():
    sent = [
        torch.arange(7, dtype=torch.uint8), torch.randn(3, 2), torch.randn(5).bfloat16(), torch.randn(0, 4),
        torch.randn(4, 6, dtype=torch.float64).T,
    ]  # fmt: skip
    for x, y in zip(read(message(sent), shapes_of(sent)), sent, strict=True):
        assert x.shape == y.shape and torch.equal(x, y)


@pytest.mark.parametrize("window", [None, 3, 14], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_an_attention_are_merged(rng, dtype, window):
    """Chunks of queries, to the keys before them in one block under the causal mask (or its window), or in
    two, and their gradients from the merged output."""
    s, half, n, g = 32, 8, 6, 2
    q, grad = (torch.randn(s, B, n, DIM, generator=rng).to(DEVICE, dtype) for _ in range(2))
    k, v = (torch.randn(s, B, g, DIM, generator=rng).to(DEVICE, dtype) for _ in range(2))
    scale = 1 / math.sqrt(DIM)
    out, lse = attention(q, k, v, scale, Pattern(window))
    expected = attention_backward(grad, q, k, v, out, lse, scale, Pattern(window))
    lse = lse.reshape(B, n, -1)[:, :, :s]  # whatever the kernel's own layout
    found = [torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) for x in (q, k, v)]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for chunk in range(s // half):
        rows = slice(chunk * half, (chunk + 1) * half)
        first = 0 if window is None else max(0, rows.start - window)
        blocks = [(slice(first, rows.stop), True)]
        if window is None and chunk:
            blocks = [(rows, True), (slice(0, rows.start), False)]
        whole = its_lse = None
        for keys, causal in blocks:
            some, some_lse = block_attention(q[rows], k[keys], v[keys], scale, causal, window)
            if whole is None:
                whole, its_lse = some.to(found[0].dtype), some_lse
            else:
                merge(whole, its_lse, slice(0, half), some, some_lse)
        torch.testing.assert_close(whole, out[rows].to(whole.dtype), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(its_lse, lse[:, :, rows], rtol=tolerance, atol=tolerance)
        for keys, causal in blocks:
            grads = block_attention_backward(
                grad[rows], q[rows], k[keys], v[keys], whole.to(dtype), its_lse, scale, causal, window
            )
            for total, more, part in zip(found, grads, (rows, keys, keys), strict=True):
                total[part] += more
    for total, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(total, reference.to(total.dtype), rtol=tolerance, atol=4 * tolerance)


def spec_of(rules, heads, groups, window, sinks, norm, context=None):
    own = dict(zip((*QKV_SITES, ATTENTION_OUTPUT), rules, strict=True))
    return AttentionLinearSpec(
        *(SavedTensor(site, 1, own[site], run=Run()) for site in ATTENTION_SITES), groups=groups,
        head_dim=DIM, backend=LocalAttention(1 / math.sqrt(DIM), window), interleaved=False, recompute=False,
        heads=Rotated(sinks=sinks) if norm is None else Normed(norm), context=context,
    )  # fmt: skip


def call(spec, leaves, angles, sink, packing=None, composed=False):
    qkv, weight, *parameters = leaves
    named = dict(zip(NORM_PARAMETERS, parameters, strict=False)) | {"sink": sink, "packing": packing}
    if not composed:
        return AttentionLinear.call(qkv=qkv, angles=angles, weight=weight, spec=spec, keeps=True, **named)
    out, kept = Attention.call(qkv=qkv, angles=angles, spec=spec, keeps=True, **named)
    return Linear.call(x=out, weight=weight, kept=kept, spec=LinearSpec(one_rank(), False))


def relative(a, b, least=1e-30):
    """``least``: of the reference's norm, where it may be nothing but what sums have left."""
    return ((a - b).norm() / b.norm().clamp_min(least)).item()


class Case:
    """One sequence, cut over the ranks of a context."""

    def __init__(self, groups_of, kind: str, rng):
        self.kind, (self.head_ranks, self.block_ranks, blocks) = kind, KINDS[kind]
        self.ranks, self.rng = self.head_ranks * self.block_ranks, rng
        self.rank = dist.get_rank() % self.ranks
        wires = [Wire(groups_of(self.head_ranks, 1)), Wire(groups_of(self.block_ranks, self.head_ranks))]
        self.whole_wire = Wire(groups_of(self.ranks, 1))
        self.wires = wires

        def context(window, bits=16):
            exchange = HeadExchange(wires[0]) if self.head_ranks > 1 else None
            if blocks is None:
                return Context(exchange)
            scale = 1 / math.sqrt(DIM)
            more = {"codes": GradientCodes(bits)} | ({} if blocks is RingAttention else {"window": window})
            return Context(exchange, blocks(scale, wires[1], **more))

        self.context = context

    def mine(self, x):
        """Of ``[s, ...]``, what this rank holds."""
        return by_rank(x, self.ranks)[self.rank].contiguous()

    def compare(self, rules, *, window=None, sinks=False, norm=None, dtype=torch.float32, rotary=True,
                documents=None, composed=False, bits=16):  # fmt: skip
        """Largest relative errors: output, gradients."""
        rng, each = self.rng, int(torch.randint(1, 4, (1,), generator=self.rng))
        groups = self.head_ranks * int(torch.randint(1, 3, (1,), generator=rng))
        heads = groups * each
        rows = 2 * int(torch.randint(2, 7, (1,), generator=rng))
        s, width = rows * self.ranks, (heads + 2 * groups) * DIM
        qkv = torch.randn(s, B, width, generator=rng) + 2 * torch.randn(1, B, width, generator=rng)
        half = torch.rand(s, 1, 1, DIM // 2, generator=rng) * 3
        angles = torch.cat((half, half), -1) if rotary else None
        leaves = [qkv, torch.randn(H, heads * DIM, generator=rng) / math.sqrt(heads * DIM)]
        if norm is not None:
            leaves += [1 + torch.randn(DIM, generator=rng) / 5, None, 1 + torch.randn(DIM, generator=rng) / 5]
        sink = torch.randn(heads, generator=rng, dtype=torch.float32) if sinks else None
        grad = torch.randn(s, B, H, generator=rng).to(dtype)
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in leaves]
        sink = None if sink is None else sink.to(dtype).requires_grad_()
        whole_packing = None if documents is None else packing_of(documents(s), s, "cpu")

        spec = spec_of(rules, heads, groups, window, sinks, norm)
        expected = call(spec, leaves, angles, sink, whole_packing)
        wanted = [x for x in (*leaves, sink) if x is not None]
        expected_grads = torch.autograd.grad(expected, wanted, grad)

        own = [self.mine(leaves[0].detach()).requires_grad_(), *leaves[1:]]
        its_angles = None if angles is None else angles if documents else self.mine(angles)
        spec = replace(spec, context=self.context(window, bits))
        out = call(spec, own, its_angles, sink, whole_packing, composed)
        grads = torch.autograd.grad(out, [x for x in (*own, sink) if x is not None], self.mine(grad))
        errors = [relative(out, self.mine(expected)), relative(grads[0], self.mine(expected_grads[0]))]
        least = 0.02 * expected_grads[1].norm().item()  # sinks and norms have few numbers, which may cancel
        for x, reference in zip(grads[1:], expected_grads[1:], strict=True):
            total = torch.stack([part for (part,) in self.whole_wire.gather([x.double()])]).sum(0)
            errors.append(relative(total, reference, least))
        return max(errors[:1]), max(errors[1:])


def groups_by_size():
    """Process groups of so many ranks, so far apart."""
    made = {}
    for size, apart in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 2), (1, 4)):
        for start in range(4):
            ranks = [start + i * apart for i in range(size)]
            block = size * apart
            if ranks[-1] < 4 and start % block < apart:
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    made[size, apart] = group
    return lambda size, apart: made[size, apart]


def cases_of(case: Case, rng: torch.Generator) -> list[tuple[str, float, dict]]:
    """What is tried of a context: what is kept (its first words are one of RULES), how near it must come,
    and arguments of ``Case.compare``."""
    normed = HeadNorm("RMSNorm", 1e-5)

    def cuts(s: int) -> list[int]:
        inside = torch.randint(1, B * s, (int(torch.randint(0, 6, (1,), generator=rng)),), generator=rng)
        return sorted({0, *inside.tolist(), *range(s, B * s + 1, s)})

    # Where codes are compared they are the same as on one rank, but where the last bit of a mean moves some
    # over an edge. Of documents one rank takes off what keys share by segment, several for all.
    segments = 6e-3 if case.block_ranks == 1 else 3e-2
    found = [
        ("off", 1e-5, {}),
        ("agoq", 6e-3, {}),
        ("off, sink", 1e-5, {"sinks": True, "composed": True}),
        ("off, norms", 1e-5, {"norm": normed}),
        ("again", 1e-5, {"rotary": False}),
        ("agoq, sink", 6e-3, {"sinks": True}),
        ("agoq, norms", 6e-3, {"norm": normed, "composed": True}),
        ("kept output", 6e-3, {}),
        ("off, gradients in 8 bits", 1e-2, {"bits": 8}),
        ("agoq, in 16 bits", 6e-2, {"dtype": torch.bfloat16}),
        ("off, documents", 1e-5, {"documents": cuts, "sinks": True}),
        ("again, documents", 1e-5, {"documents": cuts, "norm": normed}),
        ("agoq, documents", segments, {"documents": cuts}),
    ]
    if "p2p" not in case.kind:
        some = int(torch.randint(1, 20, (1,), generator=rng))
        found += [
            ("off, window", 1e-5, {"window": 5, "sinks": True}),
            ("agoq, window", 6e-3, {"window": some}),
        ]
    return found


def run_ranks(rank: int, store: str, seed: int, times: int, kinds: list[str], most: int = 99) -> None:
    """On each rank; ``most``: cases of a kind, others in other sessions."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    groups_of = groups_by_size()
    for time, kind in itertools.product(range(times), kinds):
        rng = torch.Generator().manual_seed(seed + 1000 * time + list(KINDS).index(kind))
        case = Case(groups_of, kind, rng)
        cases = cases_of(case, rng)
        later = torch.randperm(len(cases) - 2, generator=rng)[: most - 2] + 2
        for i in (0, 1, *later.tolist()):
            what, tolerance, more = cases[i]
            found = case.compare(RULES[what.split(",")[0]], **more)
            assert max(found) < tolerance, (kind, what, more, found)
    dist.barrier()
    dist.destroy_process_group()


def test_as_one_rank(tmp_path, seed, request):
    exhaustive = request.config.getoption("--exhaustive")
    times, kinds, most = (6, list(KINDS), 99) if exhaustive else (1, list(KINDS)[:4], 6)
    spawn_ranks(4, run_ranks, str(tmp_path / "store"), seed, times, kinds, most)

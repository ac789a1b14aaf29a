"""Sequences packed of documents: each as if it were alone, and gradients those at what was kept of it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from agoq_kernels import segments

from agoq_megatron.autograd.packing import packing_of
from tests.autograd import test_layer_gradients as layers
from tests.autograd.test_layer_gradients import (
    AGAIN,
    KEPT_OUTPUTS,
    MIXED,
    OFF,
    compare,
    our_layer,
    parameters,
)

S = 11
ROWS = {
    "some": [[3, 7, 11], [11], [1, 2, 9, 11]],
    "one token each": [list(range(1, 12))] * 3,
    "whole sequences": [[11]] * 3,
    "a last one of one token": [[10, 11], [4, 10, 11], [5, 11]],
}


def bounds_of(rows, s=S):
    return [0, *(i * s + end for i, ends in enumerate(rows) for end in ends)]


def places(rows):
    """(sequence, slice) of each document."""
    for i, ends in enumerate(rows):
        for start, end in itertools.pairwise([0, *ends]):
            yield i, slice(start, end)


def document_scores(rows):
    def scores(q, k):
        r = q.shape[2] // k.shape[2]
        z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(r, 2)) / math.sqrt(q.shape[-1])
        seen = torch.zeros(len(rows), 1, len(q), len(q), dtype=torch.bool)
        for i, place in places(rows):
            seen[i, 0, place, place] = True
        return z.masked_fill(~(seen & torch.ones(len(q), len(q), dtype=torch.bool).tril()), -math.inf)

    return scores


def document_shared(rows):
    """Of each segment, the mean of its second half."""

    def shared(t):
        found = torch.zeros_like(t)
        for i, ends in enumerate(rows):
            for start, end in itertools.pairwise(segments.segment_bounds(ends, len(t))):
                if end > start:
                    found[start:end, i] = t[start + (end - start) // 2 : end, i].mean(0)
        return found

    return shared


@pytest.mark.supports("attention mask by document", "packed sequences by document")
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("of_heads", [None, "RMSNorm"])
@pytest.mark.parametrize(
    "rules", [OFF, MIXED, AGAIN, KEPT_OUTPUTS], ids=["off", "mixed", "again", "kept_outputs"]
)
def test_gradients_at_what_is_kept(rng, monkeypatch, rules, of_heads, rows):
    """As of a whole sequence, with a mask, and vectors of each segment (here of three tokens or more)."""
    if of_heads and rows is ROWS["one token each"]:
        pytest.skip("a softmax of one token has no gradient to compare")
    monkeypatch.setattr(segments, "AT_LEAST", 3)
    monkeypatch.setattr(layers, "scores", document_scores(rows))
    monkeypatch.setattr(layers, "shared", document_shared(rows))
    packing = packing_of(bounds_of(rows), S, "cpu", S)
    shape = (6, 2, 32)
    compare(rng, monkeypatch, rules, "RMSNorm", "swiglu", shape, True, 64, 96, of_heads, packing)


def gradients(p, x, grad, rules, packing=None, head_dim=32):
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *(t for t in p.values() if getattr(t, "requires_grad", False))]
    y = our_layer(leaf, p, rules, (6, 2, head_dim), "RMSNorm", "swiglu", packing=packing)
    return y.detach(), torch.autograd.grad(y, wanted, grad)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("rules,bound", [(OFF, 1e-5), (AGAIN, 0.2)], ids=["off", "again"])
def test_documents_are_as_if_alone(rng, rules, bound, rows):
    p = parameters(rng, 64, 96, (6, 2, 32), "RMSNorm", "swiglu", True, torch.float32)
    p["angles"] = torch.arange(S)[:, None, None, None] * p["angles"][1]  # of tokens at equal distances
    x, grad = torch.randn(2, S, 3, 64, generator=rng)
    y, (found, *of_weights) = gradients(p, x, grad, rules, packing_of(bounds_of(rows), S, "cpu", S))
    sums = [torch.zeros_like(g) for g in of_weights]
    alone, alone_grad = torch.empty_like(y), torch.empty_like(x)
    for i, place in places(rows):
        its = {**p, "angles": p["angles"][: place.stop - place.start]}
        y_, (found_, *rest) = gradients(its, x[place, i : i + 1], grad[place, i : i + 1], OFF)
        alone[place, i : i + 1], alone_grad[place, i : i + 1] = y_, found_
        sums = [a + b for a, b in zip(sums, rest, strict=True)]
    assert (y - alone).norm() < 1e-5 * alone.norm()
    for a, b in zip([found, *of_weights], [alone_grad, *sums], strict=True):
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize("rules", [OFF, MIXED, AGAIN], ids=["off", "mixed", "again"])
def test_no_document_sees_another(rng, rules):
    """Not by a bit: of the gradient of one, nothing reaches others; and nothing of others changes it."""
    rows = ROWS["some"]
    p = parameters(rng, 64, 96, (6, 2, 32), "RMSNorm", "swiglu", True, torch.float32)
    x, grad = torch.randn(2, S, 3, 64, generator=rng)
    packing = packing_of(bounds_of(rows), S, "cpu", S)
    for i, place in places(rows):
        only = torch.zeros_like(grad)
        only[place, i] = grad[place, i]
        _, (found, *_) = gradients(p, x, only, rules, packing)
        assert found[place, i].abs().sum() > 0
        found[place, i] = 0
        assert not found.any()
        other = torch.randn(S, 3, 64, generator=rng)
        other[place, i] = x[place, i]
        outputs = [gradients(p, it, grad, rules, packing)[0][place, i] for it in (x, other)]
        # With statistics of this pass its keys are less what its segment shares.
        assert torch.allclose(*outputs, atol=1e-5) if rules is MIXED else torch.equal(*outputs)


def test_angles_of_the_longest_document(rng):
    """As Megatron gives them to ``thd``: each document turns from the first angle on."""
    p = parameters(rng, 64, 96, (6, 2, 32), "RMSNorm", "swiglu", True, torch.float32)
    x, grad = torch.randn(2, S, 1, 64, generator=rng)
    ends = [4, 5, 11]
    y, (found, *_) = gradients(
        {**p, "angles": p["angles"][:7]}, x, grad, OFF, packing_of([0, *ends], S, "cpu", 7)
    )
    for start, end in itertools.pairwise([0, *ends]):
        place = slice(start, end)
        its = {**p, "angles": p["angles"][: end - start]}
        y_, (found_, *_) = gradients(its, x[place], grad[place], OFF)
        assert (y[place] - y_).norm() < 1e-5 * y_.norm()
        assert (found[place] - found_).norm() < 1e-5 * found_.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("of_heads", [None, "RMSNorm"])
@pytest.mark.parametrize("rules", [OFF, MIXED, AGAIN], ids=["off", "mixed", "again"])
def test_on_a_gpu(rng, rules, of_heads):
    """The kernels there find what a CPU finds in FP32, and bit for bit no gradient across documents."""
    s, rows = 700, [[1, 300, 301, 640, 700], [700], [256, 511, 700]]
    p = parameters(rng, 64, 96, (6, 2, 64), "RMSNorm", "swiglu", True, torch.float32, of_heads)
    p["angles"] = torch.arange(s)[:, None, None, None] * p["angles"][1] / 20
    x, grad = torch.randn(2, s, 3, 64, generator=rng)
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        its = {
            k: t if not isinstance(t, torch.Tensor) else t.detach().to(device, dtype) for k, t in p.items()
        }
        its = {
            k: t if not isinstance(t, torch.Tensor) else t.requires_grad_(k != "angles")
            for k, t in its.items()
        }
        its["angles"] = p["angles"].to(device)
        packing, mine = packing_of(bounds_of(rows, s), s, device, s), grad.to(device, dtype)
        run = x.to(device, dtype), mine, rules, packing, 64
        y, grads = gradients(its, *run)
        found.append([y.cpu().float(), *(g.cpu().float() for g in grads)])
    for exact, held in zip(*found, strict=True):
        assert (held - exact).norm() < 0.2 * exact.norm()
    for i, place in places(rows):
        only = torch.zeros_like(mine)
        only[place, i] = mine[place, i]
        _, (flowing, *_) = gradients(its, run[0], only, rules, packing, 64)
        flowing[place, i] = 0
        assert not flowing.any()


def test_bounds_that_cannot_be():
    with pytest.raises(ValueError, match="beyond token 11"):
        packing_of([0, 5, 15, 22], S, "cpu")
    with pytest.raises(ValueError, match="of 7 tokens, and rotary angles of 6"):
        packing_of([0, 4, 11], S, "cpu", 6)
    with pytest.raises(ValueError, match="2 sequences"):
        packing_of([0, 4, 11, 22], S, "cpu", 7)


@pytest.mark.parametrize("tokens,ends", [(5, [3, 5]), (S, [3, 7, 11]), (2048, [3, 7, 11])])
def test_the_first_tokens(rng, tokens, ends):
    """Of which gradients are compared in training: as if the rest had not been."""
    assert packing_of([0, 3, 7, S], S, "cpu", 4).first(5).positions.tolist() == [0, 1, 2, 0, 1]
    s, rows = min(tokens, S), [[3, 7, 11], [2, 11]]
    packing = packing_of(bounds_of(rows), S, "cpu", S).first(tokens)
    p = parameters(rng, 64, 96, (6, 2, 32), "RMSNorm", "swiglu", True, torch.float32)
    p["angles"] = p["angles"][:s]
    x, grad = torch.randn(2, s, 1, 64, generator=rng)
    for rules in (OFF, AGAIN):
        a, b = (gradients(p, x, grad, rules, it) for it in (packing, packing_of([0, *ends], s, "cpu", s)))
        assert torch.equal(a[0], b[0])
        assert all(torch.allclose(u, v, atol=1e-6) for u, v in zip(a[1], b[1], strict=True))


def params(**more):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    return PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, **more})


WRONG = {
    "another format": ({"qkv_format": "bshd"}, "'bshd'"),
    "none": ({"cu_seqlens_q": None, "cu_seqlens_kv": None}, "cu_seqlens_q is missing"),
    "keys of other tokens": ({"cu_seqlens_kv": torch.tensor([0, 5, 11])}, "cu_seqlens_kv differs"),
    "too few": ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, "cu_seqlens_kv differs|ends at 9"),
    "floats": ({"cu_seqlens_q": torch.tensor([0.0, 11.0])}, "takes integers"),
    "two axes": ({"cu_seqlens_q": torch.tensor([[0, 11]])}, "takes integers"),
    "falling": ({"cu_seqlens_q": torch.tensor([0, 8, 4, 11]), "cu_seqlens_kv": None}, "does not rise"),
    "not from 0": ({"cu_seqlens_q": torch.tensor([1, 11]), "cu_seqlens_kv": None}, "does not rise from 0"),
    "short of the tokens": ({"cu_seqlens_q": torch.tensor([0, 9]), "cu_seqlens_kv": None}, "ends at 9"),
    "no room": (
        {"cu_seqlens_q_padded": torch.tensor([0, 3, 11])}, "longer than its place",
    ),
    "context parallelism": ({"local_cp_size": 2}, "context parallelism"),
    "ranks": ({"cp_group": SimpleNamespace(size=lambda: 2)}, "context parallelism"),
}  # fmt: skip


@pytest.mark.parametrize("given,said", WRONG.values(), ids=WRONG.keys())
def test_wrong_parameters_are_refused(given, said):
    from agoq_megatron.modules.packing import packing_from

    with pytest.raises((ValueError, NotImplementedError), match=said):
        packing_from(params(**given), S, 1, torch.device("cpu"), S)


def test_parameters_of_megatron():
    from agoq_megatron.modules.packing import packing_from

    device = torch.device("cpu")
    its = params()
    packing = packing_from(its, S, 1, device, S)
    assert packing.documents.cu_seqlens.tolist() == [0, 4, 11] and packing.documents.longest == 7
    assert packing.positions is None and packing_from(its, S, 1, device, S) is packing
    assert packing_from(its, S, 1, device, 7).positions.tolist() == [*range(4), *range(7)]
    # Padding between documents belongs to the one before; bounds that are repeated are none.
    padded = torch.tensor([0, 6, 11, 11])
    own = torch.tensor([0, 4, 8, 8])
    packing = packing_from(
        params(cu_seqlens_q=own, cu_seqlens_kv=own, cu_seqlens_q_padded=padded), S, 1, device, None
    )
    assert packing.documents.cu_seqlens.tolist() == [0, 6, 11] and packing.documents.longest == 6


def test_further_tokens_are_refused():
    """How Megatron shifts labels at the ends of documents has not been compared with anything here."""
    from agoq_megatron.modules.attention import SelfAttention

    layer = SimpleNamespace(config=SimpleNamespace(mtp_num_layers=1))
    with pytest.raises(NotImplementedError, match="packed_seq_params with multi-token prediction"):
        SelfAttention.forward(layer, torch.zeros(S, 1, 8), packed_seq_params=params())

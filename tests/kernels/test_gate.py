"""Gates of an attention's output: the plain formula in FP64, torch and Triton; and the projection around them
is split as one without gates.

On a GPU the compiled kernels run, elsewhere Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")

from agoq_kernels import fused, gate, head_norm  # noqa: E402
from agoq_kernels.formats import Format  # noqa: E402
from agoq_kernels.head_norm import HeadNorm, KeptHeads  # noqa: E402
from agoq_kernels.ops import dequantize  # noqa: E402
from agoq_kernels.rotary import rotary_tables  # noqa: E402
from agoq_kernels.segments import segments_of  # noqa: E402
from agoq_kernels.triton import launchers  # noqa: E402

from tests.kernels.heads import DEVICE, on_device  # noqa: E402
from tests.kernels.test_triton import DTYPES, FORMATS, PRECISION, close, same, some  # noqa: E402

SHAPES = ((2, 3, 64), (3, 1, 128), (1, 2, 96), (2, 2, 24), (4, 1, 8))
"""Groups, queries a group, features a head."""


@pytest.fixture
def draw(rng):
    return lambda *shape, dtype: torch.randn(*shape, generator=rng).to(dtype)


def without_gates(qkv, groups, r, d):
    """The projection as one without gates has it."""
    grouped = qkv.unflatten(2, (groups, 2 * r + 2, d))
    return torch.cat((grouped[..., :r, :], grouped[..., 2 * r :, :]), 3).flatten(2)


def oracle(out, gates, grad):
    """In FP64: the product, gradients of both."""
    out, gates = (x.double().requires_grad_() for x in (out, gates))
    product = out / (1 + (-gates).exp())
    return product.detach(), *torch.autograd.grad(product, (out, gates), grad.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_product_and_gradients(fmt, dtype, draw, rng):
    shapes = [it for it in SHAPES if fmt is None or it[0] * it[1] * it[2] % fmt.group == 0]
    for groups, r, d in some(shapes, rng, 2):
        s, b, n = 3, 2, groups * r * d
        qkv, out = 3 * draw(s, b, groups * (2 * r + 2) * d, dtype=dtype), draw(s, b, n, dtype=dtype)
        gates = qkv.unflatten(2, (groups, 2 * r + 2, d))[..., r : 2 * r, :].flatten(2)
        assert torch.equal(gate.gates_of(qkv, groups, d), gates)
        grad, key = draw(s, b, n, dtype=dtype), 5 << 40
        there, product = on_device(qkv), oracle(out, gates, grad)[0]
        found = {}
        for name, module, x, z in (("torch", gate, out, qkv), ("triton", launchers, on_device(out), there)):
            gated, packed = module.gate_forward(x, z, groups, d, fmt, key, False)
            close(gated, product, dtype)
            over = x.clone()
            again, _ = module.gate_forward(over, z, groups, d, fmt, key, True)
            assert again.data_ptr() == over.data_ptr() and torch.equal(over, gated)
            found[name] = packed
        kept = fused.kept_as_is(gates) if fmt is None else found["torch"]
        if fmt is not None:
            same(found["triton"], found["torch"])
            gates = dequantize(*kept, fmt, torch.float32)
        product, of_out, of_gates = oracle(out, gates, grad)
        for module, move in ((gate, lambda t: t), (launchers, on_device)):
            x, mine = move(out), tuple(map(move, kept))
            close(module.gate_from_kept(x, mine, fmt), product, dtype)
            over, whole = move(grad).clone(), move(torch.full_like(qkv, torch.nan))
            module.gate_backward(over, x, mine, fmt, groups, d, whole)
            close(over, of_out, dtype)
            close(gate.gates_of(whole, groups, d), of_gates, dtype)
            assert without_gates(whole, groups, r, d).isnan().all()  # not its places


def test_gates_far_from_zero(draw):
    """Wide open and shut: exactly the output and zero, and gradients without NaN."""
    values = torch.tensor([-float("inf"), -200.0, -88.0, 0.0, 88.0, 200.0, float("inf"), -1e-30])
    qkv, out = torch.full((1, 1, 4 * 8), torch.nan), draw(1, 1, 8, dtype=torch.float32)
    qkv[..., 8:16] = values
    grad = draw(1, 1, 8, dtype=torch.float32)
    for module, move in ((gate, lambda t: t), (launchers, on_device)):
        x, whole, over = move(out), move(qkv).clone(), move(grad).clone()
        gated, _ = module.gate_forward(x, whole, 1, 8, None, 0, False)
        expected = out * torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 0.5])
        assert torch.allclose(gated.cpu(), expected, rtol=1e-6, atol=1e-30)
        kept = tuple(map(move, fused.kept_as_is(values.view(1, 1, 8))))
        module.gate_backward(over, x, kept, None, 1, 8, whole)
        assert whole[..., 8:16].isfinite().all() and over.isfinite().all()
        assert whole[..., :8].isnan().all() and whole[..., 16:].isnan().all()


def test_tensors_that_do_not_go_together(draw):
    qkv, out = draw(3, 2, 8 * 16, dtype=torch.float32), draw(3, 2, 3 * 16, dtype=torch.float32)
    gate.gate_forward(out, qkv, 1, 16)
    with pytest.raises(ValueError, match=r"\(3, 2, 48\) does not go with a gated projection \(3, 2, 128\)"):
        gate.gate_forward(out, qkv, 2, 16)
    kept = fused.kept_as_is(out)
    with pytest.raises(ValueError, match="grad is written to in place"):
        gate.gate_backward(out.transpose(0, 1).contiguous().transpose(0, 1), out, kept, None, 1, 16, qkv)
    with pytest.raises(ValueError, match="out is written to in place"):
        gate.gate_forward(out[..., :1].expand(-1, -1, 48), qkv, 1, 16, into_out=True)


@pytest.mark.parametrize("kind", ["rotated", "normed"])
@pytest.mark.parametrize("fmt", [None, Format(bits=5, code="cubic", group=32)], ids=str)
def test_the_rest_of_the_projection(fmt, kind, draw, rng):
    """Split, common vectors and gradients: those of the same projection without gates, bit for bit."""
    dtype = DTYPES[int(torch.randint(3, (), generator=rng))]
    shapes = [it for it in SHAPES if it[0] * it[2] % 32 == 0]
    groups, r, d = shapes[int(torch.randint(len(shapes), (), generator=rng))]
    s, b = 5, 2
    qkv = draw(s, b, groups * (2 * r + 2) * d, dtype=dtype)
    plain = without_gates(qkv, groups, r, d)
    tables = rotary_tables(9 * torch.randn(s, 1, 1, d // 2, generator=rng).repeat(1, 1, 1, 2))
    segments = segments_of([3, s, 2 * s], s, "cpu")
    weights = [torch.randn(d, generator=rng).to(dtype) for _ in range(2)]
    norm, parameters = HeadNorm("RMSNorm", 1e-6), (weights[0], None, weights[1], None)
    formats, keys = (fmt,) * 3, (1, 2, 3)

    def both(gated, z, to, launched):
        """Of torch or Triton, with the places of gates poisoned in what is written to."""
        turns = None if kind == "normed" else tables
        if launched:
            head = (to(z), to(turns), groups, d, False)
            split, normed, vectors = (
                launchers.split_qkv, launchers.split_normed_qkv, launchers.common_vectors
            )  # fmt: skip
        else:
            head = (z, groups, d, turns, False)
            split, normed, vectors = fused.split_qkv, head_norm.split_normed_qkv, fused.common_vectors
        common = vectors(*head, to(segments.bounds), gated=gated)
        its = {"segments": to(segments.of_tokens), "gated": gated}
        its["common"] = common if fmt else None
        if kind == "normed":
            head = tuple(to(tables) if x is turns else x for x in head)
            parts, packed = normed(*head, norm, to(parameters), formats, keys, **its)
        else:
            parts, packed = split(*head, formats, keys, **its)
        torch.manual_seed(1)
        grads = [to(torch.randn(p.shape).to(dtype)) for p in parts]
        whole = to(torch.full((s, b, groups + 2, z.shape[2] // groups), torch.nan, dtype=dtype))
        into = whole[:, :, 1:-1].flatten(2)
        if kind == "rotated":
            merge = launchers.merge_qkv if launched else fused.merge_qkv
            merge(*grads, to(tables), False, into)
        else:
            raw = head_norm.unnormed_parts(z, groups, d, gated)
            kept = [KeptHeads(to(fused.kept_as_is(x)), None) for x in raw[:2]]
            merge = launchers.merge_normed_qkv if launched else head_norm.merge_normed_qkv
            merge(*grads, to(tables), False, norm, to(parameters), *kept, 0, into)
        assert whole[:, :, [0, -1]].isnan().all()
        if gated:
            assert gate.gates_of(into, groups, d).isnan().all()
            into = without_gates(into, groups, r, d)
        return [common, *parts, *(x for its in packed for x in its), into]

    for launched, to in ((False, lambda x: x), (True, on_device)):
        for a, b_ in zip(both(True, qkv, to, launched), both(False, plain, to, launched), strict=True):
            assert a.shape == b_.shape and torch.equal(a, b_) and (launched or a.isfinite().all())


def test_a_mistake_would_show(draw):
    """The bound is far below what a gate in few bits changes."""
    qkv, out = draw(4, 2, 4 * 64, dtype=torch.float32), draw(4, 2, 64, dtype=torch.float32)
    gated, packed = gate.gate_forward(out, qkv, 1, 64, Format(bits=5, code="cubic"), 0)
    rounded = gate.gate_from_kept(out, packed, Format(bits=5, code="cubic"))
    error = (rounded - gated).norm() / gated.norm()
    assert 100 * PRECISION[torch.float32] < error < 0.03, DEVICE

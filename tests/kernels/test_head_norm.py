"""Norms of query and key heads: the torch composition and Triton's kernels against the plain formula in FP64.

On a GPU the compiled kernels run, elsewhere Triton's interpreter (conftest.py asks for it).
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value", "ignore:divide by zero"
)

from agoq_kernels import fused, head_norm, reference  # noqa: E402
from agoq_kernels.attention import attention, attention_backward  # noqa: E402
from agoq_kernels.formats import Format  # noqa: E402
from agoq_kernels.head_norm import KINDS, HeadNorm, KeptHeads, unnormed_parts  # noqa: E402
from agoq_kernels.triton import launchers  # noqa: E402

from tests.kernels.heads import DEVICE, Case, Torch, Triton, map_tensors  # noqa: E402
from tests.kernels.test_layout import LAYOUTS, laid, plain, same  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISION = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 4e-6, torch.float64: 1e-12}
FORMATS = (
    None,
    Format(code="nf4"),
    Format(code="int_asym", group=32),
    Format(bits=8, scale_bits=16, rounding="stochastic"),
    Format(bits=5, group=32),
    Format(bits=3, code="int_asym", group=32, rounding="stochastic"),
    Format(code="nf4", group=128, outliers=1),
    Format(bits=12),
)


def close(got, expected, dtype, factor=1.0):
    assert got.shape == expected.shape and got.isfinite().all()
    assert (got.double() - expected).norm() <= factor * PRECISION[dtype] * expected.norm()


def some(cases, rng, count):
    """All on a GPU; ``count`` of them, drawn anew each time, in the interpreter, which is slow."""
    cases = list(cases)
    order = torch.randperm(len(cases), generator=rng)[: count if DEVICE == "cpu" else None]
    return [cases[i] for i in order]


SHAPES = (
    dict(groups=1, r=8, d=128, rot=128, s=3, factor=2.0),
    dict(groups=2, r=3, d=64, rot=32, s=7, factor=0.5),
    dict(groups=3, r=1, d=128, rot=64, s=3, b=3),
    dict(groups=1, r=2, d=96, rot=96),
    dict(groups=2, r=1, d=64, rot=20, s=1),
    dict(groups=2, r=2, d=64, rot=0, b=1),
    dict(groups=1, r=1, d=256, rot=256, s=3),
    dict(groups=1, r=1, d=80, rot=80, b=1),
)


@pytest.mark.parametrize("implementation", [Torch, Triton])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_without_quantization(implementation, interleaved, kind, rng):
    dtypes = (*DTYPES, torch.float64) if implementation is Torch else DTYPES
    shapes = SHAPES if implementation is Torch else some(SHAPES, rng, 2)
    for shape, dtype in zip(shapes, itertools.cycle(some(dtypes, rng, 9)), strict=False):
        case = Case(rng, kind, interleaved=interleaved, dtype=dtype, **shape)
        parts, (grad, *of_parameters) = case.exact()
        got, packed = case.split(implementation)
        for a, b in zip(got, parts, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            close(a, b, dtype)
        assert torch.equal(got[2].double(), parts[2])
        kept = case.kept(packed, None)
        for part, its_kept, first in zip(got, kept, (0, 2), strict=False):
            again = implementation.from_kept(
                its_kept, case.d, *case.layout[2:], case.norm, *case.parameters[first : first + 2], dtype
            )
            torch.testing.assert_close(again, part, rtol=0, atol=0)
        out, sums = case.merge(implementation, kept)
        close(out, grad, dtype)
        for a, b in zip(sums, of_parameters, strict=True):
            assert a.dtype == torch.promote_types(dtype, torch.float32)
            close(a, b, max(dtype, torch.float32, key=lambda t: torch.finfo(t).bits), 4)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt], ids=str)
def test_at_the_values_that_were_kept(fmt, rng):
    """Codes are those of the projection itself, bit for bit; Q, K and all gradients those of FP64 at the
    dequantized values. Common vectors of 100 make no code wider."""
    kinds = itertools.product(KINDS, (False, True))
    shapes = [shape for shape in SHAPES if shape["groups"] * shape["d"] % fmt.group == 0]
    drawn = zip(some(kinds, rng, 1), itertools.cycle(some(shapes, rng, 2)), strict=False)
    for (kind, interleaved), shape in drawn:
        dtype = some(DTYPES, rng, 1)[0]
        case = Case(rng, kind, interleaved=interleaved, dtype=dtype, **shape)
        heads = case.groups * (case.r + 2)
        common = 100 * torch.randn(case.b, heads, case.d, generator=rng)
        case.qkv = (case.qkv + case.in_order(common)).to(dtype)
        (q, k, v), packed = case.split(Torch, fmt, common)
        parts, packed_ = case.split(Triton, fmt, common)
        for a, b in zip(packed, packed_, strict=True):
            same(b, a, 0)
        shifts = common.flatten(1).split([t[0, 0].numel() for t in (q, k, v)], 1)
        raw = unnormed_parts(case.qkv, case.groups, case.d)
        for part, its_packed, shift, key in zip(raw, packed, shifts, (1, 2 << 40, 3), strict=True):
            expected = reference.quantize(part.float() - shift, fmt, key)
            same(its_packed, expected, 0)
        kept = case.kept(packed, fmt, common)
        values = [reference.dequantize(*packed[i], fmt, torch.float32).double() + shifts[i] for i in range(2)]
        for value, part in zip(values, raw, strict=False):  # steps are those of what is left, not of 100
            assert (value - part).abs().max() < 4 / 2 ** min(fmt.bits - 2, 3)
        parts, (grad, *of_parameters) = case.exact(case.joined(*values))
        for implementation in (Torch, Triton):
            for i in range(2):
                got = implementation.from_kept(
                    kept[i], case.d, *case.layout[2:], case.norm, *case.parameters[2 * i : 2 * i + 2], dtype
                )
                close(got, parts[i], dtype, 2)
            out, sums = case.merge(implementation, kept)
            close(out, grad, dtype, 4)
            for a, b in zip(sums, of_parameters, strict=True):
                close(a, b, torch.float32, 8)


@pytest.mark.parametrize("implementation", [Torch, Triton])
@pytest.mark.parametrize("fmt", [None, Format(code="nf4"), Format(group=128)], ids=str)
def test_some_groups_of_heads_at_a_time(implementation, fmt, rng):
    """Pieces fill their own places, and the parameters' gradients of all pieces add up."""
    case = Case(rng, "LayerNorm", s=9, groups=4, r=2, dtype=torch.float32)
    common = case.common() if fmt else None
    _, packed = case.split(Torch, fmt, common)
    kept = case.kept(packed, fmt, common)
    whole, sums = case.merge(implementation, kept)
    pieces = [case.merge(implementation, kept, first, last) for first, last in ((0, 1), (1, 4))]
    torch.testing.assert_close(torch.cat([out for out, _ in pieces], -1), whole, rtol=1e-6, atol=1e-6)
    for total, *of_pieces in zip(sums, *(sums for _, sums in pieces), strict=True):
        torch.testing.assert_close(sum(of_pieces), total, rtol=1e-5, atol=1e-4)
    again = case.merge(implementation, kept)
    assert torch.equal(again[0], whole) and all(map(torch.equal, again[1], sums))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [1e-20, 1e4])
def test_small_large_and_zero_heads(kind, large, rng):
    """Rows of zeros, and numbers whose squares vanish in FP32 or overflow in FP16."""
    for dtype in (torch.bfloat16, torch.float32) if large < 1 else DTYPES:
        case = Case(rng, kind, dtype=dtype, eps=1e-5)
        case.qkv = (case.qkv.float() * large).to(dtype)
        case.qkv[0, 0], case.qkv[2, :, : case.d] = 0, 0
        parts, (grad, *of_parameters) = case.exact()
        for implementation in (Torch, Triton):
            got, packed = case.split(implementation)
            for a, b in zip(got, parts, strict=True):
                # Without a square the norm divides by the root of eps alone: so does FP64's.
                close(a, b, dtype, 1.5)
                assert (a[0, 0].float() - b[0, 0]).norm() <= PRECISION[dtype] * b[0, 0].norm()
            if dtype == torch.float16:
                continue  # of zero rows they are 1 / sqrt(eps), of the others 1e-4: subnormal in FP16
            out, sums = case.merge(implementation, case.kept(packed, None))
            close(out, grad, dtype, 2)
            for a, b in zip(sums, of_parameters, strict=True):
                close(a, b, torch.float32, 10)


@pytest.mark.parametrize("implementation", [Torch, Triton])
def test_without_epsilon_heads_that_do_not_exist_add_nothing(implementation, rng):
    """A program's tile ends beyond the last head."""
    case = Case(rng, "RMSNorm", s=3, b=1, groups=1, r=1, eps=0.0)
    _, (grad, *of_parameters) = case.exact()
    out, sums = case.merge(implementation, case.kept(None, None))
    close(out, grad, torch.float32)
    for a, b in zip(sums, of_parameters, strict=True):
        close(a, b, torch.float32, 4)


@pytest.mark.parametrize("implementation", [Torch, Triton])
def test_keys_less_a_vector_that_they_share(implementation, rng):
    """It changes no gradient: those of the attention are FP64's of whole keys, to the rounding of the
    centred ones."""
    case = Case(rng, "RMSNorm", s=33, d=64)
    case.qkv.view(case.s, case.b, -1, case.d)[...] += 5 * torch.randn(1, case.b, 10, case.d, generator=rng)
    (q, k, v), _ = case.split(Torch)
    kept = case.kept(None, None)[1]
    rest = case.d, *case.layout[2:], case.norm, *case.parameters[2:]
    centre = k.mean(0).flatten(1)
    centred = implementation.from_kept(kept, *rest, torch.float32, centre)
    torch.testing.assert_close(centred, k - centre.view(case.b, -1, case.d), rtol=1e-5, atol=1e-5)
    in_16_bits = implementation.from_kept(kept, *rest, torch.bfloat16, centre)
    assert torch.equal(in_16_bits, centred.bfloat16())  # rounded once, after the centre is off

    def gradients(keys):
        out, lse = attention(q, keys, v, 0.1)
        return attention_backward(case.grads[0], q, keys, v, out, lse, 0.1)

    for a, b in zip(gradients(centred), gradients(k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, "rows apart"])
@pytest.mark.parametrize("fmt", [None, Format(code="int_asym", group=32)], ids=str)
def test_layouts(layout, fmt, rng):
    """Tensors that do not lie as they are indexed give what contiguous ones give."""
    case = Case(rng, "LayerNorm", s=3, groups=2, r=1, d=32, rot=32, eps=0.1)
    common = torch.randn(case.b, 6, case.d, generator=rng)
    by_vector = "sliced" if layout == "rows apart" else layout
    for name in ("qkv", "parameters", "tables", "grads"):
        value = getattr(case, name)
        if isinstance(value, torch.Tensor):
            value = laid(value, layout)
        else:
            value = tuple(laid(t, layout if t.dim() > 1 else by_vector) for t in value)
        setattr(case, name, value)
    contiguous = SimpleNamespace(**{n: map_tensors(tuple([getattr(case, n)]), plain)[0] for n in vars(case)
                                    if n in ("qkv", "parameters", "tables", "grads")})  # fmt: skip
    rest = case.interleaved, case.norm
    common = laid(common, layout)
    formats = (fmt,) * 3, (1, 2, 3)
    parts, packed = launchers.split_normed_qkv(
        case.qkv, case.tables, 2, 32, *rest, case.parameters, *formats, common
    )
    parts_, packed_ = head_norm.split_normed_qkv(
        contiguous.qkv, 2, 32, contiguous.tables, *rest, contiguous.parameters, *formats, plain(common)
    )
    same(parts, parts_, 4e-6)
    for ours, theirs in zip(packed, packed_, strict=True):
        same(ours, theirs, 0)
    if fmt is None:
        packed_ = [fused.kept_as_is(part) for part in unnormed_parts(contiguous.qkv, 2, 32)]
    shift = laid(torch.randn(case.b, 64, generator=rng), layout)
    kept = [KeptHeads(tuple(laid(t, layout) if t.numel() else t for t in p), fmt, shift) for p in packed_[:2]]
    kept_ = [map_tensors(heads, plain) for heads in kept]
    for i in range(2):
        given, given_ = case.parameters[2 * i : 2 * i + 2], contiguous.parameters[2 * i : 2 * i + 2]
        same(
            launchers.normed_from_kept(kept[i], 32, case.tables, *rest, *given, torch.float32, shift),
            head_norm.normed_from_kept(
                kept_[i], 32, contiguous.tables, *rest, *given_, torch.float32, plain(shift)
            ),
            4e-6,
        )
    expected, sums_ = head_norm.merge_normed_qkv(
        *contiguous.grads, contiguous.tables, *rest, contiguous.parameters, *kept_
    )
    out = torch.full_like(expected, torch.nan, device=DEVICE)
    sums = launchers.merge_normed_qkv(*case.grads, case.tables, *rest, case.parameters, *kept, 0, out)
    same((out, *sums), (expected, *sums_), 2e-5)
    with pytest.raises(ValueError, match="out is to be written to"):
        launchers.merge_normed_qkv(
            *case.grads, case.tables, *rest, case.parameters, *kept, 0,
            laid(expected, "sliced"),
        )  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_megatrons_own_modules(kind, interleaved, rng):
    """``SelfAttention.get_query_key_value_tensors`` with Megatron's norms, then its rotation."""
    pytest.importorskip("megatron.core")
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm

    case = Case(rng, kind, s=7, groups=2, r=4, d=64, rot=32, interleaved=interleaved)
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=False, persist_layer_norm=False, sequence_parallel=False,
        memory_efficient_layer_norm=False, normalization=kind.removesuffix("1p"), num_query_groups=2,
        test_mode=False,
    )  # fmt: skip

    class Projected(torch.nn.Module):
        def forward(self, qkv):
            return qkv, None

    its_class = L2Norm if kind == "L2Norm" else WrappedTorchNorm
    modules = [its_class(config=config, hidden_size=64, eps=case.norm.eps) for _ in range(2)]
    for module, first in zip(modules, (0, 2), strict=True):
        for name, value in zip(("weight", "bias"), case.parameters[first : first + 2], strict=True):
            if value is not None:
                # torch's have no zero-centred weight
                getattr(module, name).data.copy_(value + (name == "weight" and kind.endswith("1p")))
    stub = SimpleNamespace(
        config=config, linear_qkv=Projected(), num_attention_heads_per_partition=8,
        num_query_groups_per_partition=2, hidden_size_per_attention_head=64, world_size=1,
        q_layernorm=modules[0], k_layernorm=modules[1],
    )  # fmt: skip
    qkv = case.qkv.clone().requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # L2Norm compiles itself, for a minute
        q, k, v = SelfAttention.get_query_key_value_tensors(stub, qkv)
    angles = (
        torch.stack((case.angles,) * 2, -1).flatten(-2) if interleaved else torch.cat((case.angles,) * 2, -1)
    )
    turn = rope_utils._apply_rotary_pos_emb_bshd
    q, k = (turn(t, angles, rotary_interleaved=interleaved) for t in (q, k))
    parameters = [p for module in modules for p in module.parameters()]
    grads = torch.autograd.grad((q, k, v), [qkv, *parameters], case.grads)
    got, packed = case.split(Torch)
    torch.testing.assert_close(list(got), [q, k, v], rtol=2e-6, atol=2e-6)
    out, sums = case.merge(Torch, case.kept(packed, None))
    torch.testing.assert_close([out, *sums], list(grads), rtol=1e-5, atol=1e-5)


def test_refusals(rng):
    with pytest.raises(ValueError, match="RMSNorm, LayerNorm, .*L2Norm; not 'BatchNorm'"):
        HeadNorm("BatchNorm", 1e-5)
    case = Case(rng, "RMSNorm")
    weight, _, weight_k, _ = case.parameters
    kept = case.kept(None, None)
    for parameters, match in (
        ((None, None, weight, None), "RMSNorm of heads with no weight"),
        ((weight, weight, weight, None), "a weight and a bias"),
        ((weight, None, weight[:32], None), r"\[64\], one for all heads; not \(32,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            head_norm.split_normed_qkv(case.qkv, *case.layout, case.norm, parameters, (None,) * 3, (0,) * 3)
        with pytest.raises(ValueError, match=match):
            head_norm.merge_normed_qkv(*case.grads, *case.layout[2:], case.norm, parameters, *kept)
    rest = case.norm, case.parameters, *kept
    with pytest.raises(ValueError, match="from group 1 on, are not some of what was kept"):
        head_norm.merge_normed_qkv(*case.grads, *case.layout[2:], *rest, first_group=1)
    fmt = Format(code="nf4")
    _, packed = case.split(Torch, fmt)
    for heads, centre, match in (
        (KeptHeads(packed[0], fmt, torch.zeros(2, 64)), None, "shift is"),
        (KeptHeads(packed[0], fmt), torch.zeros(2, 64), "centre is"),
        (KeptHeads(fused.kept_as_is(torch.zeros(5, 2, 100)), None), None, "no .s, b, heads"),
    ):
        with pytest.raises(ValueError, match=match):
            head_norm.normed_from_kept(
                heads, 64, *case.layout[2:], case.norm, weight, None, torch.float32, centre
            )

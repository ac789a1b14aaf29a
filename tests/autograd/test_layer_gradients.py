"""Gradients of a whole layer against plain autograd that never saw our functions.

The oracle computes every value exactly, but differentiates each operation at the dequantized value of
the tensor that our layer keeps there. Those values are taken from our layer: computed twice in FP32 they
would differ in the last bit, and a number on the edge between two codes would then fall on either side.
That they are the right tensors is checked: but for such edges they equal the oracle's own quantization.
Attention is the plain softmax formula.
"""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.activation import parse, read_part
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm
from agoq_kernels.ops import dequantize, quantize

from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.norm_linear import NormLinear, NormLinearSpec
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    FC2_INPUT,
    KEY,
    NORM1_INPUT,
    NORM1_OUTPUT,
    NORM2_INPUT,
    NORM2_OUTPUT,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.fitting import policy_for
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import SITES
from tests.kernels.activations import plain

EPSILON = 1e-3  # of the norms: not their default, and seen beside numbers near 1
KEEP, RECOMPUTE = Rule(keep=True), Rule()
INT4 = Rule(Format(bits=4, code="int", group=32, scale_bits=16))
NF4 = Rule(Format(bits=4, code="nf4", group=32, scale_bits=8))
NF4_OUTLIER = Rule(Format(bits=4, code="nf4", group=32, scale_bits=8, outliers=1))
CUBIC5 = Rule(Format(bits=5, code="cubic", group=32, scale_bits=8))
INT8 = Rule(Format(bits=8, code="int", group=32, scale_bits=16))
INT3 = Rule(Format(bits=3, code="int_asym", group=64, scale_bits=8))

OFF = dict.fromkeys(SITES, KEEP)
MIXED = {
    NORM1_INPUT: NF4, NORM1_OUTPUT: RECOMPUTE, QUERY: INT8, KEY: INT8,
    VALUE: INT4, ATTENTION_OUTPUT: INT8, NORM2_INPUT: INT4,
    NORM2_OUTPUT: RECOMPUTE, FC1_OUTPUT: INT3, FC2_INPUT: RECOMPUTE,
}  # fmt: skip
# As the default: backward is that of an attention at the kept Q, K and V.
AGAIN = MIXED | {ATTENTION_OUTPUT: RECOMPUTE, NORM1_INPUT: NF4_OUTLIER, FC1_OUTPUT: CUBIC5}
KEPT_OUTPUTS = MIXED | {NORM1_OUTPUT: KEEP, NORM2_OUTPUT: KEEP, FC2_INPUT: KEEP}


def one_rank():
    return types.SimpleNamespace(size=lambda: 1)


def dequantized(x, rule):
    if rule.format is None:
        return x
    return dequantize(*quantize(x.detach(), rule.format), rule.format, x.dtype)


class At(torch.autograd.Function):
    """Passes gradients from the value ``kept`` that an operation reads to the exact ``x``."""

    @staticmethod
    def forward(ctx, x, kept):
        return kept.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Exact(torch.autograd.Function):
    """Has the exact value; the gradient goes to the operation that ran at the kept value."""

    @staticmethod
    def forward(ctx, at_kept, exact):
        return exact.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def through(f, xs, kept):
    """``f(*xs)`` in value, differentiated at ``kept``."""
    return Exact.apply(f(*(At.apply(x, k) for x, k in zip(xs, kept, strict=True))), f(*xs).detach())


def rms(x, w, b, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def layer_norm(x, w, b, eps):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def oracle_layer(x, p, rules, shape, kind, act, ours, product=None):
    """The layer by plain autograd; ``shape`` is (heads, groups, head_dim), ``ours`` what we kept."""
    product = product or WeightAt.apply  # of input, the input for the weight's gradient, and weight

    def kept_at(site, t):
        own = dequantized(t.reshape(*t.shape[:2], -1), rules[site])
        kept = ours[site]
        differ = (own - kept).abs() > 1e-5 * own.abs().max()
        # A last-bit difference may flip a code, or the scale of a group and with it the whole group.
        assert differ.sum() <= 128 + 0.002 * differ.numel(), f"{site}: the kept tensor is another one"
        error = (own - kept).norm() / own.norm()
        assert error < 0.02, f"{site}: the kept tensor is another one ({error:.1e})"
        return kept.view(t.shape)

    heads, groups, d = shape
    s, b, _ = x.shape
    base, plus = rms if kind.startswith("RMSNorm") else layer_norm, float(kind.endswith("1p"))

    def norm(x, w, b, eps):
        return base(x, w + plus, b, eps)

    def norm_linear(x, w_norm, b_norm, w, bias, site_in, site_out):
        kept = kept_at(site_in, x)
        y = through(lambda t: norm(t, w_norm, b_norm, EPSILON), [x], [kept])
        if rules[site_out].recompute:
            # The product sees the exact norm output; its weight gradient the recomputed one.
            y_weight = norm(kept, w_norm, b_norm, EPSILON).detach()
        else:
            y_weight = y.detach()
        return product(y, y_weight, w) + (0 if bias is None else bias)

    qkv = norm_linear(x, p["n1w"], p["n1b"], p["qkv"], p["qkv_b"], NORM1_INPUT, NORM1_OUTPUT)
    grouped = qkv.view(s, b, groups, -1)
    r = heads // groups
    q = grouped[..., : r * d].reshape(s, b, heads, d)
    k, v = grouped[..., r * d : (r + 1) * d], grouped[..., (r + 1) * d :]
    normed = "query_norm_weight" in p

    def head(of):
        weight, bias = p.get(f"{of}_norm_weight"), p.get(f"{of}_norm_bias")

        def made(t):
            t = norm(t, 1.0 - plus if weight is None else weight, bias, EPSILON) if normed else t
            return t if p["angles"] is None else turn(t, p["angles"]) * p["factor"]

        return made

    of_q, of_k = head("query"), head("key")
    if not normed:
        q, k = of_q(q), of_k(k)

    def rest(site, t):
        """The tensor that backward sees: what is kept is quantized without what all tokens share, which
        queries and values get back; keys only before a norm."""
        if rules[site].format is None:
            return kept_at(site, t)
        common = shared(t).detach()
        kept = kept_at(site, t - common)
        return kept if site is KEY and not normed else kept + common

    kept = [rest(site, t) for site, t in ((QUERY, q), (KEY, k), (VALUE, v))]
    if normed:  # in value those of the exact projection, differentiated at what is kept of it
        q, k = through(of_q, [q], kept[:1]), through(of_k, [k], kept[1:2])
        kept[:2] = of_q(kept[0]).detach(), of_k(kept[1]).detach()
    elif rules[KEY].format is not None:  # the softmax does not see it; kept statistics are of these keys
        k = k - shared(k).detach()
    if rules[ATTENTION_OUTPUT].recompute:
        out_kept, statistics = plain_attention(*kept), scores(*kept[:2]).logsumexp(-1)
    else:
        out_kept = kept_at(ATTENTION_OUTPUT, plain_attention(q, k, v))
        statistics = scores(q, k).logsumexp(-1)
    out = AttentionAt.apply(q, k, v, *kept, out_kept.detach(), statistics.detach())
    attn = product(out.reshape(s, b, -1), out_kept.reshape(s, b, -1).detach(), p["proj"])
    x = x + attn

    h = norm_linear(x, p["n2w"], p["n2b"], p["fc1"], p["fc1_b"], NORM2_INPUT, NORM2_OUTPUT)

    rounded = rules[FC1_OUTPUT].format is not None
    h_kept = kept_at(FC1_OUTPUT, read_part(h, act) if rounded else h)
    a = through(lambda t: plain(t, act), [h], [h_kept])
    a_weight = plain(h_kept if rules[FC2_INPUT].recompute else h, act).detach()
    return x + product(a, a_weight, p["fc2"])


class WeightAt(torch.autograd.Function):
    """``y @ w^T`` whose weight gradient is taken with another input."""

    @staticmethod
    def forward(ctx, y, y_weight, w):
        ctx.save_for_backward(y_weight, w)
        return y @ w.t()

    @staticmethod
    def backward(ctx, grad):
        y, w = ctx.saved_tensors
        return grad @ w, None, torch.einsum("sbo,sbi->oi", grad, y)


def shared(t):
    """What the tokens of a head share, of short sequences."""
    return t[len(t) // 2 :].mean(0)


def scores(q, k):
    r = q.shape[2] // k.shape[2]
    z = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(r, 2)) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool, device=q.device).triu(1)
    return z.masked_fill(mask, -math.inf)


def plain_attention(q, k, v):
    r = q.shape[2] // k.shape[2]
    return torch.einsum("bnij,jbnd->ibnd", scores(q, k).softmax(-1), v.repeat_interleave(r, 2))


class AttentionAt(torch.autograd.Function):
    """Exact attention; its backward by the textbook formula from kept Q, K, V, O and log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, q_kept, k_kept, v_kept, out_kept, statistics):
        ctx.save_for_backward(q_kept, k_kept, v_kept, out_kept, statistics)
        return plain_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (s, b, n, d), g = q.shape, k.shape[2]
        r = n // g
        p = (scores(q, k) - lse[..., None]).exp()
        grad_v = torch.einsum("bnij,ibnd->jbnd", p, grad).view(s, b, g, r, d).sum(3)
        grad_p = torch.einsum("ibnd,jbnd->bnij", grad, v.repeat_interleave(r, 2))
        delta = torch.einsum("ibnd,ibnd->bni", grad, out)
        grad_z = p * (grad_p - delta[..., None]) / math.sqrt(d)
        grad_q = torch.einsum("bnij,jbnd->ibnd", grad_z, k.repeat_interleave(r, 2))
        grad_k = torch.einsum("bnij,ibnd->jbnd", grad_z, q).view(s, b, g, r, d).sum(3)
        return grad_q, grad_k, grad_v, *[None] * 5


def turn(x, angles):
    """Rotary embedding by complex multiplication of the halves."""
    half = angles.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half : 2 * half])
    z = z * torch.polar(torch.ones_like(angles[..., :half]), angles[..., :half])
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


def our_layer(x, p, rules, shape, kind, act, run=None, keep=True, packing=None, products=None):
    heads, groups, d = shape
    run, products = run or Run(), products or Products()

    def saved(site):
        return SavedTensor(site, 1, rules[site], run=run)

    def norm_spec(site_in, site_out):
        return NormLinearSpec(saved(site_in), saved(site_out), kind, EPSILON, one_rank(), False, products)

    of_heads = {name: p[name] for name in NORM_PARAMETERS if name in p}
    its_kind = "L2Norm" if p.get("query_norm_weight") is None else kind
    attention = AttentionLinearSpec(
        *(saved(s) for s in (QUERY, KEY, VALUE, ATTENTION_OUTPUT)),
        groups=groups, head_dim=d, backend=LocalAttention(1 / math.sqrt(d)), interleaved=False,
        recompute=False, heads=Normed(HeadNorm(its_kind, EPSILON)) if of_heads else Rotated(),
        rotary_factor=p["factor"], products=products,
    )  # fmt: skip
    mlp = ActivationLinearSpec(saved(FC1_OUTPUT), saved(FC2_INPUT), act, products)
    qkv, x = NormLinear.apply(
        x, None, p["n1w"], p["n1b"], p["qkv"], p["qkv_b"],
        norm_spec(NORM1_INPUT, NORM1_OUTPUT), keep,
    )  # fmt: skip
    attended = AttentionLinear.call(
        qkv=qkv, angles=p["angles"], weight=p["proj"], spec=attention, keeps=keep, packing=packing,
        **of_heads,
    )  # fmt: skip
    h, x = NormLinear.apply(
        attended, x, p["n2w"], p["n2b"], p["fc1"], p["fc1_b"],
        norm_spec(NORM2_INPUT, NORM2_OUTPUT), keep,
    )  # fmt: skip
    nobody_keeps_it = rules[NORM2_INPUT].format is not None
    return ActivationLinear.apply(h, p["fc2"], x, nobody_keeps_it, mlp, keep)


def parameters(rng, h, f, shape, kind, act, rotary, dtype, of_heads=None):
    """``rotary``: "YaRN" for its factor too. ``of_heads``: kind of the norm of queries and keys."""
    heads, groups, d = shape

    def weight(*size):
        return (torch.randn(*size, generator=rng, dtype=dtype) / math.sqrt(size[-1])).requires_grad_()

    def vector(n, mean):
        return (mean + 0.2 * torch.randn(n, generator=rng, dtype=dtype)).requires_grad_()

    biases, one = kind.startswith("LayerNorm"), float(not kind.endswith("1p"))
    wide = parse(act).halves * f
    width = (heads + 2 * groups) * d
    angles = None
    if rotary:
        half = torch.rand(11, 1, 1, d // 2, generator=rng, dtype=dtype) * 6
        angles = torch.cat((half, half), -1)
    normed = {}
    for name in NORM_PARAMETERS if of_heads else ():
        given = of_heads != "L2Norm" and (biases or "weight" in name)
        normed[name] = vector(d, one * ("weight" in name)) if given else None
    return normed | {
        "n1w": vector(h, one), "n1b": vector(h, 0.0) if biases else None,
        "n2w": vector(h, one), "n2b": vector(h, 0.0) if biases else None,
        "qkv": weight(width, h), "qkv_b": vector(width, 0.0) if biases else None,
        "proj": weight(h, heads * d), "fc1": weight(wide, h), "fc2": weight(h, f),
        "fc1_b": vector(wide, 0.0) if biases else None,
        "angles": angles, "factor": 1.4 if rotary == "YaRN" else 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("rules", [OFF, MIXED, AGAIN, KEPT_OUTPUTS], ids="off mixed again kept".split())
@pytest.mark.parametrize("kind,act,shape,rotary", [
    ("RMSNorm", "swiglu", (6, 2, 32), True), ("RMSNorm", "swiglu", (6, 2, 32), "YaRN"),
    ("LayerNorm", "gelu", (4, 4, 32), False), ("LayerNorm", "gelu_tanh", (4, 2, 32), True),
    ("LayerNorm1p", "squared_relu", (4, 2, 32), True), ("LayerNorm", "geglu", (4, 4, 32), False),
    ("RMSNorm1p", "quick_geglu offset=1.0 clamp=1.0", (6, 2, 32), True),
])  # fmt: skip
def test_layer_matches_plain_autograd(rng, monkeypatch, rules, kind, act, shape, rotary):
    f = 96 if parse(act).gated else 128  # 2f = 192, three groups of 64
    compare(rng, monkeypatch, rules, kind, act, shape, rotary, 64, f)


@pytest.mark.parametrize("rules", [OFF, MIXED, AGAIN], ids=["off", "mixed", "again"])
@pytest.mark.parametrize("kind,of_heads,rotary", [
    ("RMSNorm", "RMSNorm", True), ("RMSNorm", "RMSNorm", "YaRN"), ("LayerNorm", "LayerNorm", True),
    ("RMSNorm", "L2Norm", False), ("LayerNorm1p", "LayerNorm1p", True), ("RMSNorm1p", "RMSNorm1p", True),
])  # fmt: skip
def test_norms_of_queries_and_keys(rng, monkeypatch, rules, kind, of_heads, rotary):
    """Kept before them: gradients of norms, projection and the norms' weights are those at these values."""
    compare(rng, monkeypatch, rules, kind, "swiglu", (6, 2, 32), rotary, 64, 96, of_heads)


def test_the_default_policy_on_widths_that_64_does_not_divide(rng, monkeypatch):
    """Norm inputs, queries, gate and up in groups of 32; one crosses from gate to up. Keys as they are."""
    settings = types.SimpleNamespace(
        num_layers=1, hidden_size=96, num_attention_heads=4, kv_channels=24, num_query_groups=2,
        ffn_hidden_size=176, gated_linear_unit=True, tensor_model_parallel_size=1, moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=None, expert_tensor_parallel_size=1, num_moe_experts=None,
    )  # fmt: skip
    policy = policy_for(settings, "agoq")
    rules = {site: policy.rule(site, 1) for site in SITES}
    assert rules[FC1_OUTPUT].format.group == 32 and rules[KEY].keep
    compare(rng, monkeypatch, rules, "RMSNorm", "swiglu", (4, 2, 24), True, 96, 176)


def compare(rng, monkeypatch, rules, kind, act, shape, rotary, h, f, of_heads=None, packing=None, **fp8):
    p = parameters(rng, h, f, shape, kind, act, rotary, torch.float32, of_heads)
    x = torch.randn(11, 3, h, generator=rng)
    grad = torch.randn(11, 3, h, generator=rng)
    wanted = [t for t in p.values() if getattr(t, "requires_grad", False)]

    oracle = fp8.pop("product", None)
    kept, pack = {}, SavedTensor.pack

    def recorded_pack(self, t, *its_packed):
        packed = pack(self, t, *its_packed)
        if packed:
            kept[self.site] = self.unpack(packed, t.dtype).detach()
        return packed

    monkeypatch.setattr(SavedTensor, "pack", recorded_pack)
    of_query = 11 * 3 * shape[0] * shape[2]  # attention runs backward a group at a time, half of them, or all
    at_a_time = 1 if rules is OFF else of_query // 2 if rules is MIXED else of_query
    monkeypatch.setattr("agoq_kernels.attention.AT_A_TIME", at_a_time)
    leaf = x.clone().requires_grad_()
    y = our_layer(leaf, p, rules, shape, kind, act, packing=packing, **fp8)
    ours, our_grads = y.detach(), torch.autograd.grad(y, [leaf, *wanted], grad)
    y = oracle_layer(leaf, p, rules, shape, kind, act, kept, oracle)
    oracle, oracle_grads = y.detach(), torch.autograd.grad(y, [leaf, *wanted], grad)

    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    names = ["x", *(k for k, t in p.items() if getattr(t, "requires_grad", False))]
    for name, a, b in zip(names, our_grads, oracle_grads, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def test_quantization_does_change_gradients(rng):
    """The comparison above has something to see: 'mixed' and 'off' differ by far more than 1e-5."""
    p = parameters(rng, 64, 96, (6, 2, 32), "RMSNorm", "swiglu", True, torch.float32)
    x, grad = torch.randn(2, 11, 3, 64, generator=rng)
    grads = []
    for rules in (OFF, MIXED):
        y = our_layer(x, p, rules, (6, 2, 32), "RMSNorm", "swiglu")
        grads.append(torch.autograd.grad(y, p["qkv"], grad)[0])
    assert (grads[0] - grads[1]).norm() / grads[0].norm() > 1e-2

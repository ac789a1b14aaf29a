"""Errors of gradients that a running layer measures, against plain autograd that never saw our functions."""

from __future__ import annotations

import math
import weakref
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from agoq_kernels.formats import Format
from agoq_kernels.head_norm import HeadNorm
from agoq_kernels.ops import dequantize, quantize
from torch.utils._python_dispatch import TorchDispatchMode

from agoq_megatron.autograd import probing
from agoq_megatron.autograd.activation_linear import ActivationLinear, ActivationLinearSpec
from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.heads import NORM_PARAMETERS, Normed, Rotated
from agoq_megatron.autograd.norm_linear import NormLinear, NormLinearSpec
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.recompute import note_entry, quantized_checkpoint
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import (
    ATTENTION,
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    FC2_INPUT,
    KEY,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM1_OUTPUT,
    QKV,
    QUERY,
    VALUE,
)
from agoq_megatron.observing.gradient_check import errors_of
from agoq_megatron.policy.policy import Rule
from tests.autograd.test_layer_gradients import (
    MIXED,
    OFF,
    one_rank,
    our_layer,
    parameters,
    plain_attention,
    rms,
    turn,
)

KEEP, AGAIN = Rule(keep=True), Rule()
SHAPE = HEADS, GROUPS, DIM = 6, 2, 64
"""Of the attention."""
NF4 = Rule(Format(4, "nf4", 64, 8))
INT8 = Rule(Format(8, "int", 64, 16))
DICE = Rule(Format(5, "int", 64, 8, "stochastic"))
RUN = Run()
ATTENTION_SITES = (QUERY, KEY, VALUE, ATTENTION_OUTPUT)


@pytest.fixture
def probed():
    """Sets a tally of the given layers, and takes it away again."""

    def start(layers: dict[int, bool]) -> probing.GradientTally:
        tally = probing.GradientTally(layers, torch.device("cpu"))
        RUN.tally = tally
        return tally

    yield start
    RUN.tally = None


def sums(tally: probing.GradientTally, name: str, row: int = 0) -> list[float]:
    """Relative errors of the input's and the weight's gradient."""
    return [
        (error / square) ** 0.5
        for error, square in tally.squares[row, probing.columns().index(name), :2].tolist()
    ]


def measured(tally: probing.GradientTally, row: int = 0) -> set[str]:
    return {name for name, own in zip(probing.columns(), tally.squares[row], strict=True) if own.any()}


# --- The three functions, by themselves -----------------------------------------------------------


class Case:
    """A function with its parameters: our call under rules by tensor, and the same by plain autograd."""

    def __init__(self, kind: str, rng, dtype: torch.dtype, normed: bool = False):
        p = parameters(rng, 64, 96, SHAPE, "RMSNorm", "swiglu", True, dtype, "RMSNorm" if normed else None)
        self.of_heads = {name: p[name] for name in NORM_PARAMETERS if normed}
        self.kind, self.p = kind, p
        self.weight = p[{"norm": "qkv", "attention": "proj", "activation": "fc2"}[kind]]
        width = {"norm": 64, "attention": (HEADS + 2 * GROUPS) * DIM, "activation": 192}[kind]
        self.x = torch.randn(11, 3, width, generator=rng, dtype=dtype)
        out = self.weight.shape[0]
        self.grad = torch.randn(11, 3, out, generator=rng, dtype=dtype)
        self.sites = {
            "norm": (NORM1_INPUT,), "attention": ATTENTION_SITES, "activation": (FC1_OUTPUT,),
        }[kind]  # fmt: skip

    def ours(self, x, weight, rules, layer=3, tokens=slice(None), **more):
        def saved(site, rule=AGAIN):
            return SavedTensor(site, layer, rules.get(site, rule), run=RUN)

        if self.kind == "norm":
            spec = NormLinearSpec(
                saved(NORM1_INPUT), saved(NORM1_OUTPUT), "RMSNorm", 1e-5, one_rank(), False, **more
            )
            return NormLinear.apply(x, None, self.p["n1w"], None, weight, None, spec, True)[0]
        if self.kind == "attention":
            spec = AttentionLinearSpec(
                *map(saved, ATTENTION_SITES), groups=GROUPS, head_dim=DIM,
                backend=LocalAttention(1 / math.sqrt(DIM)),
                interleaved=False, recompute=False, **more,
                heads=Normed(HeadNorm("RMSNorm", 1e-5)) if self.of_heads else Rotated(),
            )  # fmt: skip
            angles = self.p["angles"][tokens]
            return AttentionLinear.call(
                qkv=x, angles=angles, weight=weight, spec=spec, keeps=True, **self.of_heads
            )
        spec = ActivationLinearSpec(saved(FC1_OUTPUT), saved(FC2_INPUT), "swiglu", **more)
        return ActivationLinear.apply(x, weight, None, False, spec, True)

    def plain(self, x, weight):
        if self.kind == "norm":
            return rms(x, self.p["n1w"], None, 1e-5) @ weight.t()
        if self.kind == "activation":
            gate, up = x.chunk(2, -1)
            return (F.silu(gate) * up) @ weight.t()
        s, b, _ = x.shape
        q, k, v = x.view(s, b, GROUPS, -1).split([HEADS // GROUPS * DIM, DIM, DIM], -1)
        q = q.reshape(s, b, HEADS, DIM)
        if self.of_heads:
            q, k = (
                rms(t, self.of_heads[f"{n}_norm_weight"], None, 1e-5) for t, n in ((q, "query"), (k, "key"))
            )
        q = turn(q, self.p["angles"][:s])
        return plain_attention(q, turn(k, self.p["angles"][:s]), v).reshape(s, b, -1) @ weight.t()

    def gradients(self, function, *more, rows=slice(None), columns=slice(None)):
        x = self.x[rows, columns].clone().requires_grad_()
        weight = self.weight.detach().clone().requires_grad_()
        out = function(x * 1, weight, *more)
        return torch.autograd.grad(out, [x, weight], self.grad[rows, columns])


def differences(found, exact) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


RULES = {
    "norm": {NORM1_INPUT: NF4},
    "activation": {FC1_OUTPUT: NF4},
    "attention": dict.fromkeys(ATTENTION_SITES, INT8) | {VALUE: NF4},
    "attention, output again": {QUERY: NF4, KEY: INT8, VALUE: NF4},
    "attention, one": {QUERY: KEEP, KEY: NF4, VALUE: KEEP},
    "attention, norms of heads": {QUERY: NF4, KEY: INT8, VALUE: NF4},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("detail", [False, True])
def test_errors_are_those_of_the_gradients(rng, probed, name, detail):
    """Of the first sequence, against plain autograd; alone, as of a function that rounds that one only."""
    rules, case = RULES[name], Case(name.split(",")[0], rng, torch.float64, "norms" in name)
    rounded = [site for site in case.sites if rules.get(site, AGAIN).format is not None]
    tally = probed({7: False, 3: detail})
    case.gradients(case.ours, rules)
    RUN.tally = None

    first = {"columns": slice(0, 1)}
    exact = case.gradients(case.plain, **first)
    together = differences(case.gradients(case.ours, rules, **first), exact)
    column = rounded[0].value if len(rounded) == 1 else ATTENTION
    print(f"{name}: {together}")
    assert sums(tally, column, 1) == pytest.approx(together, rel=1e-6, abs=1e-10)
    assert max(together) > 0.01
    expected = {column}
    if detail and len(rounded) > 1:
        expected |= {site.value for site in rounded}
        for site in rounded:
            keep = {other: KEEP for other in case.sites if rules.get(other, AGAIN).format is not None}
            alone = case.gradients(case.ours, rules | keep | {site: rules[site]}, **first)
            assert sums(tally, site.value, 1) == pytest.approx(differences(alone, exact), rel=1e-6, abs=1e-10)
    assert measured(tally, 1) == expected and not tally.squares[0].any()


@pytest.mark.parametrize("kind", ["norm", "attention", "activation"])
def test_long_sequences_are_cut(rng, probed, monkeypatch, kind):
    monkeypatch.setattr(probing, "TOKENS", 5)
    case = Case(kind, rng, torch.float64)
    rules = RULES[kind]
    tally = probed({3: False})
    case.gradients(case.ours, rules)
    RUN.tally = None
    part = {"rows": slice(0, 5), "columns": slice(0, 1)}
    found = case.gradients(case.ours, rules, 3, slice(0, 5), **part)
    expected = differences(found, case.gradients(case.plain, **part))
    (column,) = measured(tally)
    assert sums(tally, column) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("of_heads", [None, "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_call_stays_what_it_is(rng, probed, dtype, of_heads):
    """Outputs, gradients and the keys of the next calls, with stochastic rounding and inputs overwritten."""
    rules = {site: DICE if rule.format else rule for site, rule in MIXED.items()}
    p = parameters(rng, 64, 96, SHAPE, "RMSNorm", "swiglu", True, dtype, of_heads)
    weights = [p["qkv"], p["proj"], p["fc1"], p["fc2"]]
    if of_heads:
        weights += [p["query_norm_weight"], p["key_norm_weight"]]
    p["angles"] = p["angles"].float()
    x = torch.randn(11, 3, 64, generator=rng).to(dtype).requires_grad_()
    grad = torch.randn(11, 3, 64, generator=rng).to(dtype)
    found = []
    for layers in (None, {1: True}):
        RUN.counter.begin_iteration(-1)
        RUN.counter.begin_iteration(5)
        tally = probed(layers) if layers else None
        results = []
        for _ in range(2):  # two micro-batches; the second is not measured
            y = our_layer(x, p, rules, SHAPE, "RMSNorm", "swiglu", RUN)
            results += [y, *torch.autograd.grad(y, [x, *weights], grad)]
        found.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # The two draws of one run are others, so the keys do count.
    assert not torch.equal(found[0][1], found[0][1 + len(found[0]) // 2])
    assert {site.value for site, rule in rules.items() if rule.format} | {ATTENTION} == measured(tally)


def test_only_the_first_call_of_an_iteration(rng, probed):
    case = Case("activation", rng, torch.float64)
    tally = probed({3: True})
    case.gradients(case.ours, RULES["activation"])
    once = tally.squares.clone()
    case.x = 3 * case.x
    case.gradients(case.ours, RULES["activation"])
    assert torch.equal(tally.squares, once) and once.any()


@pytest.mark.parametrize("kind", ["norm", "attention", "activation"])
def test_gradient_buffers_get_nothing(rng, probed, kind):
    """Where products add to DDP's buffer, what is run for comparison does not."""
    case = Case(kind, rng, torch.float32)
    buffers = []
    for layers in ({4: False}, {3: True}):
        probed(layers)
        weight = case.weight.detach().clone().requires_grad_()
        weight.main_grad = torch.zeros_like(weight)
        x = case.x.clone().requires_grad_()
        case.ours(x * 1, weight, RULES[kind], products=Products(into_buffer=True)).backward(case.grad)
        buffers.append(weight.main_grad)
    assert torch.equal(*buffers) and buffers[0].any()


def test_statistics_of_other_scores_show(rng, probed):
    """What made noise of gradients in pretrained models: rounded queries and keys with large numbers, the
    exact log-sum-exp kept. The tensors themselves are off by less than a percent."""
    errors = ([], [])
    kept = dict.fromkeys(ATTENTION_SITES, INT8)
    for _ in range(7):  # single draws range over a factor of 100
        case = Case("attention", rng, torch.float32)
        x = case.x.view(11, 3, GROUPS, HEADS // GROUPS + 2, DIM)
        x[..., :-1, :] *= 12
        for site, part in ((QUERY, x[..., :-2, :]), (KEY, x[..., -2, :])):
            held = dequantize(*quantize(part.contiguous(), kept[site].format), kept[site].format, x.dtype)
            assert (held - part).norm() < 0.01 * part.norm()
        for rules, found in zip((kept, kept | {ATTENTION_OUTPUT: AGAIN}), errors, strict=True):
            tally = probed({3: False})
            case.gradients(case.ours, rules)
            found.append(errors_of(tally.squares[0].tolist())[ATTENTION])
    print(errors)
    exact, again = map(median, errors)
    assert exact > max(0.25, 1.3 * again)


def test_the_input_of_a_recomputed_region(rng, probed):
    """The pass in which gradients flow starts from what was kept of it; the error is of both."""
    case = Case("norm", rng, torch.float32)
    for entry in (NORM1_INPUT, LAYER_INPUT):
        saved = SavedTensor(entry, 3, NF4, run=RUN)
        rules = {NORM1_INPUT: INT8 if entry is LAYER_INPUT else NF4}

        def region(x, weight, saved=saved, rules=rules):
            note_entry(saved)
            if torch.is_grad_enabled():
                return case.ours(x, weight, rules)
            return case.plain(x, weight)

        def checkpoint(function, _, *args):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

        tally = probed({3: True})
        x, weight = case.x.clone().requires_grad_(), case.weight.detach().clone().requires_grad_()
        quantized_checkpoint(checkpoint)(region, False, x, weight).backward(case.grad)
        RUN.tally = None

        def at(x, rules):
            part = SimpleNamespace(x=x, weight=case.weight, grad=case.grad)
            return Case.gradients(part, case.ours, rules, columns=slice(0, 1))

        exact = case.gradients(case.plain, columns=slice(0, 1))
        held = dequantize(*quantize(case.x, NF4.format), NF4.format, torch.float32)
        together = differences(at(held, rules), exact)
        alone = {LAYER_INPUT: differences(at(held, {NORM1_INPUT: KEEP}), exact),
                 NORM1_INPUT: differences(at(case.x, rules), exact)}  # fmt: skip
        if entry is NORM1_INPUT:
            assert measured(tally) == {entry.value}
            assert sums(tally, entry.value) == pytest.approx(together, rel=1e-3)
        else:
            assert measured(tally) == {QKV, *(site.value for site in alone)}
            assert sums(tally, QKV) == pytest.approx(together, rel=1e-3)
            for site, expected in alone.items():
                assert sums(tally, site.value) == pytest.approx(expected, rel=1e-3)
        assert 0.05 < max(together) < 0.2


def test_what_a_call_holds_goes_with_its_backward_pass(rng, probed):
    """Not with the loss, which a loop may hold on to; and a later micro-batch, which is not measured, holds
    nothing."""
    case = Case("norm", rng, torch.bfloat16)
    tally = probed({3: True})
    entry = SimpleNamespace(layer_number=3, site=LAYER_INPUT)
    tally.note_entry(entry, case.x)
    out = case.ours(case.x.clone().requires_grad_(), case.weight, {NORM1_INPUT: NF4})
    probe = out.grad_fn.probe
    held = [weakref.ref(probe.exact), weakref.ref(probe.inputs[0])]
    assert all(ref() is not None for ref in held)
    out.backward(case.grad)
    assert out.grad_fn is not None and not any(ref() is not None for ref in held)
    tally.note_entry(entry, case.x)
    assert not tally._entries


# --- What it costs, and odd numbers ---------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rules", [OFF, MIXED], ids=["off", "mixed"])
def test_what_is_not_probed_costs_nothing(rng, probed, rules):
    p = parameters(rng, 64, 96, SHAPE, "RMSNorm", "swiglu", True, torch.float32)
    x = torch.randn(11, 3, 64, generator=rng).requires_grad_()
    seen = []
    for layers in (None, {2: True, 3: False}, {1: True}):
        if layers is not None:
            probed(layers)
        with Operations() as operations:
            y = our_layer(x, p, rules, SHAPE, "RMSNorm", "swiglu", RUN)
            torch.autograd.grad(y, [x, p["qkv"], p["proj"], p["fc1"], p["fc2"]], y.detach())
        seen.append(operations.names)
    assert seen[0] == seen[1] and seen[0]
    assert (seen[2] == seen[0]) == (rules is OFF)  # where nothing is rounded there is nothing to compare


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_in_pieces(rng, monkeypatch, dtype, piece):
    monkeypatch.setattr(probing, "PIECE", piece)
    exact, error = torch.randn(2, 37, 41, generator=rng).to(dtype)
    held = exact + error / 8
    found = torch.zeros(2, dtype=torch.float64)
    probing.add_squares(found, held.t(), exact.t())
    probing.add_squares(found, held, exact)
    expected = [2 * (held.double() - exact.double()).square().sum(), 2 * exact.double().square().sum()]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


def test_odd_numbers():
    """What is broken before it is rounded is no error of rounding; what rounding breaks is."""
    none = [[0.0, 0.0], [0.0, 0.0]]
    columns = [none] * len(probing.columns())
    nan, inf = math.nan, math.inf

    def error(*own):
        found = errors_of([[list(pair) for pair in own], *columns[1:]])
        return found.get(probing.columns()[0])

    assert error((0, 0), (0, 0)) is None
    assert error((1, 4), (0, 0)) == 0.5 and error((1, 4), (9, 16)) == 0.75
    assert error((0, 4), (0, 9)) == 0
    assert error((1, 0), (0, 9)) == inf and error((nan, 4), (0, 9)) == inf and error((inf, 4), (0, 9)) == inf
    assert math.isnan(error((nan, nan), (1, 4))) and math.isnan(error((inf, inf), (1, 4)))

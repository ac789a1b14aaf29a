"""The counter of stochastic rounding: no two tensors draw the same, an iteration that is run again does; in a
loop that does not tell it the iteration, and without any."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from agoq_kernels.formats import Format
from torch import nn
from torch.utils.checkpoint import checkpoint

from agoq_megatron.autograd.recompute import note_entry, quantized_checkpoint
from agoq_megatron.autograd.rounding import RoundingCounter, held_in_parts, parameter_names
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor, saved_tensor
from agoq_megatron.modules.expert_sites import MOE_NORM_INPUT, MOE_NORM_OUTPUT
from agoq_megatron.modules.sites import (
    ATTENTION_OUTPUT,
    FC1_OUTPUT,
    FC2_INPUT,
    KEY,
    LATENT_SITES,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM1_OUTPUT,
    NORM2_INPUT,
    NORM2_OUTPUT,
    QUERY,
    VALUE,
)
from agoq_megatron.policy.policy import Rule, load_policy
from agoq_megatron.policy.sites import SITES
from tests.autograd.test_layer_gradients import OFF, our_layer, parameters

WEIGHTS = (
    "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight", "mlp.router.weight",
    *(f"mlp.experts.local_experts.{e}.linear_fc{i}.weight" for e in range(16) for i in (1, 2)),
)  # fmt: skip


def test_it_follows_the_clock_of_a_foreign_loop(seed):
    """The keys are those that a loop which tells the iteration gets."""
    now = 3
    told, follows = RoundingCounter(), RoundingCounter()
    for counter in (told, follows):
        counter.seed(seed, 1)
    follows.follow(lambda: (now, 0))
    keys = []
    for now in (3, 3, 4, 9):
        told.begin_iteration(now)
        for layer, site in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
            key = follows.key(layer, site)
            assert key == told.key(layer, site)
            keys.append(key)
    assert len(set(keys)) == len(keys)


def test_names_that_differ_have_keys_that_differ(seed):
    """Of 100 layers' weights, gradients and states, in words that only change places, and over ranks."""
    names = [f"{what} module.decoder.layers.{n}.{weight}"
             for what in ("gradient", "optimizer") for n in range(100) for weight in WEIGHTS]  # fmt: skip
    words = [f"{random.Random(seed + i).getrandbits(64):016x}"[:8] for i in range(5)]
    names += [" ".join(w + "  " for w in order) for order in itertools.permutations(words)]
    keys = []
    for rank, part in itertools.product(range(3), range(2)):
        counter = RoundingCounter()
        counter.seed(seed, rank, part)
        counter.begin_iteration(7)
        keys += [counter.paired_key(0, name, in_parts=True) for name in names]
        keys += [counter.key(layer, site.value, True) for layer in range(1, 101) for site in SITES]
    assert len(set(keys)) == len(keys)
    assert len({key & 0xFFFFFFFF for key in keys}) > 0.999 * len(keys)


def test_parts_of_a_tensor(seed):
    """Ranks that hold other parts of a tensor draw differently; of one that they hold in common, the same."""
    counters = []
    for part in range(4):
        counters.append(RoundingCounter())
        counters[-1].seed(seed, 1, part)
    assert len({counter.key(1, "a") for counter in counters}) == 1
    assert len({counter.key(1, "a", in_parts=True) for counter in counters}) == 4


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_which_tensors_are_in_parts(sequence_parallel):
    policy = load_policy("agoq")
    config = SimpleNamespace(sequence_parallel=sequence_parallel, agoq_run=Run())
    whole = {site for site in SITES if not saved_tensor(policy, site, 1, config).in_parts}
    between = {LAYER_INPUT, NORM1_INPUT, NORM1_OUTPUT, NORM2_INPUT, NORM2_OUTPUT, *LATENT_SITES}
    between |= {MOE_NORM_INPUT, MOE_NORM_OUTPUT}
    assert whole == (set() if sequence_parallel else between)
    assert saved_tensor(policy, KEY, 1, config).run is config.agoq_run


class Layer(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        self.layer_number, self.fc = number, nn.Linear(2, 2)


class Stage(nn.Module):
    """As Megatron numbers a stage's layers, from the one of number ``first`` on, in wrappers."""

    def __init__(self, first: int, layers: int):
        super().__init__()
        self.module = nn.Module()
        self.module.decoder = nn.Module()
        self.module.decoder.layers = nn.ModuleList(Layer(first + i) for i in range(layers))
        self.module.output_layer = nn.Linear(2, 2)


def test_stages_have_names_of_their_own():
    """None of a layer is another stage's, nor another chunk's of the same stage."""
    named = [parameter_names(Stage(*place)) for place in ((1, 12), (13, 12), (25, 3))]
    layers = [[name for name in names.values() if "output_layer" not in name] for names in named]
    assert all(len(names) == 2 * n for names, n in zip(layers, (12, 12, 3), strict=True))
    assert len(set(itertools.chain(*layers))) == 2 * 27
    assert layers[1][0] == "module.decoder.layers.layer 13.fc.weight"
    stage = Stage(1, 1)
    assert parameter_names(stage)[stage.module.output_layer.weight] == "module.output_layer.weight"


def test_which_parameters_are_in_parts():
    plain, split, expert = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    split.tensor_model_parallel, expert.allreduce = True, False
    assert [held_in_parts(p) for p in (plain, split, expert)] == [False, True, True]


def test_an_iteration_that_is_run_again_draws_the_same(seed):
    """As Megatron's rerun machine does: before, after and between other iterations."""
    counter, clock = RoundingCounter(), [4, "initial run"]
    counter.seed(seed, 2, 3)
    counter.follow(lambda: tuple(clock))

    def draw():
        return [[counter.key(1, "a", True), counter.paired_key(0, "b")] for _ in range(5)]

    first = draw()
    clock[1] = "rerunning in place"
    assert draw() == first
    clock[:] = 5, "initial run"
    other = draw()
    assert not {*itertools.chain(*other)} & {*itertools.chain(*first)}
    assert all(b - a in (0, 1) for (_, a), (_, b) in zip(other[::2], other[1::2], strict=False))


def test_megatrons_loop_is_followed(monkeypatch, seed):
    """Its iteration, and the state of its rerun machine; the ranks are those of the process groups."""
    from agoq_megatron.autograd import clock

    args = SimpleNamespace(curr_iteration=4, seed=seed, agoq_seed=None)
    machine = SimpleNamespace(state="initial run")
    ranks = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 1, get_tensor_model_parallel_world_size=lambda: 2,
        get_expert_model_parallel_rank=lambda: 3, get_expert_model_parallel_world_size=lambda: 4,
        get_data_parallel_rank=lambda with_context_parallel: 5 if with_context_parallel else 2,
    )  # fmt: skip
    monkeypatch.setattr(clock, "mpu", ranks)
    monkeypatch.setattr(clock, "get_args", lambda: args)
    monkeypatch.setattr(clock, "get_rerun_state_machine", lambda: machine)
    run, told = Run(), RoundingCounter()
    clock.follow_megatron(run, args)
    told.seed(seed, 5, 7)
    told.begin_iteration(4)
    expected = [told.key(1, "a", True) for _ in range(3)]
    for machine.state in ("initial run", "rerunning in place", "initial run"):
        assert [run.counter.key(1, "a", True) for _ in range(3)] == expected
    args.curr_iteration = 5
    assert run.counter.key(1, "a", True) not in expected


@pytest.mark.parametrize("micro_batches", [3])
def test_recomputation_draws_the_same(rng, seed, micro_batches):
    """Gradients are those of the same layer kept from its first pass, micro-batch by micro-batch, whose
    backward passes come later and, as in a pipeline, in the same order."""
    dice = Rule(Format(5, "int", 32, 8, rounding="stochastic"))
    shape = 4, 2, 32
    rules = OFF | dict.fromkeys((NORM1_INPUT, QUERY, VALUE, FC1_OUTPUT), dice)
    rules |= {NORM1_OUTPUT: Rule(), FC2_INPUT: Rule(), ATTENTION_OUTPUT: Rule()}
    p = parameters(rng, 64, 96, shape, "RMSNorm", "swiglu", True, torch.float32)
    xs = torch.randn(micro_batches, 11, 2, 64, generator=rng)
    grad = torch.randn(11, 2, 64, generator=rng)
    found = []
    for again in (False, True):
        run = Run()
        run.counter.seed(seed)
        entry = SavedTensor(LAYER_INPUT, 1, Rule(keep=True), run=run)

        def layer(x, run=run, entry=entry):
            note_entry(entry)
            return our_layer(x, p, rules, shape, "RMSNorm", "swiglu", run, keep=torch.is_grad_enabled())

        def recomputed(x, layer=layer):
            stock = lambda function, _, *args: checkpoint(function, *args, use_reentrant=True)  # noqa: E731
            return quantized_checkpoint(stock)(layer, False, x)

        inputs = [x.clone().requires_grad_() for x in xs]
        outputs = [(recomputed if again else layer)(x) for x in inputs]
        for out in outputs:
            out.backward(grad)
        found.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_keys_in_pairs(seed):
    """An even key and the next one, in turn; another pair after that, and in every iteration and site."""
    counter = RoundingCounter()
    counter.seed(seed)
    pairs = []
    for iteration in (0, 1):
        counter.begin_iteration(iteration)
        for site in ("a", "b"):
            keys = [counter.paired_key(0, site) for _ in range(5)]
            assert [key - keys[0] for key in keys[:2]] == [0, 1] and keys[3] == keys[2] + 1
            pairs += keys[::2]
    assert all(key % 2 == 0 for key in pairs) and len(set(pairs)) == len(pairs)
    again = RoundingCounter()  # resumed in the second iteration
    again.seed(seed)
    again.begin_iteration(1)
    assert [again.paired_key(0, "a") for _ in range(5)][::2] == pairs[6:9]


def test_without_megatrons_arguments_there_is_no_clock(monkeypatch):
    from megatron.training import global_vars

    from agoq_megatron.entries import stock
    from agoq_megatron.seams.refusals import UsageError

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    with pytest.raises(UsageError, match="--spec agoq_megatron.specs agoq_layer_spec.*megatron.training"):
        stock.arguments()

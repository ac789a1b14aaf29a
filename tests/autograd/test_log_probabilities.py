"""Log-probabilities of given tokens against FP64, on one rank and two; the largest tensor made for them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from launch import spawn_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import agoq_megatron
from agoq_megatron.autograd.log_probabilities import OneRank

S, B, H, V = 10, 3, 24, 35  # of which V on each rank


def exact(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float, upstream):
    """Log-probabilities ``[b, s]`` and gradients in FP64; nothing of labels of -100."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    whole = (x @ weight.t() / temperature).log_softmax(-1).transpose(0, 1)
    found = whole.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    (found * upstream).sum().backward()
    return found.detach(), x.grad, weight.grad


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def draw(rng: torch.Generator, world: int) -> tuple[torch.Tensor, ...]:
    """Labels at both ends of every rank's part of the vocabulary, and some that are ignored."""
    x, weight = torch.randn(S, B, H, generator=rng), torch.randn(V * world, H, generator=rng)
    labels = torch.randint(0, V * world, (B, S), generator=rng)
    ends = torch.tensor([0, V - 1, V * (world - 1), V * world - 1])
    labels[0, :4], labels[1, 3:6], labels[2, -1] = ends, -100, -100
    return x, weight, labels, torch.randn(B, S, generator=rng)


def compare(rank: int, world: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    x, weight, labels, upstream = draw(torch.Generator().manual_seed(seed), world)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, weight = x.to(dtype), weight.to(dtype)
        for temperature in (1.0, 0.7, 3.0):
            wanted, grad_x, grad_weight = exact(x, weight, labels, temperature, upstream)
            grad_weight = grad_weight.chunk(world)[rank]
            for chunks, sequence_parallel, fused in (
                *((1, False, False), (4, True, False), (7, False, True), (1000, True, True)),
            ):
                own_x = x.chunk(world)[rank] if sequence_parallel else x
                own_grad = grad_x.chunk(world)[rank] if sequence_parallel else grad_x
                own_x = own_x.clone().requires_grad_()
                own = torch.nn.Parameter(weight.chunk(world)[rank].clone())
                own.main_grad, own.grad_added_to_main_grad = torch.ones(V, H), False
                got = agoq_megatron.log_probabilities(
                    own_x, own, labels, chunks=chunks, temperature=temperature, tp_group=dist.group.WORLD,
                    sequence_parallel=sequence_parallel, gradient_accumulation_fusion=fused,
                )  # fmt: skip
                assert got.shape == (B, S) and got.dtype == torch.float32 and error(got, wanted) < bound
                assert not got[labels == -100].any()
                (got * upstream).sum().backward()
                assert own_x.grad.dtype == dtype and error(own_x.grad, own_grad) < bound
                assert own.grad_added_to_main_grad == fused
                assert error(own.main_grad - 1 if fused else own.grad, grad_weight) < bound
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_equal_fp64(tmp_path, seed, world):
    spawn_ranks(world, compare, world, str(tmp_path / "store"), seed)


def by_an_output_processor(rank: int, store: str, seed: int) -> None:
    """As docs/megatron-lm.md has it, of a model by megatron.core alone."""
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from enabled_models import SEQUENCE, VOCABULARY, config_of, gpt, local_spec
    from megatron.core import parallel_state

    def processor(*, hidden_states, output_layer, output_weight, labels, config, **others):
        weight = output_layer.weight if output_weight is None else output_weight
        return agoq_megatron.log_probabilities(
            hidden_states,
            weight,
            labels,
            chunks=3,
            temperature=1.7,
            sequence_parallel=config.sequence_parallel,
        )

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=1)
    parallel_state.initialize_model_parallel()
    for tied in (False, True):
        config = config_of(bf16=False, params_dtype=torch.float32)
        model = gpt(config, local_spec(), seed, share_embeddings_and_output_weights=tied)
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
        given = tokens[:, :-1], torch.arange(SEQUENCE)[None], None
        logits = model(*given).double() / 1.7
        wanted = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(wanted.sum(), parameters)
        got = model(*given, labels=tokens[:, 1:], output_processor=processor)
        assert error(got, wanted) < 1e-5
        for name, one, other in zip(
            names, torch.autograd.grad(got.sum(), parameters), gradients, strict=True
        ):
            assert error(one, other.double()) < 1e-5, name
    dist.destroy_process_group()


def test_of_a_model_by_an_output_processor(tmp_path, seed):
    spawn_ranks(1, by_an_output_processor, str(tmp_path / "store"), seed)


def test_without_process_groups(rng):
    """FP64 is kept, and a second chunk count gives the same; frozen weights and no gradients at all."""
    x, weight, labels, upstream = draw(rng, 1)
    x, weight = x.double().requires_grad_(), weight.double()
    wanted, grad_x, _ = exact(x.detach(), weight, labels, 1.3, upstream)
    got = agoq_megatron.log_probabilities(x, weight, labels, chunks=3, temperature=1.3)
    (got * upstream).sum().backward()
    assert got.dtype == torch.float64 and error(got, wanted) < 1e-13 and error(x.grad, grad_x) < 1e-13
    with torch.no_grad():
        again = agoq_megatron.log_probabilities(x, weight, labels, temperature=1.3)
    assert not again.requires_grad and error(again, wanted) < 1e-13
    every = torch.full_like(labels, 7)
    assert not agoq_megatron.log_probabilities(x, weight, every, ignore_index=7).any()


def test_labels_outside_of_the_vocabulary_are_seen(rng):
    x, weight, labels, _ = draw(rng, 1)
    labels[0, 0], labels[1, 1] = V, -1
    got = agoq_megatron.log_probabilities(x, weight, labels)
    assert got.isnan().nonzero().tolist() == [[0, 0], [1, 1]]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("chunks", [1, 7])
def test_one_chunk_of_logits_at_a_time(rng, chunks):
    s, b, h, v = 50, 2, 3, 640
    x = torch.randn(s, b, h, generator=rng, requires_grad=True)
    weight = torch.randn(v, h, generator=rng, requires_grad=True)
    labels = torch.randint(0, v, (b, s), generator=rng)
    with Largest() as largest:
        agoq_megatron.log_probabilities(x, weight, labels, chunks=chunks, temperature=0.9).sum().backward()
    assert largest.elements == math.ceil(s * b / chunks) * v


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"labels": torch.zeros(S, B, dtype=torch.long)}, r"labels \[b, s\].* \(10, 3\)"),
        ({"weight": torch.zeros(V, H + 1)}, r"weight \[v, h\].* \(35, 25\)"),
        ({"hidden_states": torch.zeros(S * B, H)}, r"hidden_states \[s, b, h\].* \(30, 24\)"),
        ({"chunks": 0}, "chunks must be .*not 0"),
        ({"chunks": 2.0}, "chunks must be .*not 2.0"),
        ({"temperature": 0.0}, "temperature must be .*not 0.0"),
        ({"temperature": math.nan}, "temperature must be .*not nan"),
    ],
)
def test_refused(changed, message):
    fine = {"hidden_states": torch.zeros(S, B, H), "weight": torch.zeros(V, H)}
    fine |= {"labels": torch.zeros(B, S, dtype=torch.long), "tp_group": OneRank}
    with pytest.raises(ValueError, match=message):
        agoq_megatron.log_probabilities(**(fine | changed))

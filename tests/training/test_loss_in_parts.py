"""What the loss in parts takes of the model and its output layer, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from agoq_megatron.entries import loss_in_parts as module
from agoq_megatron.entries.loss_in_parts import loss_in_parts

S, B, H, V = 6, 2, 8, 12
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


class OutputLayer:
    """Megatron's, as far as it is called; ``more`` is what a call of the product gets besides."""

    def __init__(self, bias=None, **more):
        self.bias, self.more = bias, more

    def __call__(self, hidden, weight):
        product = self._forward_impl(
            input=hidden, weight=weight, bias=None, gradient_accumulation_fusion=False, allreduce_dgrad=False,
            sequence_parallel=False, tp_group=ONE_RANK, **{"grad_output_buffer": None} | self.more,
        )  # fmt: skip
        return product, self.bias

    _forward_impl = None


def arguments(rng, **others):
    """What Megatron's model hands to an output_processor."""
    idle = (
        *("loss_mask", "input_ids", "position_ids", "attention_mask", "decoder_input", "scale_logits"),
        "packed_seq_params",
    )
    none = ("inference_context", "runtime_gather_output", "context")
    return dict(
        hidden_states=torch.randn(S, B, H, generator=rng), output_layer=OutputLayer(),
        output_weight=torch.nn.Parameter(torch.randn(V, H, generator=rng)),
        labels=torch.randint(0, V, (B, S), generator=rng), compute_language_model_loss=len,
        config=SimpleNamespace(use_mup=False), **dict.fromkeys(idle, 1), **dict.fromkeys(none),
    ) | others  # fmt: skip


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    monkeypatch.setattr(module, "get_args", lambda: SimpleNamespace(agoq_loss_chunks=3))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)


def test_the_losses_are_those_of_the_whole(rng):
    given = arguments(rng)
    logits = given["hidden_states"].double() @ given["output_weight"].double().t()
    wanted = F.cross_entropy(logits.permute(1, 2, 0), given["labels"], reduction="none")
    torch.testing.assert_close(loss_in_parts(**given).double(), wanted, rtol=1e-5, atol=1e-5)
    given["output_layer"] = OutputLayer(gtp_remat_size=1)
    loss_in_parts(**given)


@pytest.mark.parametrize(
    "layer, others, named",
    [
        ({"bias": torch.ones(V)}, {}, "bias"),
        ({"gtp_remat_size": 2}, {}, "gtp_remat_size"),
        ({"grad_output_buffer": []}, {}, "grad_output_buffer"),
        ({"a_new_argument": 1}, {}, "a_new_argument"),
        ({}, {"inference_context": object()}, "inference_context"),
        ({}, {"runtime_gather_output": True}, "runtime_gather_output"),
        ({}, {"config": SimpleNamespace(use_mup=True)}, "--use-mup"),
        ({}, {"loss_scaling": 2.0}, "loss_scaling"),
    ],
)
def test_what_would_change_the_losses_is_refused_by_name(rng, layer, others, named):
    with pytest.raises(NotImplementedError, match=f"--agoq-loss-chunks: .* does not take {named}"):
        loss_in_parts(**arguments(rng, output_layer=OutputLayer(**layer), **others))


def test_a_bias_within_the_product_is_refused(rng):
    class Biased(OutputLayer):
        def __call__(self, hidden, weight):
            return self._forward_impl(
                input=hidden, weight=weight, bias=torch.ones(V), gradient_accumulation_fusion=False,
                sequence_parallel=False, tp_group=ONE_RANK,
            ), None  # fmt: skip

    with pytest.raises(NotImplementedError, match="does not take bias"):
        loss_in_parts(**arguments(rng, output_layer=Biased()))

"""Two models in one process, at once and one after the other: each trains as it does alone.

Run as a script it trains them: the CPU facade changes a process for good.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

CHECKS = ("at once", "one after the other", "in other process groups", "who listens", "a shared config")
STEPS, MICRO_BATCHES, VOCABULARY, SEQUENCE = 3, 2, 97, 16
SIZES = ((64, 8, 2), (128, 9, 1))  # hidden size, seed of rounding, layers


@pytest.fixture(scope="module")
def outcomes(launcher, tmp_path_factory):
    seed, path = int.from_bytes(os.urandom(3), "big"), tmp_path_factory.mktemp("two") / "found.json"
    print("seed", seed)
    launcher.script(__file__, path, seed, timeout=120)
    return json.loads(path.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_two_models(outcomes, check):
    assert outcomes[check]


def test_groups_for_two_hops_are_a_runs_own(monkeypatch):
    """Those of a run that has ended, with its groups, are not handed to the next one."""
    from agoq_kernels.gradients import GradientFormat

    from agoq_megatron.autograd.run import Run
    from agoq_megatron.gradients import settings

    made, world = [], [0, 1, 2, 3]

    def gather(everyone, mine):
        everyone[:] = [mine] * len(world)

    fake = types.SimpleNamespace(
        get_process_group_ranks=lambda group: world, get_world_size=lambda: len(world), get_rank=lambda: 0,
        all_gather_object=gather, new_group=lambda ranks, timeout: made.append(ranks) or object(),
    )  # fmt: skip
    monkeypatch.setattr(settings, "dist", fake)
    monkeypatch.setattr(settings, "connect", lambda groups: None)
    wanted = settings.GradientSettings(GradientFormat(), node_size=2)
    first, second = Run(), Run()
    hops = settings.hops_for(object(), wanted, first.hops)
    assert len(made) == 4 and settings.hops_for(object(), wanted, first.hops) is hops and len(made) == 4
    other = settings.hops_for(object(), wanted, second.hops)
    assert len(made) == 8 and other.within is not hops.within and other.between is not hops.between


# -------------------------------------------------------------------- in the script


class Trained:
    """A model with its 8-bit gradients and states, everything rounded stochastically.

    Args:
        config: of the optimizer; others may use it too.
    """

    def __init__(self, size: tuple[int, int, int], seed: int, config):
        import torch.nn.functional as F
        from megatron.core import optimizer as stock
        from megatron.core import tensor_parallel
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel

        from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP
        from agoq_megatron.gradients.settings import GradientFormat, GradientSettings
        from agoq_megatron.model.transformer_config import AGoQTransformerConfig
        from agoq_megatron.optimizer.quantized_states import optimizer_of
        from agoq_megatron.optimizer.settings import OptimizerSettings
        from agoq_megatron.policy.policy import load_policy
        from agoq_megatron.specs import agoq_layer_spec

        hidden, rounding, layers = size
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        torch.manual_seed(seed)
        own = AGoQTransformerConfig(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=128, num_attention_heads=2, kv_channels=64,
            hidden_dropout=0.0, attention_dropout=0.0, gated_linear_unit=True, activation_func=F.silu,
            add_bias_linear=False, normalization="RMSNorm", bias_dropout_fusion=False, bf16=True,
            masked_softmax_fusion=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
            bias_activation_fusion=False, params_dtype=torch.bfloat16,
        )  # fmt: skip
        own.agoq = load_policy("agoq", "stochastic")
        own.agoq_gradients = GradientSettings(GradientFormat(residual_bits=4, rounding="stochastic"))
        own.agoq_run.counter.seed(rounding)
        self.run = own.agoq_run
        model = GPTModel(
            own, agoq_layer_spec(types.SimpleNamespace(transformer=own)), vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE, position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )  # fmt: skip
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True,
            bucket_size=40_000,
        )  # fmt: skip
        self.model = QuantizedGradientDDP(own, ddp, model.bfloat16())
        before = stock.DistributedOptimizer
        stock.DistributedOptimizer = optimizer_of(OptimizerSettings())
        try:
            self.optimizer = stock.get_megatron_optimizer(config, [self.model], use_gloo_process_groups=False)
        finally:
            stock.DistributedOptimizer = before
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"]
        self._data = torch.Generator().manual_seed(seed)

    def parts(self):
        """Trains; stops after every forward and backward pass and every step."""
        positions = torch.arange(SEQUENCE)[None]
        for iteration in range(STEPS):
            self.run.counter.begin_iteration(iteration)
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            for micro_batch in range(MICRO_BATCHES):
                tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=self._data)
                self.model.is_last_microbatch = micro_batch == MICRO_BATCHES - 1
                with_sync = torch.enable_grad() if self.model.is_last_microbatch else self.model.no_sync()
                with with_sync:
                    losses = self.model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
                yield
                with torch.enable_grad() if self.model.is_last_microbatch else self.model.no_sync():
                    losses.float().mean().backward()
                yield
            self.model.finish_grad_sync()
            self.optimizer.step()
            yield

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def alone(size: tuple, seed: int, config) -> list[torch.Tensor]:
    trained = Trained(size, seed, config)
    for _ in trained.parts():
        pass
    return trained.weights()


def connect(path: str) -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(path, 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def main(path: Path, seed: int) -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        connect(f"{folder}/first")
        config = OptimizerConfig(
            bf16=True, use_distributed_optimizer=True, params_dtype=torch.bfloat16, optimizer="adam", lr=1e-2
        )
        fresh = dict(vars(config))
        expected = [alone(size, seed + i, config) for i, size in enumerate(SIZES)]
        found["a shared config"] = vars(config) == fresh
        again = [alone(size, seed + i, config) for i, size in enumerate(SIZES)]
        found["one after the other"] = all(map(same, expected, again))

        both = [Trained(size, seed + i, config) for i, size in enumerate(SIZES)]
        heard = []
        both[0].run.listener = lambda number, name, tensors: heard.append(number)
        calls = [trained.parts() for trained in both]
        done = object()
        while calls:
            calls = [part for part in calls if next(part, done) is not done]
        found["at once"] = all(same(trained.weights(), e) for trained, e in zip(both, expected, strict=True))
        heard_of_one = len(heard)
        heard.clear()
        single = Trained(SIZES[0], seed, config)
        single.run.listener = lambda number, name, tensors: heard.append(number)
        for _ in single.parts():
            pass
        found["who listens"] = heard_of_one == len(heard) > 0

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        connect(f"{folder}/second")
        found["in other process groups"] = same(alone(SIZES[0], seed, config), expected[0])
        dist.destroy_process_group()
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

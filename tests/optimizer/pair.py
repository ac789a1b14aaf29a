"""One model and its optimizer twice, on the ranks of a script: with 8-bit gradients, and Megatron's own over
the same numbers in FP32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

LR, DECOUPLED_LR, WEIGHT_DECAY = 0.01, 0.003, 0.1


class Counted(torch.optim.Optimizer):
    """Counts steps as Transformer Engine's and apex's Adam do: in the groups, from the first step on."""

    in_tensor = False

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            one = torch.ones((), dtype=torch.int) if self.in_tensor else 1
            if "step" in group:
                group["step"] += one
            else:
                group["step"] = one
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["step"] * p.grad  # a wrong count shows in the weights


class Pair:
    """One model twice: ours with 8-bit gradients, and Megatron's own with FP32 ones."""

    def __init__(
        self, kind: str, seed: int, inner=None, bucket_size: int = 6000, shared: str | None = None, **options
    ):
        from megatron.core import optimizer as stock
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer import TransformerConfig

        from agoq_megatron.autograd.run import Run
        from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP
        from agoq_megatron.gradients.settings import GradientFormat, GradientSettings
        from agoq_megatron.optimizer import quantized_gradients as ours

        bf16 = not kind.endswith("FP32 model")
        sharded = kind.startswith("distributed")
        self._rng = torch.Generator().manual_seed(seed + dist.get_rank())
        self._stock_names = {
            "DistributedOptimizer": ours.QuantizedDistributedOptimizer,
            "Float16OptimizerWithFloat16Params": ours.QuantizedFloat16Optimizer,
            "FP32Optimizer": ours.QuantizedFP32Optimizer,
        }
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        config.agoq_gradients, config.agoq_run = GradientSettings(GradientFormat()), Run()
        options = {
            "optimizer": "adam", "lr": LR, "decoupled_lr": DECOUPLED_LR, "weight_decay": WEIGHT_DECAY,
            "clip_grad": 0.0, "log_num_zeros_in_grad": True, **options,
        }  # fmt: skip
        self.models, self.optimizers = [], []
        for ddp in (QuantizedGradientDDP, DistributedDataParallel):
            model = self._model(seed)
            if shared is not None:  # its norm is another stage's
                getattr(model, shared).shared = True
            ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=sharded, bucket_size=bucket_size, grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,  # else the stock class takes one bucket
            )  # fmt: skip
            wrapped = ddp(config, ddp_config, model.bfloat16() if bf16 else model)
            wanted = OptimizerConfig(
                bf16=bf16, use_distributed_optimizer=sharded, params_dtype=torch.bfloat16, **options
            )
            names = {name: getattr(stock, name) for name in self._stock_names}
            mine = ddp is QuantizedGradientDDP
            replaced = dict(self._stock_names) if mine else {}
            if inner is not None:
                replaced["USING_PYTORCH_OPTIMIZER"], replaced["Adam"] = False, inner
            before = {name: getattr(stock, name) for name in replaced} | names
            vars(stock).update(replaced)
            try:
                built = stock.get_megatron_optimizer(wanted, [wrapped], use_gloo_process_groups=False)
            finally:
                vars(stock).update(before)
            for group in built.param_groups:  # what the scheduler does
                group["lr"] = group["max_lr"]
                group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
            self.models.append(wrapped)
            self.optimizers.append(built)
        (self.inner,) = self.optimizers[0].chained_optimizers
        (self.stock_inner,) = self.optimizers[1].chained_optimizers
        assert type(self.inner) in self._stock_names.values() and type(self.stock_inner) in names.values()
        parts = [len(buffer.buckets) for buffer in self.models[0].buffers]
        assert parts == [4 if bucket_size == 6000 else 1], parts

    @staticmethod
    def _model(seed: int) -> torch.nn.Module:
        rng = torch.Generator().manual_seed(seed)
        model = torch.nn.Module()
        for name, shape in (
            ("embedding", (90, 96)), ("norm", (96,)), ("square", (96, 96)), ("small", (8, 8)),
            ("wide", (41, 333)), ("bias", (41,)), ("tall", (200, 31)),
        ):  # fmt: skip
            setattr(model, name, torch.nn.Parameter(torch.randn(shape, generator=rng)))
        model.embedding.is_embedding_or_output_parameter = True
        return model

    def gradients(self, scale: float = 1.0, bad: float | None = None) -> None:
        """Made-up gradients of two micro-batches, reduced. The stock model gets the numbers ours holds."""
        ours, stock = self.models
        ours.zero_grad_buffer()
        stock.zero_grad_buffer()
        for micro_batch in range(2):
            for name, p in ours.module.named_parameters():
                grad = torch.randn(p.shape, generator=self._rng) * scale
                grad[: p.shape[0] // 3] = 0
                if bad is not None and name == "wide" and micro_batch == 1:
                    grad[2] = bad
                p.main_grad.add_(grad.bfloat16() if p.dtype == torch.bfloat16 else grad)
        for group in ours.bucket_groups:
            group.start_grad_sync()
            group.finish_grad_sync()
        for p, q in zip(ours.module.parameters(), stock.module.parameters(), strict=True):
            q.main_grad.copy_(self._whole(p))

    @staticmethod
    def _whole(p) -> torch.Tensor:
        """The reduced gradient, which with the distributed optimizer lies on several ranks."""
        if isinstance(p.main_grad, torch.Tensor):
            return p.main_grad
        first, last = p.main_grad.bucket.codes.readable()
        begin, out = p.main_grad.start, torch.zeros(p.numel())
        start, end = max(begin, first), min(begin + p.numel(), last)
        if start < end:
            out[start - begin : end - begin] = p.main_grad.read(start - begin, end - begin)
        if last - first < p.main_grad.bucket.codes.numel:
            dist.all_reduce(out)  # zeros elsewhere: exact
        return out.view(p.shape)

    def step(self) -> list[tuple]:
        return [optimizer.step() for optimizer in self.optimizers]

    def assert_same_weights(self, exact: bool = True) -> None:
        ours, stock = ([*m.module.parameters()] for m in self.models)
        for p, q in zip(ours, stock, strict=True):
            if exact:
                assert torch.equal(p.nan_to_num(7.5), q.nan_to_num(7.5)), (p - q).abs().max()
            else:
                torch.testing.assert_close(p, q, equal_nan=True)
        # BF16 would hide small differences. Shards differ between the two where there are several.
        if dist.get_world_size() == 1 or not hasattr(self.inner, "shard_fp32_groups"):
            a, b = (
                sorted((p.detach().flatten() for p in o.get_parameters()), key=lambda p: (p.numel(), p[0]))
                for o in (self.inner, self.stock_inner)
            )
            for p, q in zip(a, b, strict=True):
                tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-7}
                torch.testing.assert_close(p, q, equal_nan=True, **tolerance)


def assert_statistics(results: list[tuple], step: bool = True) -> float:
    """Returns the norm."""
    (ours, norm, zeros), (stock, stock_norm, stock_zeros) = results
    assert ours == stock == step
    assert norm == pytest.approx(stock_norm, rel=1e-6, nan_ok=True)
    assert zeros == stock_zeros and zeros > 0
    return norm

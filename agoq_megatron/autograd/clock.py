"""The clock of stochastic rounding: Megatron's loop."""

from __future__ import annotations

from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from agoq_megatron.autograd.run import Run


def follow_megatron(run: Run, args) -> None:
    """Let stochastic rounding draw by Megatron's loop, which notes the iteration before each step, a resumed
    run's first one included, and runs an iteration again where its rerun machine says so.

    Args:
        args: Megatron's arguments, and ours.
    """
    seed = args.seed if args.agoq_seed is None else args.agoq_seed
    part = mpu.get_tensor_model_parallel_rank()
    if mpu.get_expert_model_parallel_world_size() > 1:
        part += mpu.get_tensor_model_parallel_world_size() * mpu.get_expert_model_parallel_rank()
    run.counter.seed(seed, mpu.get_data_parallel_rank(with_context_parallel=True), part)
    run.counter.follow(lambda: (get_args().curr_iteration, get_rerun_state_machine().state))

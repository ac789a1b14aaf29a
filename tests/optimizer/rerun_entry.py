"""The entry script, which prints a line of every evaluation of an iteration, its re-runs by Megatron's rerun
machine included: checksums of its losses and of the gradients that the optimizer reads.

Environment: with RERUN_STATS the machine runs every iteration twice and compares losses and norms, which the
flag for it (--rerun-mode report_stats) does not switch on in this Megatron. RERUN_NODE is what the machine
takes for the name of this one.
"""

from __future__ import annotations

import os
import zlib


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    import torch
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
    from megatron.training import initialize

    from agoq_megatron.entries import training

    if "RERUN_STATS" in os.environ:
        initialize.RerunMode = lambda _: RerunMode.REPORT_DETERMINISM_STATS
    if node := os.environ.get("RERUN_NODE"):
        os.uname = lambda: ("Linux", node)
    evaluated = RerunState.INITIAL_RUN, RerunState.RERUNNING_IN_PLACE, RerunState.RERUNNING_FROM_CHECKPOINT
    runs, validate = RerunStateMachine.should_run_forward_backward, RerunStateMachine.validate_result
    chunks, losses, prepare = [], [], training.prepare

    def checksum(numbers) -> str:
        return f"{zlib.crc32(numbers.detach().reshape(-1).view(torch.uint8).numpy().tobytes()):08x}"

    def gradients():
        for bucket in (bucket for chunk in chunks for buffer in chunk.buffers for bucket in buffer.buckets):
            start, end = bucket.codes.readable()
            yield checksum(torch.cat((bucket.codes.read(start, end - start), bucket.side)))

    def should_run(self, data):
        if self.state in evaluated:
            place = f"{self.current_iteration} rank {torch.distributed.get_rank()} {self.state.name}"
            print(f"\nEVALUATED {place}: {' '.join((*losses, *gradients()))}", flush=True)
        losses.clear()
        return runs(self, data)

    def validated(self, result, *others, message, **more):
        if "local forward loss" in message:
            losses.append(checksum(result))
        validate(self, result, *others, message=message, **more)

    def following(step):
        def train_step(forward_step, data, model, *others, **more):
            chunks[:] = model
            return step(forward_step, data, model, *others, **more)

        return train_step

    def prepared(on_cpu: bool):
        found = prepare(on_cpu)  # which looks whether Megatron is as it should be
        compat.bind_training_loop("train_step", following)
        RerunStateMachine.should_run_forward_backward = should_run
        RerunStateMachine.validate_result = validated
        return found

    training.prepare = prepared
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

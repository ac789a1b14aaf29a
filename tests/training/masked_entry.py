"""The entry script, with the tokens of some batches masked out of the loss: those of the first and the third
iteration all, of the second one rank's, of the fourth one micro-batch's, and of the first evaluation all."""

from __future__ import annotations


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    import torch
    from megatron.training import get_args

    from agoq_megatron.entries import training

    draw, count = training.get_batch, {}

    def get_batch(*given):
        batch = list(draw(*given))
        iteration, rank = get_args().curr_iteration, torch.distributed.get_rank()
        place = iteration, torch.is_grad_enabled()
        micro_batch = count[place] = count.get(place, -1) + 1
        masked = {0: True, 1: rank == 0, 2: True, 3: rank == 1 and micro_batch == 0}.get(iteration, False)
        if not torch.is_grad_enabled():
            masked = iteration < 3
        if masked:
            batch[2] = torch.zeros_like(batch[2])
        return tuple(batch)

    training.get_batch = get_batch
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

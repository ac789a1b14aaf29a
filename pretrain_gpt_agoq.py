"""Pretrain a GPT through ``megatron.training``, saving its activations in about 4 bits.

    torchrun --nproc-per-node N pretrain_gpt_agoq.py FLAGS

takes every flag of Megatron's, and those of ``agoq_megatron/config.py``. ``--agoq-dry-run`` prints
what would be saved and stops. Without a GPU the same command trains on the CPU.
"""


def main() -> None:
    import torch

    from agoq_megatron.seams import compat

    compat.silence_missing_accelerators()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        from agoq_megatron.seams import cpu

        cpu.install()

    from agoq_megatron.entries import training

    training.main(on_cpu)


# Megatron's checkpoint writer starts processes that import this file again.
if __name__ == "__main__":
    main()

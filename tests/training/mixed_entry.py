"""The entry script, on whose second rank torch sees GPUs."""

from __future__ import annotations

import os


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    import torch

    from agoq_megatron.entries import training

    if os.environ["RANK"] == "1":
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

"""The entry script, with a disk that is slow where rank 0 writes the number of the last checkpoint."""

from __future__ import annotations

import time

SECONDS = 0.6


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    from agoq_megatron.entries import training
    from agoq_megatron.resuming import loop

    write = loop.write_durably

    def write_late(path, text):
        time.sleep(SECONDS)
        write(path, text)

    loop.write_durably = write_late
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

"""The entry script, whose W&B process is killed as soon as the run is open there."""

from __future__ import annotations


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    import psutil

    from agoq_megatron.entries import training

    prepare = training.prepare

    def prepare_and_kill(on_cpu: bool):
        prepared = prepare(on_cpu)
        (process,) = [p for p in psutil.Process().children() if p.name() == "wandb-core"]
        process.kill()
        process.wait()
        return prepared

    training.prepare = prepare_and_kill
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

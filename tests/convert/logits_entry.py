"""Builds and loads the model as training does, and instead of training writes its logits.

Reads tokens ``[b, s]`` from the file that LOGITS_TOKENS names, writes ``[b, s, v]`` to LOGITS_OUTPUT's.
"""

import os


def main():
    from agoq_megatron.seams import compat, cpu

    cpu.install()
    compat.silence_missing_accelerators()
    import megatron.training.training as loop
    import torch

    from agoq_megatron.entries import training

    def write_logits(forward_step, model, *args, **kwargs):
        tokens = torch.load(os.environ["LOGITS_TOKENS"])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model[0](tokens, positions, None)
        torch.save(logits, os.environ["LOGITS_OUTPUT"])
        raise SystemExit(0)

    prepare = training.prepare

    def prepare_and_bind(on_cpu):  # after it has looked at what it will call
        prepared = prepare(on_cpu)
        loop.train = write_logits
        return prepared

    training.prepare = prepare_and_bind
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

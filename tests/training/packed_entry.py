"""The entry script, with documents given to the model as Megatron-LM's own script gives them: sequences of a
micro-batch one behind the other in one, their bounds on the device, rotary angles of the longest document."""

from __future__ import annotations


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from agoq_megatron.entries import training

    draw = training.get_batch

    def get_batch(*given):
        *batch, params = draw(*given)
        bounds = params.cu_seqlens_q.int()
        longest = bounds.diff().max()  # a tensor, as Megatron's data sets have it
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds.clone(), max_seqlen_q=longest,
            max_seqlen_kv=longest, total_tokens=int(bounds[-1]),
        )  # fmt: skip
        flat = (x.reshape(1, -1) if isinstance(x, torch.Tensor) else x for x in batch)
        return *flat, packed

    training.get_batch = get_batch
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

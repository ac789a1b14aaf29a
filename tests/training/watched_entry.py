"""The entry script, after which every rank prints what its layers' tensors are kept as."""

from __future__ import annotations


def main() -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()

    from agoq_megatron.entries import training
    from agoq_megatron.observing.report import RunObserver

    finish = RunObserver.finish

    def printing(self):
        for layer in self.watcher._layers:
            saved = [layer._input, *vars(layer.self_attention.core_attention.spec).values()]
            saved += vars(layer.self_attention.linear_qkv.spec).values()
            saved += (layer.mlp.linear_fc1.spec.norm_input, layer.mlp.spec.pre_activation)
            for it in saved:
                if getattr(it, "rule", None) is not None and it.rule.format is not None:
                    path = it.site.path(it.layer_number)
                    print(f"\nrank {self._args.rank} keeps {path} in {it.rule.format.bits}", flush=True)
        finish(self)

    RunObserver.finish = printing
    training.main(on_cpu=True)


if __name__ == "__main__":
    main()

"""What a layer really keeps for its backward pass: measured while the model runs.

A hook on every tensor that autograd saves inside the decoder, and inside the layers of multi-token prediction
but for their embedding, whoever saves it, counts each storage
once, whole. Parameters and buffers are not activations and are left out. The names come from the
autograd functions, which announce what they keep; anything else falls under ``OTHER``, so that nothing
kept by an unowned operation can hide.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from agoq_megatron.model.memory import DROPOUT, Plan
from agoq_megatron.modules.sites import PROJECTED

OTHER = "other (kept by operations that AGoQ does not own)"


class Meter:
    """Measures one forward pass of each model chunk in the iterations asked for.

    Args:
        plan: the prediction to stand beside.
        interval: measure every that many iterations; 0 measures the first one only.
    """

    def __init__(self, plan: Plan, interval: int = 0):
        self._plan = plan
        self._interval = interval
        self._iteration: int | None = None
        self._due: set[int] = set()
        self._decoders: list[torch.nn.Module] = []  # and the layers of multi-token prediction
        self._current: int | None = None
        self._other = OTHER
        self._storages: dict[int, tuple[str, int]] = {}
        self._hooks = self._run = None
        self._bytes: dict[int, dict[str, float]] = {}

    def attach(self, model_chunks: Iterable[torch.nn.Module]) -> None:
        """Watch the decoders of these model chunks (wrapped or not), and what follows them."""
        for chunk in model_chunks:
            while not hasattr(chunk, "decoder"):
                chunk = chunk.module
            self._decoders.append(chunk.decoder)
            index = len(self._decoders) - 1
            chunk.decoder.register_forward_pre_hook(lambda *_, i=index: self._start(i))
            if chunk.decoder.final_layernorm is not None:
                # Once a model, not a layer: the plan lists it apart.
                chunk.decoder.final_layernorm.register_forward_pre_hook(lambda *_: self._leave())
            chunk.decoder.register_forward_hook(lambda _, __, output, i=index: self._stop(i, output))
            self._attach_prediction(chunk)

    def _attach_prediction(self, chunk: torch.nn.Module) -> None:
        """Watch each layer of multi-token prediction by itself."""
        for layer in getattr(getattr(chunk, "mtp", None), "layers", ()):
            self._decoders.append(layer)
            index = len(self._decoders) - 1
            layer.register_forward_pre_hook(lambda *_, i=index: self._start(i))
            layer.register_forward_hook(lambda _, __, output, i=index: self._stop(i, output[0]))
            layer.eh_proj.register_forward_pre_hook(lambda *_: setattr(self, "_other", PROJECTED))
            layer.eh_proj.register_forward_hook(lambda *_: setattr(self, "_other", OTHER))
        if getattr(chunk, "mtp", None) is not None:  # they call the embedding, which belongs to no layer
            chunk.embedding.register_forward_pre_hook(lambda *_: self._leave())
            chunk.embedding.register_forward_hook(lambda *_: self._enter())

    def begin_iteration(self, iteration: int) -> None:
        """Tell the meter the training iteration; repeated calls with the same one do nothing."""
        if iteration == self._iteration:
            return
        first = self._iteration is None
        self._iteration = iteration
        if first or (self._interval and iteration % self._interval == 0):
            self._due = set(range(len(self._decoders)))

    def measure_again(self) -> None:
        """Measure this iteration as well: what is kept has changed. Call after :meth:`begin_iteration`."""
        self._due = set(range(len(self._decoders)))

    def _start(self, index: int) -> None:
        if index not in self._due or not torch.is_grad_enabled():
            return
        decoder = self._decoders[index]
        if not decoder.training:
            return
        self._storages, self._current = {}, index
        self._enter()

    def _enter(self) -> None:
        if self._current is None or self._hooks is not None:
            return
        decoder = self._decoders[self._current]
        constants = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}

        def note(name: str, x: Tensor) -> None:
            storage = x.untyped_storage()
            if storage.data_ptr() not in constants and storage.nbytes():
                self._storages.setdefault(storage.data_ptr(), (name, storage.nbytes()))

        def listener(_: int, name: str, kept: Iterable[Tensor]) -> None:
            for x in kept:
                note(name, x)

        def pack(x: Tensor) -> Tensor:
            dropout = self._other is OTHER and self._plan.config.hidden_dropout > 0
            note(DROPOUT if dropout else self._other, x)
            return x

        self._run = decoder.config.agoq_run
        self._run.listener = listener
        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self._hooks.__enter__()

    def _leave(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None
            self._run.listener = None

    def _stop(self, index: int, output: Tensor) -> None:
        if index not in self._due or not torch.is_grad_enabled():
            return
        self._leave()
        self._current = None
        self._due.discard(index)
        config = self._plan.config
        tokens = output.shape[0] * output.shape[1]
        if config.sequence_parallel:
            tokens *= config.tensor_model_parallel_size
        measured: dict[str, float] = {}
        for name, size in self._storages.values():
            measured[name] = measured.get(name, 0.0) + size / tokens
        self._storages = {}
        self._bytes[index] = measured

    @property
    def layers(self) -> list[int]:
        """Numbers (from 1) of the layers that this rank holds."""
        return [
            layer.layer_number
            for d in self._decoders
            for layer in (d.layers if hasattr(d, "layers") else [d.mtp_model_layer])
        ]

    def tensors(self) -> dict[str, float]:
        """For each tensor its measured bytes a token and layer, mean over this rank's layers."""
        result: dict[str, float] = {}
        for measured in self._bytes.values():
            for name, size in measured.items():
                result[name] = result.get(name, 0.0) + size / max(len(self.layers), 1)
        return result

    @property
    def saved_bytes_per_token_layer(self) -> float | None:
        """Measured sum over all tensors, or None before the first measurement is complete."""
        if not self._decoders or len(self._bytes) < len(self._decoders):
            return None
        return sum(self.tensors().values())

    @property
    def planned_bytes_per_token_layer(self) -> float:
        """What the plan says for this rank's layers."""
        return self._plan.bytes_per_token_layer(self.layers)

    def rows(self) -> list[dict]:
        """Planned beside measured, tensor by tensor (this rank's layers)."""
        planned, measured = self._plan.tensors(self.layers), self.tensors()
        return [
            {
                "name": name,
                "format": planned.get(name, ("not planned", 0.0))[0],
                "planned_bytes_per_token": planned.get(name, ("", 0.0))[1],
                "measured_bytes_per_token": measured.get(name, 0.0),
            }
            for name in dict.fromkeys((*planned, *measured))
        ]

    def __str__(self) -> str:
        lines = ["AGoQ: bytes kept a token and layer, planned and measured (this rank's layers)"]
        for row in self.rows():
            lines.append(
                f"    {row['name']:<50} {row['planned_bytes_per_token']:>10.1f}"
                f" {row['measured_bytes_per_token']:>10.1f}"
            )
        total = self.saved_bytes_per_token_layer or 0.0
        lines.append(f"    {'sum':<50} {self.planned_bytes_per_token_layer:>10.1f} {total:>10.1f}")
        return "\n".join(lines)

"""Quantization of saved activations: formats, bit packing, torch operators. Torch and Triton only.

Imported as `agoq_kernels` (pyproject maps the name): a top-level package called `kernels` would
shadow one on PyPI that transformers looks for.
"""

from agoq_kernels.formats import Format
from agoq_kernels.ops import dequantize, quantize

__all__ = ["Format", "dequantize", "quantize"]

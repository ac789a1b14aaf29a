"""Hugging Face's dense models, to and from: ``python -m agoq_megatron.convert.to_hf``, ``.from_hf``.

families.py is the table of the architectures that are carried.

Both work on files alone, in one process, without a GPU and without building a model: a layer's tensors are in
memory at a time (``to_hf``: a shard's, 5 GB), so that the size of the model does not matter.
"""

"""From a command line to Megatron's training loop: ours (``training.py``) and, by ``--spec``, its own
(``stock.py``)."""

"""From flags to Megatron's ``pretrain``: what its wheel leaves to the entry script.

Shapes: b micro-batch, s sequence length.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import checkpoint as _  # noqa: F401  (rebound in main)
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain

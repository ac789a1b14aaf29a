"""Every flag that AGoQ-Megatron adds to Megatron's, in one dataclass.

``ArgumentGroupFactory`` turns the fields into command-line flags; their docstrings become the help
texts. Nothing else in the project defines a flag. (The factory reads the types themselves, so this file
must not postpone their evaluation.)
"""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(kw_only=True)
class AGoQConfig:
    """AGoQ: saved activations near 4 bits, gradients and optimizer states in 8."""

    agoq_activations: str = "agoq"
    """What a layer keeps for its backward pass: 'off' (everything in the compute dtype, as Megatron
    does), 'agoq' (the default: about 4 bits, attention at 8), 'stage' (the same, with more than 4 bits on
    pipeline stages that hold fewer micro-batches), 'auto' (widths for each tensor and layer by a solver,
    the least harmful within a memory that is given, or else within what 'agoq' needs on its fullest
    stage, with recomputed layers exact for their moment), 'uniform4' (an ablation: 4 bits
    everywhere), or a YAML file with Megatron's quantization matchers."""

    agoq_activation_memory: str | None = None
    """Of --agoq-activations auto: what the layers of a GPU may keep, all micro-batches in flight together,
    such as 24GiB."""

    agoq_gpu_memory: str | None = None
    """Of --agoq-activations auto, instead: the memory of a GPU, such as 80GiB. What weights, gradients,
    optimizer, logits, transients, fragmentation and CUDA itself leave of it is for saved activations."""

    agoq_sensitivities: str | None = None
    """Of --agoq-activations auto: JSON file of python -m agoq_megatron.calibrate, with what each width of
    each tensor does to the gradients. Default: the nearest to this model of those in the package. Layers of
    another depth are taken by their relative depth."""

    agoq_rounding: Literal["policy", "nearest", "stochastic"] = "policy"
    """Rounding of the saved activations: as the policy says tensor by tensor, or one for all.
    Stochastic rounding is drawn from a counter (seed, iteration, tensor), so that a run repeats."""

    agoq_seed: int | None = None
    """Seed of stochastic rounding. Default: Megatron's --seed."""

    agoq_loss: Literal["in-place", "megatron"] = "in-place"
    """Cross entropy: 'in-place' works within the memory of the logits and writes their gradient over
    them; 'megatron' is Megatron's own, which holds them twice more in FP32. With
    --cross-entropy-loss-fusion it is Megatron's fused one in either case."""

    agoq_loss_chunks: int = 1
    """Compute logits and losses in that many parts of the sequence, so that one part of the logits exists
    at a time. Backward computes them again: one more product of the output layer."""

    agoq_fp8_scaling: Literal["row", "tensor"] = "row"
    """Of --fp8-format with --fp8-recipe tensorwise: a scale for each row of a product's factor (a token, or a
    feature), or one for all of it, as Megatron has it. By row less is too small for FP8, and the products are
    as fast."""

    agoq_fp8_weights: Literal["auto", "step", "use"] = "auto"
    """Of --fp8-format: cast weights to FP8 once a step and hold them, 2 bytes a number for both layouts, or
    at each use. 'auto': once a step where it has several micro-batches."""

    agoq_grad_bits: Literal[32, 16, 8] = 32
    """Bits in which gradients are accumulated and reduced. 32: Megatron's FP32. 16: the same as
    Megatron's --grad-reduce-in-bf16. 8: codes in blocks of 64 with scales, 1.09 bytes a parameter, which are
    sent and summed over ranks in FP32, and half a byte that carries what rounding loses
    (--agoq-grad-residual-bits); norms, biases and parameters of less than 4096 numbers stay in FP32."""

    agoq_grad_residual_bits: Literal[0, 4] | None = None
    """Of 8-bit gradients: carry what rounding loses from one micro-batch to the next in 4 more bits, half a
    byte a parameter. They stay on the rank. Without, the error grows with the number of micro-batches.
    Default: 4; 0 with --agoq-grad-code e4m3 or --agoq-grad-scale least-squares, which have none."""

    agoq_grad_rounding: Literal["nearest", "stochastic"] | None = None
    """Of 8-bit gradients: rounding of each micro-batch's sum, of the residual where there is one; what is
    sent then is the nearest code. Nearest loses what is small beside the sum. Stochastic is drawn from a
    counter (seed, iteration, parameter), so that a run repeats, and mirrored in every second micro-batch.
    Default: stochastic with a residual, else nearest."""

    agoq_grad_scale: Literal["absmax", "least-squares"] = "absmax"
    """Of 8-bit gradients: a block's scale, from its largest number, or from there by least squares."""

    agoq_grad_code: Literal["int8", "e4m3"] = "int8"
    """Of 8-bit gradients: their code. 'e4m3' (FP8) is an ablation, four times less precise."""

    agoq_grad_reduce: Literal["auto", "flat", "two-hop"] = "auto"
    """Of 8-bit gradients: reduce over all data-parallel ranks at once ('flat'), or within each node first
    and then between nodes ('two-hop'), which sends that much less between nodes as a node has
    data-parallel ranks. 'auto' takes two hops where several nodes have several of them each."""

    agoq_grad_node_size: int | None = None
    """Of 8-bit gradients: ranks of a node, for the two hops. Default: as many as the launcher started."""

    agoq_grad_probe_interval: int = 0
    """Of 8-bit gradients: every that many iterations accumulate and reduce a sample in FP32 as well, 64
    blocks of 64 numbers spread through each parameter, and log the relative errors, and the share that
    arrives of all micro-batches but the first (less than 1 where what is small beside the sum gets lost). It
    takes 32 KiB a parameter in these iterations. 0: never."""

    agoq_context_grad_bits: Literal[16, 8] = 16
    """Of context parallelism block by block (--cp-comm-type p2p, all_gather, a2a+p2p): bits in which
    gradients of keys and values go to the ranks that hold these. 16: in the compute dtype. 8: as codes, each
    number rounded once whatever the number of ranks, summed in FP32; with keys and values, which travel as
    they are kept, a little over half of the bytes of 16 bits."""

    agoq_optimizer_bits: Literal[32, 8] = 32
    """Bits of each of Adam's two moments. 8: one byte a number in blocks of 64, 2.06 bytes a parameter for
    both; those of embeddings, norms, biases and parameters of less than 4096 numbers stay in FP32. Needs
    --use-distributed-optimizer (on one rank too) and --bf16. Checkpoints hold FP32 in either case."""

    agoq_master_weights: Literal["fp32", "split"] | None = None
    """'split' keeps each FP32 master weight, exactly, as the BF16 weight and a 16-bit remainder: 2 bytes a
    parameter instead of 4. Default: 'split' with --agoq-optimizer-bits 8, else 'fp32'."""

    agoq_optimizer_rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of 8-bit moments. From one step to the next they change by less than their format can say: to the
    nearest, an ablation, the second would not change and the first never decay to zero."""

    agoq_checkpoint_checksums: bool = True
    """Write a CRC-32 of every file of a checkpoint beside it, and compare before it is loaded: a damaged
    checkpoint is then left aside, with a warning, for the newest whole one. Without, files are loaded as they
    are."""

    agoq_dry_run: bool = False
    """Print the plan of what is saved, tensor by tensor, and stop before anything is allocated."""

    agoq_measure_interval: int = 0
    """Measure the bytes really kept between forward and backward every that many iterations, for
    TensorBoard and W&B. 0 measures once, in the first iteration after a start."""

    agoq_check_gradients: bool = True
    """Look at every layer once within the first ten iterations after a start, then at one layer now and then
    (at most .5% of the time): its functions run again with nothing rounded, on one sequence of the training
    data, and where rounded activations put gradients off by more than --agoq-check-bound the run says so,
    with layer, tensor and remedy. It changes nothing else."""

    agoq_check_bound: float = 0.25
    """Relative L2 error of a function's input or weight gradient that the check warns of."""

    agoq_probe_interval: int = 0
    """Every that many iterations, of a new run from the first on, measure in a few layers the relative L2
    error that each saved activation puts into its function's gradients: the series agoq/gradient-error. 0:
    never."""

    agoq_probe_layers: int = 4
    """Layers that are probed at a time, spaced evenly through the model. The next probe takes their
    neighbours, so that all are seen in turn."""

    agoq_max_error: float | None = None
    """Where the gradients of a probed layer's function are off by more than this, give the tensor that puts
    the most into them the next wider format (4, 5, 6, 8, 12 bits, then 16: not quantized) in that layer, from
    the next iteration on; compute attention's output again first, if it is kept. Checkpoints hold the raised
    widths; a run that resumes with --agoq-probe-interval takes them over."""

    agoq_report: str | None = None
    """Write a JSON file at the end of the run: losses, tokens, step time, planned and measured
    bytes of every saved tensor, peak memory."""

    @classmethod
    def from_args(cls, args) -> "AGoQConfig":
        """Pick this class's fields out of Megatron's parsed arguments (an argparse Namespace)."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

"""How a software does what a layout does not say: as it stands, our own engine's way."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Practice:
    """Numbers of 0 mean: as our engine has it for the run's formats.

    Memory. ``attention`` is fused, or explicit: scores in 16 bits are kept, with a byte for the mask of dropout, and so
    are all masks; as ``fused-masks`` these are, but no scores.
    ``param_bytes``, ``grad_bytes`` and ``optimizer_bytes`` are of an element as a rank keeps it (master weights belong
    to the optimizer, or to the parameters where there is no second copy). ``logit_bytes`` is what one logit takes at
    the peak of the loss. What ``selective`` recomputation makes again is the core of attention, or all but every other
    product of matrices ("matmuls": torchtitan's). ``unit_grad_bytes`` are of a gradient until it is summed, where ZeRO
    keeps only a part of the sums; with ``whole_units`` a pipeline keeps whole parameters and gradients through a step
    all the same. ``parcels`` are kept of a microbatch beyond its activations; ``fp8_inputs``: of what FP8 multiplies
    only codes are kept. ``buffer_gb`` are buckets of a fixed size. ``waste`` is the share of activations and buffers
    that the allocator holds beyond them; ``context_gb`` what the driver, libraries and NCCL take for themselves.

    Time. ``launches`` are the kernels of a block's forward that the host launches one by one (graphs: few), those of
    experts and their routing not counted, and ``host_share`` how much of a launch's time a run needs (slow hosts, much
    Python: above 1). ``flash`` is the speed of fused attention to the machine's best, ``passes`` the
    bytes of a score that explicit attention moves in a forward.
    ``traffic`` is what memory-bound operations move, to fused ones, and ``loss_bytes`` what a logit's loss does.
    ``overlap_tp``, ``overlap_ep`` and ``overlap_dp`` are the shares of these collectives that go beside computing where
    there is enough of it. With ``p2p_split`` each tp rank sends but its part of a message of the pipeline.
    ``reduce_bytes`` are of a gradient that
    travels. ``imbalance`` is the busiest expert's number of tokens to the mean. ``step_s`` is what each step takes the
    host besides. ``pace`` is one overall factor of speed, for software of which nothing more is known.
    """

    attention: str = "fused"
    param_bytes: float = 0.0
    grad_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    shards_over_cp: bool = False
    logit_bytes: float = 0.0
    selective: str = "core"
    unit_grad_bytes: float = 0.0
    whole_units: bool = False
    parcels: int = 0
    fp8_inputs: bool = False
    buffer_gb: float = 0.0
    waste: float = 0.05
    context_gb: float = 2.0
    launches: float = 30.0
    host_share: float = 1.0
    flash: float = 1.0
    passes: float = 14.0
    traffic: float = 1.0
    overlap_tp: float = 0.0
    overlap_ep: float = 0.0
    overlap_dp: float = 0.9
    p2p_split: bool = False
    reduce_bytes: float = 0.0
    loss_bytes: float = 20.0
    imbalance: float = 1.05
    step_s: float = 0.005
    pace: float = 1.0


OURS = Practice()

"""Where weights are updated, which depends on where the optimizer keeps its state."""

from megacore.config.schema import OptimConfig, RunConfig


def on_host(optim: OptimConfig, device: str) -> bool:
    """Whether what is updated are copies of the weights in host memory, for a run on ``device`` (cpu or cuda).

    A run on the CPU with its state in files updates the weights where they are: they are in host memory.
    """
    return optim.offload == "cpu" or (optim.offload == "nvme" and device == "cuda")


def split_problem(config: RunConfig, device: str) -> str:
    """Why a run on ``device`` (auto: not known yet) cannot keep its weights in two halves, or ''."""
    o, p = config.optim, config.precision
    if p.master != "split" or not on_host(o, device):
        return ""
    return (
        f"precision.master=split lets weights be the upper halves of what is updated, but optim.offload={o.offload} "
        "updates copies in host memory, whole; use precision.master=fp32, which takes no more of the device"
    )

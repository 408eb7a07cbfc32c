"""In what format an optimizer keeps its moments."""

from dataclasses import dataclass

from megacore.config.schema import OptimConfig


@dataclass(frozen=True)
class StateFormat:
    """``kind`` is ``optim.state_dtype``; ``stochastic`` rounds to bf16 by chance, drawn from ``seed``, and so does
    ``stochastic_weights`` with weights that are bf16 themselves."""

    kind: str = "auto"
    stochastic: bool = False
    seed: int = 0
    stochastic_weights: bool = False

    @classmethod
    def of(cls, optim: OptimConfig, seed: int, master: str = "fp32") -> "StateFormat":
        """The format that a run asks for; ``seed`` is the run's, ``master`` its ``precision.master``."""
        return cls(optim.state_dtype, optim.state_rounding == "stochastic", seed, master == "none")

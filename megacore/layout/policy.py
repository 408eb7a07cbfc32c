"""ZeRO as data: which of a rank's buffers are cut over the ranks that hold copies of the same parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardingPolicy:
    """What the ``dp_shard`` group cuts among its ranks (Rajbhandari et al. 2020, section 5): stage 1 the optimizer's
    state, stage 2 also gradients, stage 3 also parameters."""

    optimizer: bool = False
    grads: bool = False
    params: bool = False

    @classmethod
    def of(cls, zero: int) -> "ShardingPolicy":
        """The policy of a ZeRO stage, 0 to 3."""
        return cls(zero >= 1, zero >= 2, zero >= 3)

    @property
    def by_unit(self) -> bool:
        """Whether buckets are units (an embedding, a block, a head) that are reduced or gathered one at a time."""
        return self.grads or self.params

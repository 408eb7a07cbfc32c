"""Memory of a run, for each rank of its pipeline: of the ranks that share a pipeline rank, the one that holds most.

State is the engine's own arithmetic (``spec/memory.py``), an activation's bytes are ``spec/activations.py``'s, and how
many microbatches are alive is the schedule's (``cost/live.py``). On top of what waits for its backward comes what a
block needs while it goes through it, and what travels. All of it is looked up by kind of block, so that pricing one
more layout takes little.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megacore.config.schema import RunConfig
from megacore.cost.live import Live, live_of_kind
from megacore.cost.practice import OURS, Practice
from megacore.cost.states import Cut, Unit, UnitSizes, kinds_of, layers_of, sizes_of
from megacore.cost.waiting import Way, waiting
from megacore.layout.layout import Layout
from megacore.layout.policy import ShardingPolicy
from megacore.spec.activations import (
    STATISTIC_BYTES,
)
from megacore.spec.fp8 import fp8_history_bytes
from megacore.spec.memory import ITEM_BYTES

CHUNK_LOGITS = 1 << 20
"""Logits that the loss makes at once: ``parallel.cross_entropy.CHUNK``."""
HEAD_BYTES = 40
"""Of a token: what the loss keeps of it besides logits."""
UNITS_OF_GRADS = 3
"""Units whose whole gradients are there at once under ZeRO-2 and 3: one in backward, two that are being summed
(``sharding.storage.UNDER_WAY``)."""
UNITS_OF_PARAMS = 2
"""Units whose whole parameters are there at once under ZeRO-3: the one at work and the next."""
MESSAGES = 4
"""Parcels on their way: two that leave (``pipeline.mailbox.WINDOW``), two that come."""
INPUT_BYTES = 16
"""A token and its label."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device. ``host`` is in host memory and no part of ``total``; ``context`` is what is taken besides
    tensors: by the driver, libraries and NCCL."""

    params: int
    grads: int
    optimizer: int
    activations: int
    buffers: int
    fragmentation: int
    context: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """All tensors, as torch.cuda.max_memory_allocated counts them."""
        return self.params + self.grads + self.optimizer + self.activations + self.buffers

    @property
    def reserved(self) -> int:
        """What torch's allocator takes for them."""
        return self.allocated + self.fragmentation

    @property
    def total(self) -> int:
        """All that the device must have."""
        return self.reserved + self.context


def memory_by_rank(config: RunConfig, layout: Layout, practice: Practice = OURS) -> tuple[RankMemory, ...]:
    """What each pipeline rank of a resolved run needs at its worst moment. Raises ValueError where the layers cannot be
    cut into the layout's stages."""
    t = config.train
    microbatches = max(1, t.global_batch_size // (t.micro_batch_size * layout.dp))
    lives = live_of_kind(config.parallel.schedule, layout.pp, microbatches, layout.chunks)
    prices = _Prices(config, layout, practice)
    return tuple(prices.of_rank(live, microbatches) for live in lives)


class _Prices:
    """What the units of one layout cost: looked up once, then summed for each pipeline rank."""

    def __init__(self, config: RunConfig, layout: Layout, practice: Practice) -> None:
        self.config, self.layout, self.practice = config, layout, practice
        model, t, p = config.model, config.train, config.parallel
        self.item = ITEM_BYTES[config.precision.dtype]
        self.tokens = t.micro_batch_size * t.seq_len // layout.cp
        outside = self.tokens // layout.tp if p.sequence_parallel else self.tokens
        self.parcel = outside * model.hidden_size * self.item
        """What a stage hands to the next."""
        kinds = kinds_of(model, config.optim, config.precision)
        self.kinds, self.counts = _counts_of(kinds, layers_of(model, t.seq_len, layout.num_stages, p.stage_layers))
        shards = layout.dp_shard * (layout.cp if practice.shards_over_cp else 1)
        self.cut = Cut(layout.tp, layout.ep, layout.etp, layout.zero, shards, max(1, layout.edp // layout.dp_replicate))
        way = Way(
            seq_len=t.seq_len,
            micro_batch_size=t.micro_batch_size,
            tp=layout.tp,
            sequence=p.sequence_parallel,
            recompute=p.recompute,
            item=self.item,
            regather=p.regather_inputs,
            by_unit=layout.zero >= 2,
            cp=layout.cp,
            etp=layout.etp,
            attention=practice.attention,
            selective=practice.selective,
            codes_only=practice.fp8_inputs and config.precision.fp8 != "off",
        )
        blocks = [waiting(model, kind, way) for kind in self.kinds]
        columns = [np.array(column, dtype=np.int64) for column in zip(*blocks, strict=True)]
        self.kept, self.late, self.host = (self.counts @ column for column in columns[:3])
        self.kept = self.kept + practice.parcels * self.parcel
        self.put_off, self.working = columns[1], columns[3]

    def of_rank(self, live: Live, microbatches: int) -> RankMemory:
        """The sum over the stages of a pipeline rank."""
        stages = list(live.stages)
        blocks = self.counts[stages].sum(axis=0).tolist()
        units: list[tuple[UnitSizes, int]] = [
            (self.sizes(("block", kind)), n) for kind, n in zip(self.kinds, blocks) if n
        ]
        last = self.layout.num_stages - 1
        units += [(self.sizes(unit), 1) for unit in self.ends(stages)]
        activations = self.activations(live, last, blocks)
        buffers = self.buffers(live, units, microbatches, last)
        host = sum(sizes.host * n for sizes, n in units) + live.peak(
            self.host[stages], np.zeros_like(self.host[stages])
        )
        return RankMemory(
            params=sum(sizes.params * n for sizes, n in units),
            grads=sum(sizes.grads * n for sizes, n in units),
            optimizer=sum(sizes.optimizer * n for sizes, n in units),
            activations=activations,
            buffers=buffers,
            fragmentation=int(self.practice.waste * (activations + buffers)),
            context=int(self.practice.context_gb * 1e9),
            host=host,
        )

    def sizes(self, unit: Unit) -> UnitSizes:
        config = self.config
        return sizes_of(unit, config.model, config.optim, config.precision, self.practice, self.cut)

    def ends(self, stages: list[int]) -> list[Unit]:
        """What a rank holds besides blocks."""
        found: list[Unit] = [("embedding", 0)] if 0 in stages else []
        if self.layout.num_stages - 1 in stages:
            tied = self.config.model.tie_embeddings and 0 not in stages
            found += [("tied", 0)] * tied + [("head", 0)]
        return found

    def activations(self, live: Live, last: int, blocks: list[int]) -> int:
        """At the worst moment: in a block's backward, or in that of the head, whose inputs are still there then."""
        stages = list(live.stages)
        kept, late = self.kept[stages], self.late[stages]
        if live.late.any() and 0 in stages:  # gradients for the embedding's rows
            late = late + (live.stages.index(0) == np.arange(len(stages))) * self.tokens * self.hidden * STATISTIC_BYTES
        there = [number for number, n in enumerate(blocks) if n]
        working = max((int(self.working[number]) for number in there), default=0)
        put_off = min((int(self.put_off[number]) for number in there), default=0)
        most = live.peak(kept, late, working, working - put_off)
        if last not in stages:
            return most
        inputs = self.parcel + self.tokens * (self.hidden * self.item + HEAD_BYTES)
        at_head = kept + (live.stages.index(last) == np.arange(len(stages))) * inputs
        return max(most, live.peak(at_head, late) + 2 * self.tokens * self.hidden * self.item + self.chunks)

    @property
    def chunks(self) -> int:
        """The logits that the loss works at, and those before them until these are there."""
        if self.practice.logit_bytes:
            return 0
        wide = max(self.item, STATISTIC_BYTES)
        made = self.item if self.item < wide else 0
        return wide * min(2 * CHUNK_LOGITS, self.logits) + made * min(CHUNK_LOGITS, self.logits)

    @property
    def logits(self) -> int:
        """How many a microbatch has on one rank."""
        return self.tokens * -(-self.config.model.vocab_size // self.layout.tp)

    @property
    def hidden(self) -> int:
        return self.config.model.hidden_size

    def buffers(self, live: Live, units: list[tuple[UnitSizes, int]], microbatches: int, last: int) -> int:
        """What travels, is gathered, or is kept for use again."""
        practice, layout, policy = self.practice, self.layout, ShardingPolicy.of(self.layout.zero)
        total = microbatches * self.tokens * INPUT_BYTES + (MESSAGES * self.parcel if layout.pp > 1 else 0)
        total += int(practice.buffer_gb * 1e9)
        of_grad = practice.unit_grad_bytes or practice.grad_bytes or max(self.item, STATISTIC_BYTES)
        for sizes, number in units:
            if practice.whole_units and layout.pp > 1 and policy.params:
                total += int((of_grad + self.item) * sizes.numel) * number
                continue
            if policy.grads:
                total += int(of_grad * sizes.numel) * min(UNITS_OF_GRADS, number)
                total += int(of_grad * sizes.numel / self.cut.shards) * min(UNITS_OF_GRADS - 1, number)  # their sums
            if policy.params:
                total += self.item * sizes.numel * min(UNITS_OF_PARAMS, number)
        if last in live.stages:
            # their memory is never given back; after GPipe's forwards all have theirs
            at_once = int(live.kept[:, live.stages.index(last)].max())
            total += at_once * int(self.logits * (practice.logit_bytes or self.item))
        codes = [sizes.fp8_bytes * (1 if policy.params else number) for sizes, number in units]
        total += max(codes, default=0) if policy.params else sum(codes)
        return total + fp8_history_bytes(4 * self.config.model.num_layers, self.config.precision)


@cache
def _counts_of(kinds: tuple[int, ...], stages: tuple[range, ...]) -> tuple[tuple[int, ...], Counts]:
    """The kinds of layers that there are, and how many of each a stage has [stages, kinds]."""
    present = sorted(set(kinds))
    counts = np.zeros((len(stages), len(present)), dtype=np.int64)
    for stage, layers in enumerate(stages):
        for layer in layers:
            counts[stage, present.index(kinds[layer])] += 1
    return tuple(present), counts

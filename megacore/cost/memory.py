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
from megacore.cost.live import LiveTable, table_of_kind
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
    table = table_of_kind(config.parallel.schedule, layout.pp, microbatches, layout.chunks)
    return _Prices(config, layout, practice).of_ranks(table, microbatches)


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

    def of_ranks(self, table: LiveTable, microbatches: int) -> tuple[RankMemory, ...]:
        """The sums over the stages of every pipeline rank."""
        blocks = self.counts[table.stages].sum(axis=1)  # [ranks, kinds]
        activations = self.activations(table, blocks)
        sizes = np.array([self.sizes(("block", kind)) for kind in self.kinds], dtype=np.int64)
        state, buffers = blocks @ sizes, self.base_buffers(microbatches) + self.unit_buffers(blocks, sizes)
        for unit, rank in self.ends(table):
            one = np.array([self.sizes(unit)], dtype=np.int64)
            state[rank] += one[0]
            buffers[rank] += self.unit_buffers(np.ones((1, 1), dtype=np.int64), one)[0]
        # logits' memory is never given back; after GPipe's forwards all microbatches have theirs
        buffers[table.last[0]] += table.most_at_last * int(self.logits * (self.practice.logit_bytes or self.item))
        offloaded = np.zeros_like(activations)
        if self.host.any():
            offloaded = table.peaks(self.host[table.stages], 0 * self.late[table.stages], offloaded, offloaded)
        waste, context = self.practice.waste, int(self.practice.context_gb * 1e9)
        found = []
        for (_, _, params, grads, optimizer, host), kept, travels, sent in zip(
            state.tolist(), activations.tolist(), buffers.tolist(), offloaded.tolist(), strict=True
        ):
            lost = int(waste * (kept + travels))
            found.append(RankMemory(params, grads, optimizer, kept, travels, lost, context, host + sent))
        return tuple(found)

    def sizes(self, unit: Unit) -> UnitSizes:
        config = self.config
        return sizes_of(unit, config.model, config.optim, config.precision, self.practice, self.cut)

    def ends(self, table: LiveTable) -> list[tuple[Unit, int]]:
        """What ranks hold besides blocks."""
        first, last = table.first[0], table.last[0]
        copy = self.config.model.tie_embeddings and last != first
        return [(("embedding", 0), first), (("head", 0), last), *[(("tied", 0), last)] * copy]

    def activations(self, table: LiveTable, blocks: Counts) -> Counts:
        """[ranks] At the worst moment: in a block's backward, or in that of the head, whose inputs are still there."""
        kept, late = self.kept[table.stages], self.late[table.stages]
        if table.puts_off:  # gradients for the embedding's rows
            late[table.first] += self.tokens * self.hidden * STATISTIC_BYTES
        there = blocks > 0
        working = np.where(there, self.working, 0).max(axis=1)
        put_off = np.where(there, self.put_off, np.iinfo(np.int64).max).min(axis=1) * there.any(axis=1)
        most = table.peaks(kept, late, working, working - put_off)
        kept[table.last] += self.parcel + self.tokens * (self.hidden * self.item + HEAD_BYTES)
        nothing, last = np.zeros_like(most), table.last[0]
        at_head = table.peaks(kept, late, nothing, nothing)[last] + 2 * self.tokens * self.hidden * self.item
        most[last] = max(most[last], at_head + self.chunks)
        return most

    @property
    def hidden(self) -> int:
        return self.config.model.hidden_size

    @property
    def logits(self) -> int:
        """How many a microbatch has on one rank."""
        return self.tokens * -(-self.config.model.vocab_size // self.layout.tp)

    def base_buffers(self, microbatches: int) -> int:
        """What any rank has: inputs, messages, what FP8 remembers, buckets of a fixed size."""
        messages = MESSAGES * self.parcel if self.layout.pp > 1 else 0
        remembered = fp8_history_bytes(4 * self.config.model.num_layers, self.config.precision)
        fixed = int(self.practice.buffer_gb * 1e9)
        return microbatches * self.tokens * INPUT_BYTES + messages + remembered + fixed

    def unit_buffers(self, numbers: Counts, sizes: Counts) -> Counts:
        """[ranks] What is gathered, summed or kept in FP8 of so many units [ranks, kinds] of these sizes (rows as
        ``UnitSizes``)."""
        practice, policy = self.practice, ShardingPolicy.of(self.layout.zero)
        numel, codes = sizes[:, 0], sizes[:, 1]
        of_grad = practice.unit_grad_bytes or practice.grad_bytes or max(self.item, STATISTIC_BYTES)
        if policy.params and practice.whole_units and self.layout.pp > 1:
            total = numbers @ (numel * (of_grad + self.item))
        else:
            total = np.zeros(len(numbers))
            if policy.grads:
                total += np.minimum(numbers, UNITS_OF_GRADS) @ numel * of_grad
                total += np.minimum(numbers, UNITS_OF_GRADS - 1) @ numel * of_grad / self.cut.shards  # their sums
            if policy.params:
                total += np.minimum(numbers, UNITS_OF_PARAMS) @ numel * self.item
        in_fp8 = ((numbers > 0) * codes).max(axis=1) if policy.params else numbers @ codes
        return (total + in_fp8).astype(np.int64)

    @property
    def chunks(self) -> int:
        """The logits that the loss works at, and those before them until these are there."""
        if self.practice.logit_bytes:
            return 0
        wide = max(self.item, STATISTIC_BYTES)
        made = self.item if self.item < wide else 0
        return wide * min(2 * CHUNK_LOGITS, self.logits) + made * min(CHUNK_LOGITS, self.logits)


@cache
def _counts_of(kinds: tuple[int, ...], stages: tuple[range, ...]) -> tuple[tuple[int, ...], Counts]:
    """The kinds of layers that there are, and how many of each a stage has [stages, kinds]."""
    present = sorted(set(kinds))
    counts = np.zeros((len(stages), len(present)), dtype=np.int64)
    for stage, layers in enumerate(stages):
        for layer in layers:
            counts[stage, present.index(kinds[layer])] += 1
    return tuple(present), counts

"""Which part of a flat buffer is whose, when ranks share it (ZeRO): piece k of every bucket belongs to shard k."""

from dataclasses import dataclass

from megacore.layout.buffer import BufferLayout


@dataclass(frozen=True)
class Run:
    """Elements ``[start, stop)`` of a parameter's local tensor, flattened; in the shard they lie from ``offset`` on."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


def piece_of(bucket: tuple[int, int], shard: int, num_shards: int) -> tuple[int, int]:
    """(start, end) in the buffer of a shard's piece of a bucket, which ``num_shards`` divides."""
    start, end = bucket
    size, rest = divmod(end - start, num_shards)
    assert not rest, (bucket, num_shards)
    return start + shard * size, start + (shard + 1) * size


def runs_of(layout: BufferLayout, shard: int, num_shards: int) -> tuple[Run, ...]:
    """What of each parameter lies in a shard, in the order of the buffer; empty runs are left out.

    A shard's pieces lie one behind the other, so a piece that starts at s of a bucket from b on is at
    b / num_shards + (s - piece start).
    """
    runs = []
    slots = iter(layout.slots)
    slot = next(slots, None)
    for bucket in layout.buckets:
        start, end = piece_of(bucket, shard, num_shards)
        offset = bucket[0] // num_shards
        while slot is not None and slot.offset < bucket[1]:
            first, last = max(slot.offset, start), min(slot.offset + slot.numel, end)
            if first < last:
                runs.append(Run(slot.name, first - slot.offset, last - slot.offset, offset + first - start))
            slot = next(slots, None)
    return tuple(runs)

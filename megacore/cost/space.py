"""Which layouts there are: the values that each key may take, and the house's own rules that say which go together.

A *mesh* is what deals out the model and the batch: tp, pp, cp, ep, etp and the microbatch. A *way* is how a mesh works:
its ZeRO stage and sharding group, its schedule and chunks, what it recomputes. Legality is asked of
``config/rules.py``: nothing here repeats it. What is left out is what cannot win, for the reasons given beside
it, unless ``whole``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from megacore.config.pipeline import V_SHAPED
from megacore.config.rules import RULES
from megacore.config.schema import RunConfig

OF_A_LAYOUT = ("parallel", "train.micro_batch_size", "train.global_batch_size")
BATCH_TOKENS = 4 << 20
"""Tokens of a step where neither run nor user says: what models of up to 70B were trained with."""
TOKENS_PER_GPU = 1024
"""But at least so many for each device: Llama 3 405B took 16M on 16,384 (Grattafiori et al. 2024, table 4)."""
BATCH_SLACK = 0.25
"""How far a batch that the planner chooses may be from the wanted one, so that it can be dealt out."""
MICROS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
"""Samples that a rank may compute at once; thrice a power of two only where replicas take a multiple of three."""
TOKENS_AT_ONCE = 1 << 16
"""Larger microbatches fill no device better."""
SHORTEST_SLICE = 2048
"""Tokens of a sample that a context-parallel rank has at least: the fewer, the worse its products and its messages."""
LARGEST_CHUNKS = 8
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
"""Without gpipe, which has 1F1B's bubble and more activations."""
RECOMPUTE = ("none", "selective", "full")
"""From the fastest to the smallest."""


def _about_layouts(reads: tuple[str, ...]) -> bool:
    return any(
        f"{key}.".startswith(f"{ours}.") or f"{ours}.".startswith(f"{key}.") for key in reads for ours in OF_A_LAYOUT
    )


LAYOUT_RULES = tuple(rule for rule, reads in RULES if _about_layouts(reads))
"""The rules that may say something else of another layout."""


class Mesh(NamedTuple):
    """Sizes of the axes, samples of a microbatch, and samples of the global batch."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    micro: int
    batch: int


class Way(NamedTuple):
    """How a mesh works."""

    zero: int
    dp_shard: int
    schedule: str
    chunks: int
    recompute: str
    sequence: bool


@dataclass(frozen=True)
class Space:
    """The layouts of ``world`` devices for a resolved run. ``fixed`` are keys that must keep the run's value; with
    ``batch`` 0 the global batch is the planner's to choose, near ``wanted`` samples."""

    config: RunConfig
    world: int
    gpus_per_node: int
    fixed: frozenset[str] = frozenset()
    batch: int = 0
    whole: bool = False
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Of some keys of [parallel] the only values that are wanted: what narrows a search for one kind of layout."""

    @cached_property
    def wanted(self) -> int:
        """Samples of a step."""
        return self.batch or usual_batch(self.config.train.seq_len, self.world)

    def meshes(self) -> Iterator[Mesh]:
        """All that deal out the devices; whether one is legal is for ``problems`` to say."""
        m, t, nodes = self.config.model, self.config.train, self.gpus_per_node
        tps = self.of("tp", [n for n in divisors(self.world) if n <= min(m.num_heads, 2 * nodes)])
        for tp in tps:
            rest = self.world // tp
            for pp in self.of("pp", [n for n in divisors(rest) if n <= m.num_layers + 2]):
                slices = [n for n in divisors(rest // pp) if n & (n - 1) == 0 and n * SHORTEST_SLICE <= t.seq_len]
                for cp in self.of("cp", slices):
                    if self.world % (tp * pp * cp):
                        continue
                    dp = self.world // (tp * pp * cp)
                    if "parallel.dp" in self.fixed and dp != self.config.parallel.dp:
                        continue
                    for ep, etp in self.expert_axes(tp, cp, dp):
                        yield from self.batches(tp, pp, cp, dp, ep, etp)

    def expert_axes(self, tp: int, cp: int, dp: int) -> Iterator[tuple[int, int]]:
        """(ep, etp); (1, tp) without experts."""
        num = self.config.model.num_experts
        if not num:
            yield 1, tp
            return
        for ep in self.of("ep", [n for n in divisors(tp * cp * dp) if num % n == 0]):
            for etp in self.of("etp", [tp] if ep == 1 or tp == 1 else [1, tp]):
                if tp * cp * dp % (ep * etp) == 0:
                    yield ep, etp

    def batches(self, tp: int, pp: int, cp: int, dp: int, ep: int, etp: int) -> Iterator[Mesh]:
        """With every microbatch that deals out the global batch, or one near the wanted."""
        t = self.config.train
        most = max(1, TOKENS_AT_ONCE * cp // t.seq_len)
        micros = [n for n in MICROS if self.whole or (n <= most and (not n % 3) <= (not self.wanted % (3 * dp)))]
        for micro in self.of("micro_batch_size", micros, t):
            if batch := self.batch_of(micro * dp):
                yield Mesh(tp, pp, cp, dp, ep, etp, micro, batch)

    def batch_of(self, unit: int) -> int:
        """The global batch of a mesh whose replicas take ``unit`` samples at once; 0: none that would do."""
        if self.batch:
            return self.batch if self.batch % unit == 0 else 0
        near = max(unit, round(self.wanted / unit) * unit)
        return near if abs(near - self.wanted) <= BATCH_SLACK * self.wanted else 0

    def ways(self, mesh: Mesh) -> Iterator[Way]:
        """Of a mesh, with the fastest recomputation: ``smaller`` has the others."""
        for first in self.firsts(mesh):
            yield from self.siblings(mesh, first)

    def firsts(self, mesh: Mesh) -> Iterator[Way]:
        """A way for each sharding of state and activations, with the first of the schedules."""
        recompute = self.of("recompute", list(RECOMPUTE))
        for schedule, chunks in self.schedules(mesh)[:1]:
            for zero, dp_shard in self.shardings(mesh):
                for sequence in self.sequences(mesh):
                    yield Way(zero, dp_shard, schedule, chunks, recompute[0], sequence)

    def siblings(self, mesh: Mesh, first: Way) -> Iterator[Way]:
        """The same with all schedules."""
        for schedule, chunks in self.schedules(mesh):
            yield first._replace(schedule=schedule, chunks=chunks)

    def smaller(self, way: Way) -> Way | None:
        """The same with less to keep and more to compute."""
        recompute = self.of("recompute", list(RECOMPUTE))
        place = recompute.index(way.recompute) + 1
        return way._replace(recompute=recompute[place]) if place < len(recompute) else None

    def smallest(self, mesh: Mesh) -> Iterator[Way]:
        """The ways that keep least: what fits in none of them does not fit at all. (To recompute whole blocks saves
        nothing where a stage has but one; to share parameters costs room for whole ones.)"""
        schedule = self.of("schedule", ["1f1b"])[0]
        chunks = next(iter(self.chunks_of(schedule, mesh)), 1)
        for recompute in reversed(self.of("recompute", list(RECOMPUTE))):
            for zero, dp_shard in reversed(self.shardings(mesh)):
                if dp_shard == mesh.dp or "parallel.dp_shard" in self.fixed or "dp_shard" in self.allowed:
                    yield Way(zero, dp_shard, schedule, chunks, recompute, self.sequences(mesh)[-1])

    def shardings(self, mesh: Mesh) -> list[tuple[int, int]]:
        """(ZeRO stage, ranks that share state). A copy of the optimizer's state on each rank saves no time."""
        stages = [0, 1, 2, 3] if self.whole else [1, 2, 3]
        found = []
        for zero in self.of("zero", stages if mesh.dp > 1 or self.whole else [0]):
            shards = [mesh.dp]
            if zero == 3 or (zero and self.whole):  # hybrid: within a node, and within eight of them
                of_node = self.gpus_per_node // (mesh.tp * mesh.cp)
                shards += [n for n in (of_node, 8 * of_node) if 1 < n < mesh.dp and mesh.dp % n == 0]
            found += [(zero, shard) for shard in self.of("dp_shard", shards)]
        return found

    def schedules(self, mesh: Mesh) -> list[tuple[str, int]]:
        """(kind, chunks)."""
        kinds = self.of("schedule", list(SCHEDULES) if mesh.pp > 1 else ["1f1b"])
        return [(kind, chunks) for kind in kinds for chunks in self.chunks_of(kind, mesh)]

    def chunks_of(self, kind: str, mesh: Mesh) -> list[int]:
        """Stages on each rank. Interleaving more finely than the layers divide, with or without embedding and head, is
        worth it by powers of two only."""
        if kind in V_SHAPED:
            return [2] if 2 * mesh.pp <= self.config.model.num_layers + 2 else []
        if kind != "interleaved":
            return [1]
        layers = self.config.model.num_layers
        most = min((layers + 2) // mesh.pp, LARGEST_CHUNKS)
        units = layers, layers + 2
        even = [n for n in range(2, most + 1) if not n & (n - 1) or any(not of % (n * mesh.pp) for of in units)]
        return self.of("chunks", list(range(2, most + 1)) if self.whole else even)

    def sequences(self, mesh: Mesh) -> list[bool]:
        """Whether activations are split outside the matrices: the same traffic and less memory, so always if legal."""
        legal = mesh.tp > 1 and self.config.train.seq_len % mesh.tp == 0
        return self.of("sequence_parallel", ([False, True] if self.whole else [True]) if legal else [False])

    def of(self, name: str, values: list[Any], section: Any = None) -> list[Any]:
        """The values that a key may take: what is fixed, or what is allowed of ``values``."""
        key = f"{'train' if section else 'parallel'}.{name}"
        if key in self.fixed:
            return [getattr(section or self.config.parallel, name)]
        if name in self.allowed:
            return list(self.allowed[name])
        return values

    def run(self, mesh: Mesh, way: Way) -> RunConfig:
        """The resolved run with this layout."""
        p = self.config.parallel
        parallel = replace(
            p, tp=mesh.tp, pp=mesh.pp, cp=mesh.cp, dp=mesh.dp, ep=mesh.ep, etp=mesh.etp, dp_shard=way.dp_shard,
            zero=way.zero, schedule=way.schedule, chunks=way.chunks, recompute=way.recompute,
            sequence_parallel=way.sequence, regather_inputs=p.regather_inputs and way.sequence,
            stage_layers=p.stage_layers if "parallel.stage_layers" in self.fixed else (),
        )  # fmt: skip
        batch = mesh.micro, mesh.batch
        if batch not in self._with_batch:
            train = replace(self.config.train, micro_batch_size=mesh.micro, global_batch_size=mesh.batch)
            self._with_batch[batch] = replace(self.config, train=train)
        return replace(self._with_batch[batch], parallel=parallel)

    @cached_property
    def _with_batch(self) -> dict[tuple[int, int], RunConfig]:
        """(microbatch, global batch) -> the run with them: made once, for all layouts that have them."""
        return {}

    def problems(self, config: RunConfig) -> list[str]:
        """Which of the rules about layouts a run breaks (the other rules say the same of all layouts)."""
        return [line for rule in LAYOUT_RULES for line in rule(config, self.world)]


def usual_batch(seq_len: int, world: int) -> int:
    """Samples of a step where nobody says: a power of two of them."""
    tokens = max(BATCH_TOKENS, TOKENS_PER_GPU * world)
    return 1 << max(0, round(tokens / seq_len).bit_length() - 1)


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})

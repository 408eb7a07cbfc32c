"""A rank's parameters and gradients in flat buffers, cut over ranks as a `ShardingPolicy` says; and their sums.

One layout of buckets serves every ZeRO stage (Rajbhandari et al. 2020, section 5). Rank k of the sharding group owns
piece k of each bucket; what it owns of one parameter is a *run*, and an optimizer sees runs only. Without sharding a
run is a whole local parameter.

| | parameters | gradients | a bucket's sum |
|---|---|---|---|
| stage 0 | whole | whole | all-reduce |
| stage 1 | whole, gathered after the update, ahead of their next use | whole | reduce-scatter into the own piece |
| stage 2 | whole, gathered like those | own pieces; a unit's while it is in backward | reduce-scatter, added up |
| stage 3 | own pieces; a unit's while it is in use | as stage 2 | as stage 2 |

Stages 0 and 1 sum once a step, bucket by bucket in the last backward; stages 2 and 3 after every microbatch: they keep
no whole gradient to add to. Sums over data-parallel ranks come first, while backward goes on. What tensor-parallel
ranks computed in parts (norms under sequence parallelism, Korthikanti et al. 2022, section 4.2.2) and copies of kv
heads are summed last, on runs, in one message each.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacore.kernels.halves import join, split
from megacore.layout.buffer import BufferLayout, groups_of_size
from megacore.layout.policy import ShardingPolicy
from megacore.layout.shards import Run, piece_of, runs_of
from megacore.mesh.collectives import all_gather_start, all_reduce, all_reduce_start, reduce_scatter_start
from megacore.mesh.group import Group, Pending
from megacore.mesh.mesh import ParallelMesh
from megacore.sharding.codes import Coder, Codes
from megacore.sharding.flat import FlatBuffer
from megacore.sharding.lending import Lending, add_to_main_grad, hide, set_gradient
from megacore.spec import ParamSpec

BUCKET_BYTES = 1 << 25
"""Gradients that travel in one message, about, where a bucket is not a unit."""

UNDER_WAY = 2
"""Sums that units leave behind them at once, under stages 2 and 3."""

Unit = tuple[int, int]
"""(stage, unit): an embedding, a block or a head."""
Shape = tuple[str, Sequence[int]]


@dataclass(frozen=True)
class Numbers:
    """Formats: of parameters; of gradients while they add up; of the weights that are updated (None: the parameters
    themselves are); of gradients on their way to data-parallel ranks (None: as they are). With ``split``, bf16
    parameters are the upper halves of the float32 weights that are updated."""

    params: torch.dtype
    grads: torch.dtype
    master: torch.dtype | None = None
    reduce: torch.dtype | None = None
    split: bool = False


class Storage:
    """What a rank keeps of its stages between steps, but for the optimizer's state.

    ``units`` has the parameters of each unit, in order; one that two units share lies with the first. ``alone`` names
    parameters with a bucket of their own (a tied matrix, which another pipeline rank must cut alike). ``fill`` writes a
    parameter's initial values into a tensor of its local shape; until then parameters may be on the meta device. With
    ``on_host`` the weights that are updated lie in host memory, copies of the parameters if they are no others. Where
    they are cut, the parameters ``in_fp8`` travel as codes that ``coder`` takes, and have no memory of their own.
    """

    def __init__(
        self,
        units: Mapping[Unit, Mapping[str, nn.Parameter]],
        specs: Mapping[str, ParamSpec],
        mesh: ParallelMesh,
        policy: ShardingPolicy,
        numbers: Numbers,
        fill: Callable[[str, Tensor], None],
        alone: Iterable[str] = (),
        on_host: bool = False,
        coder: Coder | None = None,
        in_fp8: Collection[str] = (),
    ) -> None:
        assert not (on_host and numbers.split), "halves of a number are kept together"
        self.mesh, self.policy, self.numbers, self.specs, self.on_host = mesh, policy, numbers, specs, on_host
        self.shards = mesh.dp_shard if policy.optimizer else Group.single("dp_shard")
        # what stays here is not rounded
        self.wire = (numbers.reduce if mesh.dp_cp.size > 1 else None) or numbers.grads
        self.parameters = {name: param for unit in units.values() for name, param in unit.items()}
        groups = list(_groups(units, policy.by_unit, frozenset(alone), BUCKET_BYTES // numbers.grads.itemsize))
        # room for the largest of what tp ranks hold, so that all cut alike
        room = {name: _most_elements(specs[name], mesh.tp.size) for name in self.parameters}
        groups = [(unit, group) for unit, group in groups if any(room[name] for name, _ in group)]
        self.layout = BufferLayout.in_buckets([group for _, group in groups], self.shards.size, room)
        self.slots = {slot.name: slot for slot in self.layout.slots}
        self.runs = runs_of(self.layout, self.shards.rank, self.shards.size)
        self.buckets = _buckets_of(units, groups, policy.by_unit)
        self.needed = _needed_by(units, groups)
        self.pending: deque[Pending] = deque()
        self.arriving: dict[int, Pending] = {}
        self._on_publish: Callable[[], None] = lambda: None
        self._allocate(fill)
        names = [[name for name, _ in group] for _, group in groups]
        self.codes: Codes | None = None
        if coder is not None and self.shards.size > 1:
            own = {run.name: (run, part) for run, part in zip(self.runs, self.own_params)}
            self.codes = Codes(self.layout, names, in_fp8, self.parameters, self.shards, own, coder)
        self.lending = Lending(self.layout, names, self.parameters, self.shards, self.params, numbers.grads, self.codes)
        if self.codes is not None:
            for slot in (slot for bucket in self.codes.buckets.values() for slot in bucket.matrices):
                hide(self.parameters[slot.name], slot)
            self.publish()

    def call_on_change(self, published: Callable[[], None], freed: Callable[[Iterable[str]], None]) -> None:
        """For who keeps something that was made of the weights: ``published`` is called when there are new ones,
        ``freed`` with the names of parameters that have lost their memory (stage 3)."""
        self._on_publish, self.lending.on_free = published, freed

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self.grads.zero_()

    def reduce(self, unit: Unit) -> None:
        """Begin to sum the gradients of a unit, or of a whole stage (unit -1), over data-parallel ranks."""
        for bucket in self.buckets[unit]:
            if not self.policy.grads or self.lending.are_complete(bucket, unit):
                self.pending.append(self._reduce(bucket))
        while self.policy.grads and len(self.pending) > UNDER_WAY:
            self.pending.popleft().wait()

    def summed_early(self) -> set[int]:
        """The stages of which some sums can begin before backward has gone through all units."""
        several = Counter(stage for (stage, unit), buckets in self.buckets.items() if unit >= 0 and buckets)
        return {stage for stage, number in several.items() if number > 1}

    def gather(self, unit: Unit) -> None:
        """Begin to bring a unit's parameters (stage 3)."""
        for bucket in self.buckets[unit]:
            self.lending.gather(bucket)

    def free(self, unit: Unit) -> None:
        """Let go of them."""
        for bucket in self.buckets[unit]:
            self.lending.free(bucket)

    def use(self, unit: Unit, backward: bool) -> None:
        """Called right before a unit, or a whole stage (unit -1), computes: what it needs is there then."""
        for bucket in self.needed[unit] if self.arriving else ():
            self._arrive(bucket)
        for bucket in self.buckets[unit]:
            if self.policy.params:
                self.lending.arrive(bucket)
            if backward and self.policy.grads:
                self.lending.open_grads(bucket, unit)

    def settle(self) -> None:
        """Wait for the sums over data-parallel ranks that have begun."""
        while self.pending:
            self.pending.popleft().wait()

    def finish(self) -> None:
        """Leave every rank with the sums of the gradients of what it owns; once a step."""
        self.settle()
        _sum_together(self.partial, self.mesh.tp)
        _sum_together(self.copied, self.mesh.kv)

    def publish(self, copied: bool = False) -> None:
        """Begin to give all ranks the updated weights of what each owns; ``copied``: they are in ``own_params``.

        Who computes waits in ``use`` for what it needs, so that the last of them travel while the first are used.
        """
        self._on_publish()
        if self.master is not None and not copied:
            for param, weight in zip(self.own_params, self.weights):
                param.copy_(weight)
        self.arrive()
        if self.codes is not None:
            self.codes.make()
        if self.policy.params or self.shards.size == 1:
            return
        for bucket, (start, end) in enumerate(self.layout.buckets):
            if self.codes is not None and bucket in self.codes.buckets:
                self.arriving[bucket] = self.codes.gather(bucket)
                continue
            own = self.params[slice(*piece_of((start, end), self.shards.rank, self.shards.size))]
            self.arriving[bucket] = all_gather_start(own, self.shards, out=self.params[start:end])

    def arrive(self) -> None:
        """Wait for all weights that are on their way; before anybody but the optimizer writes to weights."""
        for bucket in list(self.arriving):
            self._arrive(bucket)

    def _arrive(self, bucket: int) -> None:
        pending = self.arriving.pop(bucket, None)
        if pending is not None:
            pending.wait()

    def values(self) -> tuple[Tensor, ...]:
        """The weights that are updated, one per run, with all their bits: not to be written to."""
        if self.lower is None:
            return self.weights
        return tuple(map(join, self.weights, self.lower))

    def whole(self, what: str) -> FlatBuffer:
        """All of this rank's ``grads`` or ``params``, for who wants to look: every rank of the group must call it."""
        self.arrive()
        source = self.grads if what == "grads" else self.params
        if self.shards.size == 1:
            return FlatBuffer(self.layout, source)
        whole = FlatBuffer.zeros(self.layout, source.dtype, source.device)
        for start, end in self.layout.buckets:
            first, last = piece_of((start, end), self.shards.rank, self.shards.size)
            if len(source) == len(whole.data):
                own = source[first:last]
            else:
                own = source[start // self.shards.size : end // self.shards.size]
            all_gather_start(own, self.shards, out=whole.data[start:end]).wait()
        return whole

    def _allocate(self, fill: Callable[[str, Tensor], None]) -> None:
        """Make the buffers, write the initial values, and put the parameters in their places."""
        size, own = self.layout.size, self.layout.size // self.shards.size
        device = self.mesh.device
        self.params = torch.zeros(own if self.policy.params else size, dtype=self.numbers.params, device=device)
        self.grads = torch.zeros(own if self.policy.grads else size, dtype=self.numbers.grads, device=device)
        self.master = None
        if self.numbers.master is not None or self.on_host:
            place = torch.device("cpu") if self.on_host else device
            pinned = self.on_host and device.type == "cuda"
            self.master = torch.zeros(
                own, dtype=self.numbers.master or self.numbers.params, device=place, pin_memory=pinned
            )
        lower = torch.zeros(own if self.numbers.split else 0, dtype=torch.int16, device=device)
        exact = torch.float32 if self.numbers.split else self.numbers.master or self.numbers.params
        runs: dict[str, Run] = {run.name: run for run in self.runs}
        # one place for all, so that no trail of freed memory is left behind
        room = torch.empty(
            max((param.numel() for param in self.parameters.values()), default=0), dtype=exact, device=device
        )
        for name, param in self.parameters.items():
            values = room[: param.numel()].view(param.shape)
            fill(name, values.zero_())
            if self.numbers.split:
                values, lower_values = split(values)
            self._place(param, name, values)
            if name in runs:
                run, flat = runs[name], values.view(-1)
                self._own_params(run).copy_(flat[run.start : run.stop])
                if self.numbers.split:
                    self._of_run(lower, run, True).copy_(lower_values.view(-1)[run.start : run.stop])
                if self.master is not None:
                    self.master[run.offset : run.offset + run.numel].copy_(flat[run.start : run.stop])
        self.own_params = tuple(map(self._own_params, self.runs))
        self.weights = tuple(map(self._own_weights, self.runs))
        self.lower = tuple(self._of_run(lower, run, True) for run in self.runs) if self.numbers.split else None
        self.own_grads = tuple(map(self._own_grads, self.runs))
        self.partial = [grad for run, grad in zip(self.runs, self.own_grads) if "tp" in self.specs[run.name].partial]
        self.copied = [
            part
            for run, grad in zip(self.runs, self.own_grads)
            for part in _copied(run, grad, self.specs[run.name], self.mesh.tp)
        ]

    def _place(self, param: nn.Parameter, name: str, values: Tensor) -> None:
        """Where a parameter and its gradient stay, if they do."""
        slot = self.slots[name]
        if self.policy.params:
            hide(param, slot)
        else:
            param.data = slot.of(self.params)
            param.data.copy_(values)
        if not self.policy.grads:
            set_gradient(param, slot.of(self.grads))
        if self.numbers.grads != self.numbers.params:
            param.register_post_accumulate_grad_hook(add_to_main_grad)

    def _reduce(self, bucket: int) -> Pending:
        start, end = self.layout.buckets[bucket]
        if self.policy.grads:
            own = self.grads[start // self.shards.size : end // self.shards.size]
            whole, buffers = self.lending.close_grads(bucket), self.lending.grad_buffers

            def add(x: Tensor) -> Tensor:
                buffers.give(whole)
                return own.add_(x)

            return self._scatter(whole).then(add)
        whole = self.grads[start:end]
        if self.shards.size == 1:
            return self._sum(whole)
        own = self.grads[slice(*piece_of((start, end), self.shards.rank, self.shards.size))]
        if self.wire == whole.dtype:
            return self._scatter(whole, own)
        return self._scatter(whole).then(own.copy_)

    def _sum(self, whole: Tensor) -> Pending:
        if self.wire == whole.dtype:
            return all_reduce_start(whole, self.mesh.dp_cp)
        return all_reduce_start(whole.to(self.wire), self.mesh.dp_cp).then(whole.copy_)

    def _scatter(self, whole: Tensor, out: Tensor | None = None) -> Pending:
        return reduce_scatter_start(whole.to(self.wire), self.shards, out=out).then(self._over_replicas)

    def _over_replicas(self, x: Tensor) -> Tensor:
        """The sum over groups that shard the same: hybrid sharding, and ranks of cp."""
        return all_reduce(all_reduce(x, self.mesh.dp_replicate), self.mesh.cp)

    def _own_params(self, run: Run) -> Tensor:
        return self._of_run(self.params, run, self.policy.params)

    def _own_grads(self, run: Run) -> Tensor:
        return self._of_run(self.grads, run, self.policy.grads)

    def _own_weights(self, run: Run) -> Tensor:
        return self._own_params(run) if self.master is None else self._of_run(self.master, run, True)

    def _of_run(self, buffer: Tensor, run: Run, is_shard: bool) -> Tensor:
        begin = run.offset if is_shard else self.slots[run.name].offset + run.start
        return buffer[begin : begin + run.numel]


def _groups(
    units: Mapping[Unit, Mapping[str, nn.Parameter]], by_unit: bool, alone: frozenset[str], num_elements: int
) -> Iterator[tuple[Unit, list[Shape]]]:
    """(unit, parameters) of each bucket; unit -1 where buckets are not units."""
    seen: set[str] = set()
    parts: dict[Unit, list[Shape]] = {}
    for (stage, unit), params in units.items():
        new = [(name, tuple(param.shape)) for name, param in params.items() if name not in seen]
        seen.update(name for name, _ in new)
        parts.setdefault((stage, unit if by_unit else -1), []).extend(new)
    for owner, shapes in parts.items():
        rest = [pair for pair in shapes if pair[0] not in alone]
        yield from ((owner, group) for group in ([rest] if by_unit else groups_of_size(rest, num_elements)))
        yield from ((owner, [pair]) for pair in shapes if pair[0] in alone)


def _buckets_of(
    units: Mapping[Unit, Mapping[str, nn.Parameter]], groups: Sequence[tuple[Unit, Sequence[Shape]]], by_unit: bool
) -> dict[Unit, list[int]]:
    """The buckets that each unit's backward adds to; or, where buckets are not units, to which it is the last to add,
    and each stage's (unit -1).

    The last layers' come first, for backward is done with them first.
    """
    found: dict[Unit, list[int]] = {}
    bucket_of = {name: number for number, (_, group) in enumerate(groups) for name, _ in group}
    if by_unit:
        for unit, params in units.items():
            found[unit] = sorted({bucket_of[name] for name in params if name in bucket_of}, reverse=True)
        return found
    owner: dict[str, Unit] = {}
    for unit, params in units.items():
        owner = dict.fromkeys(params, unit) | owner
    last = [min(owner[name] for name, _ in group) for _, group in groups]
    for unit in units:
        whole = unit[0], -1
        found[whole] = [n for n in reversed(range(len(groups))) if groups[n][0] == whole]
        found[unit] = [n for n in found[whole] if last[n] == unit]
    return found


def _needed_by(
    units: Mapping[Unit, Mapping[str, nn.Parameter]], groups: Sequence[tuple[Unit, Sequence[Shape]]]
) -> dict[Unit, list[int]]:
    """The buckets with parameters that each unit uses, and each stage (unit -1), in the order of buckets."""
    bucket_of = {name: number for number, (_, group) in enumerate(groups) for name, _ in group}
    needed = {unit: {bucket_of[name] for name in params if name in bucket_of} for unit, params in units.items()}
    for stage, unit in units:
        needed[stage, -1] = needed.get((stage, -1), set()) | needed[stage, unit]
    return {unit: sorted(buckets) for unit, buckets in needed.items()}


def _most_elements(spec: ParamSpec, num: int) -> int:
    return max(spec.local_numel(index, num) for index in range(num))


def _copied(run: Run, grad: Tensor, spec: ParamSpec, tp: Group) -> Iterator[Tensor]:
    """The parts of a run of which other tp ranks hold copies."""
    if spec.split is None:
        return
    rows = spec.local_shape(tp.rank, tp.size)[0]
    row = spec.local_numel(tp.rank, tp.size) // max(rows, 1)
    for piece in spec.pieces(tp.rank, tp.size):
        if piece.copies > 1:
            assert spec.dim == 0, "heads are rows"
            first, last = max(run.start, piece.local * row), min(run.stop, (piece.local + piece.size) * row)
            if first < last:
                yield grad[first - run.start : last - run.start]


def _sum_together(tensors: list[Tensor], group: Group) -> None:
    if group.size == 1 or not tensors:
        return
    packed = all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), group)
    for tensor, part in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))

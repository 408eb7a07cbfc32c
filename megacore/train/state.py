"""All of a run that must survive, as slices of global tensors: what a checkpoint holds, whatever the layout.

    weights/NAME            the exact weights: master weights where there are some, joined halves, frozen ones too
    optim/MOMENT/NAME       a number per element, in the format of the moment
    optim/MOMENT/NAME/I     a number per row or column of logical matrix I of the parameter (``spec.matrices``)
    optim/MOMENT/NAME@tpIofN    codes of 8 bits, of what rank I of N holds, flattened: blocks are cut there; `.scale`
                            behind MOMENT has their scales
    optim/clock, state/...  numbers that are the same on all ranks: clock, loss scale, clipping, and
                            largest elements for FP8 (state/fp8/amaxSTEPS/LAYER; of transformer-engine's modules
                            state/fp8/teSTEPS/LAYER/scaling_fwd.amax_history and so on, equal where the layer is)

Where several ranks hold the same, they share the writing. Data need nothing: samples are a function of their ordinal,
and everything random is one of the seed and an index.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megacore.checkpoint.parts import Part
from megacore.checkpoint.read import WEIGHTS, Checkpoint
from megacore.checkpoint.source import WeightSource
from megacore.config.optimizers import state as kinds_of
from megacore.layout.shards import Run
from megacore.model.stage import TIED
from megacore.optim.quantise import BLOCK, codebook, decode, encode, lookup
from megacore.spec import ParamSpec
from megacore.spec.matrices import rectangles_of, region_of
from megacore.train.build import Built

OPTIM, STATE, CLOCK = "optim/", "state/", "optim/clock"


class Writers(NamedTuple):
    """Ranks that hold the same parts: what they share, this rank's place among them, how many they are."""

    what: str
    place: int
    number: int


@dataclass(frozen=True)
class Held:
    """A part that this rank has; ``writers`` are those who could write it, None where that is another's to do."""

    part: Part
    writers: Writers | None


class State:
    """A rank's share. ``parts`` are filled by a load; ``own_parts`` are what this rank writes. It is made right when
    the run is ``built``: what it finds then is what a load goes back to where a checkpoint has none."""

    def __init__(self, built: Built) -> None:
        self.built, self.mesh, self.storage = built, built.mesh, built.storage
        self.spec_of = built.spec.by_name
        self.tp = built.mesh.tp
        mesh, sharded = built.mesh, built.storage.policy.optimizer
        cp, copies = mesh.cp, mesh.dp_replicate if sharded else mesh.dp
        self.replicas = Writers("runs", copies.rank * cp.size + cp.rank, copies.size * cp.size)
        self.whole = Writers("whole tensors", mesh.dp.rank * cp.size + cp.rank, mesh.dp.size * cp.size)
        place, number = self.whole.place * self.tp.size + self.tp.rank, self.whole.number * self.tp.size
        self.stage_ranks = Writers("margins", place, number)
        self.everyone = Writers("numbers", mesh.rank, mesh.world.size)
        self.held = list(self._held())
        self.initial = {part.key: part.tensor.clone() for part in self.parts if part.key.startswith(STATE)}

    @property
    def parts(self) -> list[Part]:
        """Everything."""
        return [each.part for each in self.held]

    def own_parts(self) -> list[Part]:
        """Slices that this rank writes; of what several ranks hold each writes about as much."""
        found = []
        for writers in dict.fromkeys(each.writers for each in self.held if each.writers):
            _, place, number = writers
            slices = [part for each in self.held if each.writers == writers for part in each.part.in_slices()]
            total, done = sum(part.num_bytes for part in slices), 0
            for part in slices:
                middle = done + part.num_bytes / 2
                if place * total <= middle * number < (place + 1) * total:
                    found.append(part)
                done += part.num_bytes
        return found

    def lacking(self, checkpoint: Checkpoint) -> str:
        """Why its optimizer's state is not enough for this run, or ''."""
        sides = checkpoint.manifest.tensors, (part.key for part in self.parts)
        there, wanted = ({key.split("/")[1] for key in keys if key.startswith(OPTIM)} for keys in sides)
        if not wanted - there:
            return ""
        missing = ", ".join(sorted(wanted - there))
        return (
            f"optim: {checkpoint.what} has no {missing}, which the optimizer keeps with these settings; set them back, "
            "or start anew from its weights with checkpoint.init_from"
        )

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take everything from a checkpoint. What loss scale, clipping and FP8 remember begins anew where it has
        none: the run that saved it had none of them.

        Raises ValueError where something is damaged, missing or of another shape; state is then neither old nor new.
        """
        self.storage.arrive()  # weights on their way must not come after those that are loaded
        there = checkpoint.manifest.tensors
        for part in self.parts:
            if part.key in self.initial and part.key not in there:
                part.tensor.copy_(self.initial[part.key])
        wanted = (part for part in self._directly(checkpoint) if part.key not in self.initial or part.key in there)
        checkpoint.load(wanted)
        rule = self.built.trainer.rule
        rule.set_clock(rule.clock.clone())  # rules that are made of several pass it on

    @torch.no_grad()
    def load_weights(self, source: WeightSource) -> None:
        """Take weights alone, slice by slice, from wherever they lie."""
        self.storage.arrive()
        for part in self.parts:
            if part.key.startswith(WEIGHTS):
                for each in part.in_slices():
                    each.fill(each.start, source.read(each.key.removeprefix(WEIGHTS), each.start, each.size))

    def publish(self) -> None:
        """Give all ranks the weights that each has; collective over the shards."""
        self.storage.publish()

    def _directly(self, checkpoint: Checkpoint) -> list[Part]:
        """What can be read as it lies; 8-bit moments of another tp are made anew on the way."""
        tp = checkpoint.manifest.layout.get("tp", 1)
        if tp == self.tp.size or not any("@tp" in part.key for part in self.parts):
            return self.parts
        self._requantise(checkpoint, tp)
        return [part for part in self.parts if "@tp" not in part.key]

    def _held(self) -> Iterator[Held]:
        storage, trainer = self.storage, self.built.trainer
        lower: Sequence[Tensor | None] = storage.lower or [None] * len(storage.runs)
        for run, weight, low in zip(storage.runs, storage.weights, lower):
            yield from self._elements(f"{WEIGHTS}{run.name}", run, weight, low)
        # a tied matrix is one parameter of two stages
        named = {name: param for stage in self.built.stages.values() for name, param in stage.named_parameters()}
        for name, param in named.items():
            if name not in storage.parameters:  # frozen: whole on every rank
                run = Run(name, 0, param.numel(), 0)
                yield from self._elements(f"{WEIGHTS}{name}", run, param.data.view(-1), None, self.whole)
        yield from self._of_optimizer()
        numbers = {CLOCK: trainer.rule.clock}
        numbers |= {f"{STATE}loss_scale/{name}": tensor for name, tensor in trainer.loss_scale.state().items()}
        numbers |= {f"{STATE}clip/{name}": tensor for name, tensor in trainer.clip.state().items()}
        of_stages: dict[str, Tensor] = {}
        if trainer.fp8 is not None:
            of_fp8 = numbers if trainer.fp8.everywhere else of_stages
            of_fp8 |= {f"{STATE}fp8/{name}": tensor for name, tensor in trainer.fp8.state().items()}
        for tensors, writers in ((numbers, self.everyone), (of_stages, self.stage_ranks)):
            for key, tensor in tensors.items():
                shape = tuple(tensor.shape)
                yield Held(Part(key, shape, (0,) * len(shape), shape, tensor), writers)

    def _of_optimizer(self) -> Iterator[Held]:
        rule, kinds = self.built.trainer.rule, kinds_of(self.built.config.optim.name)
        for name, tensors in rule.state().items():
            base, _, part = name.partition(".")
            if kinds[base].split()[0] in ("row", "column"):
                for matrix, tensor in zip(rule.state_matrices, tensors, strict=True):
                    key, shape = f"{OPTIM}{name}/{matrix.name}/{matrix.segment}", tuple(tensor.shape)
                    writers = None if self._is_copy(matrix.name) else self.stage_ranks
                    yield Held(Part(key, shape, (0,), shape, tensor), writers)
                continue
            for run, tensor in zip(self.storage.runs, tensors, strict=True):
                if not tensor.numel():
                    continue
                if part or tensor.dtype == torch.uint8:
                    yield self._blocks(name, run, tensor, BLOCK if part else 1)
                else:
                    yield from self._elements(f"{OPTIM}{name}/{run.name}", run, tensor, None)

    def _is_copy(self, name: str) -> bool:
        """Whether another pipeline rank writes this parameter: the tied matrix belongs to the first stage."""
        return name == TIED and 0 not in self.built.stages

    def _elements(
        self, key: str, run: Run, tensor: Tensor, lower: Tensor | None, writers: Writers | None = None
    ) -> Iterator[Held]:
        """A run, as the rectangles of its parameter that it consists of."""
        spec = self.spec_of[run.name]
        for each in rectangles_of(spec, run, self.tp.rank, self.tp.size):
            assert each.height == 1 or each.stride == each.width, each
            start, size = region_of(spec, each)
            span = slice(each.offset, each.offset + each.height * each.width)
            low = None if lower is None else lower[span].view(size)
            part = Part(key, spec.shape, start, size, tensor[span].view(size), low)
            owned = each.owned and not self._is_copy(run.name)
            yield Held(part, (writers or self.replicas) if owned else None)

    def _blocks(self, name: str, run: Run, tensor: Tensor, block: int) -> Held:
        """Codes, or scales of blocks, of this tp rank's tensor."""
        spec, tp = self.spec_of[run.name], self.tp
        key = _local_key(name, run.name, tp.rank, tp.size)
        shape = (-(-spec.local_numel(tp.rank, tp.size) // block),)
        part = Part(key, shape, (run.start // block,), tuple(tensor.shape), tensor)
        return Held(part, None if self._is_copy(run.name) else self.replicas)

    def _requantise(self, checkpoint: Checkpoint, tp: int) -> None:
        """Moments in 8 bits whose blocks were cut for another tp: what they stand for, in blocks of this one."""
        rule, kinds = self.built.trainer.rule, kinds_of(self.built.config.optim.name)
        state = rule.state()
        device = self.mesh.device
        for name in (name for name in state if f"{name}.scale" in state):
            codes = codebook(kinds[name].split()[0] != "square", torch.device("cpu"))
            table = lookup(codes)
            for run, data, scale in zip(self.storage.runs, state[name], state[f"{name}.scale"], strict=True):
                if data.numel():
                    spec = self.spec_of[run.name]
                    values = self._of_run(spec, run, _decoded(checkpoint, name, spec, tp, codes))
                    new_data, new_scale = encode(values, table)
                    data.copy_(new_data.to(device))
                    scale.copy_(new_scale.to(device))

    def _of_run(self, spec: ParamSpec, run: Run, values: Tensor) -> Tensor:
        """A run's part of a whole parameter, 1-D."""
        out = torch.empty(run.numel, dtype=values.dtype)
        for each in rectangles_of(spec, run, self.tp.rank, self.tp.size):
            start, size = region_of(spec, each)
            place = tuple(slice(first, first + count) for first, count in zip(start, size))
            out[each.offset : each.offset + each.height * each.width] = values[place].reshape(-1)
        return out


def _local_key(moment: str, name: str, rank: int, size: int) -> str:
    return f"{OPTIM}{moment}/{name}@tp{rank}of{size}"


def _decoded(checkpoint: Checkpoint, moment: str, spec: ParamSpec, tp: int, codes: Tensor) -> Tensor:
    """What an 8-bit moment that was saved by ``tp`` ranks stands for: float32 of the parameter's global shape."""
    whole = torch.empty(spec.shape)
    for rank in range(tp):
        shape = spec.local_shape(rank, tp)
        num = spec.local_numel(rank, tp)
        if not num:
            continue
        data = checkpoint.read_key(_local_key(moment, spec.name, rank, tp), (0,), (num,))
        scale = checkpoint.read_key(_local_key(f"{moment}.scale", spec.name, rank, tp), (0,), (-(-num // BLOCK),))
        local = decode(data, scale, codes, torch.float32).view(shape)
        for piece in spec.pieces(rank, tp):
            place = whole.narrow(spec.dim, piece.start, piece.size)
            place.copy_(local.narrow(spec.dim, piece.local, piece.size))
    return whole

"""From what a user asks for to a plan: which keys are fixed, which batch holds, and what is priced."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megacore.config.errors import ConfigError
from megacore.config.load import SHORT, load
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.config.supported import WORKS, unsupported
from megacore.config.validate import validate
from megacore.config.write import toml_value
from megacore.cost.estimate import HEADROOM, Estimate, estimate, with_notes
from megacore.cost.machine import Machine
from megacore.cost.plot.heat_map import Cell
from megacore.cost.plot.scaling import Point
from megacore.cost.practice import OURS, Practice
from megacore.cost.search import Found, Search, by_model_axes
from megacore.cost.space import Space, usual_batch

MOST_GPUS = 1 << 20
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Wish:
    """What is to be planned. ``config`` is as written; ``fixed`` are keys of a layout that are given; ``batch`` is the
    global batch if that is given, else 0."""

    config: RunConfig
    world: int
    machine: Machine
    fixed: frozenset[str] = frozenset()
    batch: int = 0
    headroom: float = HEADROOM
    practice: Practice = OURS
    notes: tuple[str, ...] = ()
    everything: bool = False
    """Whether layouts that the engine does not run yet are ranked with the others."""

    @property
    def built(self) -> Mapping[str, tuple[Any, ...]]:
        """The values of searched keys to which a search keeps, so that the engine runs what it finds; empty where all
        are to be ranked, or the user or the model asks for more than the engine runs."""
        beyond = {line.partition("=")[0] for line in unsupported(self.open())}
        if self.everything or any(key.startswith(("model.", "parallel.")) for key in beyond):
            return {}
        names = {key.removeprefix("parallel."): values for key, values in WORKS.items() if key.startswith("parallel.")}
        return {name: values for name, values in names.items() if f"parallel.{name}" not in self.fixed}

    def space(self) -> Space:
        """The layouts that are allowed. Raises ConfigError where the run itself is wrong."""
        config = self.open()
        problems = [*self.problems(), *validate(config, None)]
        if problems:
            raise ConfigError(problems)
        node = max(self.machine.gpus_per_node, self.machine.nvlink_domain)
        return Space(resolve(config, self.world), self.world, node, self.fixed, self.batch, allowed=self.built)

    def open(self) -> RunConfig:
        """The run without those keys of its layout that are searched."""
        given = {field.name: getattr(self.config.parallel, field.name) for field in fields(ParallelConfig)}
        fixed = {name: value for name, value in given.items() if f"parallel.{name}" in self.fixed or name == "order"}
        t = self.config.train
        micro = t.micro_batch_size if "train.micro_batch_size" in self.fixed else 1
        batch = self.batch or micro * max(1, fixed.get("dp", 1))
        train = replace(t, micro_batch_size=micro, global_batch_size=batch)
        return replace(self.config, parallel=ParallelConfig(**fixed), train=train)

    def problems(self) -> list[str]:
        """What no layout can mend."""
        found = []
        if not 1 <= self.world <= MOST_GPUS:
            found.append(f"--gpus={self.world} must be from 1 to {MOST_GPUS:,}")
        if not 0 <= self.headroom < 1:
            found.append(f"--headroom={self.headroom:g} must be at least 0 and less than 1, such as 0.1")
        if not self.config.model.vocab_size:
            found.append("model.vocab_size is missing, and a plan has no tokenizer to ask; give it, such as 32000")
        dtype = "fp8" if self.config.precision.fp8 != "off" else self.config.precision.dtype
        if self.machine.accelerator.peak_tflops(dtype) is None:
            what = "precision.fp8=" + self.config.precision.fp8 if dtype == "fp8" else f"precision.dtype={dtype}"
            found.append(f"{what} has no units on {self.machine.accelerator.name}; leave it out, or use another --gpu")
        return found

    def search(self, top: int) -> Found:
        """The fastest layouts that fit."""
        found = Search(self.space(), self.machine, self.practice, self.headroom).run(top)
        return replace(found, best=tuple(with_notes(each, self.notes) for each in found.best))

    def not_built(self, winner: Estimate) -> Estimate | None:
        """The fastest layout of all, if the engine does not run it yet and it is faster than ``winner``."""
        if not self.built:
            return None
        space = replace(self, everything=True).space()
        search = Search(space, self.machine, self.practice, self.headroom, beyond=self.built, within=winner)
        found = search.run(1, again=0)
        faster = found.best and found.best[0].tokens_per_s_per_gpu > winner.tokens_per_s_per_gpu
        return found.best[0] if faster else None

    def estimate(self) -> Estimate:
        """Exactly the layout that is written. Raises ConfigError with all that is wrong with it."""
        config, p = self.config, self.config.parallel
        if not self.batch:
            unit = config.train.micro_batch_size * max(1, p.dp or self.world // max(1, p.tp * p.pp * p.cp))
            wanted = usual_batch(config.train.seq_len, self.world) if config.train.seq_len > 0 else 1
            batch = max(unit, wanted // unit * unit) if unit > 0 else 1
            config = replace(config, train=replace(config.train, global_batch_size=batch))
        if problems := [*self.problems(), *validate(config, self.world if self.world > 0 else None)]:
            raise ConfigError(problems)
        resolved = resolve(config, self.world)
        found = estimate(resolved, self.world, self.machine, self.practice, headroom=self.headroom)
        said = (
            () if self.batch else (f"train.global_batch_size={config.train.global_batch_size} is the planner's choice",)
        )
        return with_notes(found, (*said, *self.notes))

    def cells(self) -> dict[tuple[int, int], Cell]:
        """(tp, pp) -> the best of all layouts with these."""
        space = self.space()
        pairs = {(mesh.tp, mesh.pp) for mesh in space.meshes()}
        found = Search(space, self.machine, self.practice, self.headroom).run(len(pairs), by_model_axes, simulate=False)
        cells = {pair: Cell(0, 0, why="does not fit") for pair in pairs}
        for each in found.best:
            layout = each.layout
            cells[layout.tp, layout.pp] = Cell(each.step.seconds, each.tokens_per_s_per_gpu, each.name())
        return cells

    def scaling(self, worlds: Iterable[int] = SCALES) -> list[Point]:
        """The best plan of other numbers of devices, each with its own usual batch unless one is given."""
        points = []
        for world in sorted({*worlds, self.world}):
            found = Search(replace(self, world=world).space(), self.machine, self.practice, self.headroom).run(
                1, simulate=False
            )
            if found.best:
                points.append(Point(world, found.best[0].tokens_per_s_per_gpu, found.best[0].name()))
        return points


def read_wish(
    path: str | None,
    preset: str | None,
    overrides: Sequence[str],
    world: int,
    machine: Machine,
    batch: int = 0,
    headroom: float = HEADROOM,
    everything: bool = False,
) -> Wish:
    """What a command line asks for. Keys of the layout that it gives are fixed; a run file's layout is not, but its
    batch is. Models that say no format are planned in bf16."""
    given = [SHORT.get(key, key) for key in (override.partition("=")[0].strip() for override in overrides)]
    config = load(path, overrides, preset)
    notes = []
    if config.precision.dtype == "fp32" and "precision.dtype" not in given and not path and _has_bf16(machine):
        config = replace(config, precision=replace(config.precision, dtype="bf16"))
        notes.append("planned with precision.dtype=bf16; give another to plan with it")
    usual = RunConfig().train.global_batch_size
    if batch < 0:
        raise ValueError(f"--global-batch={batch} must be at least 1 sample")
    if batch and "train.global_batch_size" in given and config.train.global_batch_size != batch:
        raise ValueError(
            f"--global-batch={batch} and train.global_batch_size={config.train.global_batch_size} disagree; give one"
        )
    if not batch and ("train.global_batch_size" in given or config.train.global_batch_size != usual):
        batch = config.train.global_batch_size
    if batch:
        config = replace(config, train=replace(config.train, global_batch_size=batch))
    fixed = frozenset(key for key in given if key.startswith("parallel.") or key == "train.micro_batch_size")
    return Wish(config, world, machine, fixed, batch, headroom, notes=tuple(notes), everything=everything)


def _has_bf16(machine: Machine) -> bool:
    return machine.accelerator.peak_tflops("bf16") is not None


def run_lines(found: Estimate) -> str:
    """The lines of a run file that make this layout, as TOML."""
    p, t, usual = found.config.parallel, found.config.train, ParallelConfig()
    keys: dict[str, Any] = {"tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep, "zero": p.zero}
    keys |= {"etp": p.etp if p.ep > 1 and p.etp != 1 else 0, "dp_shard": p.dp_shard if p.dp_shard < p.dp else 0}
    keys |= {"chunks": p.chunks if p.schedule == "interleaved" else 0}
    more: dict[str, Any] = {"schedule": p.schedule if p.pp > 1 else usual.schedule, "stage_layers": p.stage_layers}
    more |= {"sequence_parallel": p.sequence_parallel, "regather_inputs": p.regather_inputs, "recompute": p.recompute}
    lines = ["[parallel]"]
    lines += [f"{key} = {toml_value(value)}" for key, value in (keys | more).items() if value != getattr(usual, key)]
    lines += ["", "[train]", f"seq_len = {t.seq_len}", f"micro_batch_size = {t.micro_batch_size}"]
    lines += [f"global_batch_size = {t.global_batch_size}", "", "[precision]"]
    lines.append(f"dtype = {toml_value(found.config.precision.dtype)}")
    if found.config.precision.fp8 != "off":
        lines.append(f"fp8 = {toml_value(found.config.precision.fp8)}")
    return "\n".join(lines)

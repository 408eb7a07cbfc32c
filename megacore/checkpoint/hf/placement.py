"""Where our parameters lie in the tensors of an HF folder.

A family declares, for each of our modules, one of four shapes of the same thing: rows of ours are rows of theirs, in
another order or in another tensor. Everything is done with the runs of rows that follow from it, in both directions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megacore.config.schema import ModelConfig
from megacore.spec import ModelSpec, ParamSpec

VOCABULARY = ("embedding.tokens.weight", "head.weight")
"""Parameters with a row for each token, of which a folder may hold more."""


@dataclass(frozen=True)
class Run:
    """Rows ``[ours, ours + size)`` of a parameter of ours are ``[theirs, theirs + size)`` of tensor ``tensor``."""

    tensor: str
    theirs: int
    ours: int
    size: int

    def of_ours(self, start: int, size: int) -> "Run | None":
        """The part of it within rows ``[start, start + size)`` of ours."""
        return self._clipped(start - self.ours, start + size - self.ours)

    def of_theirs(self, start: int, size: int) -> "Run | None":
        """The part of it within rows ``[start, start + size)`` of theirs."""
        return self._clipped(start - self.theirs, start + size - self.theirs)

    def _clipped(self, begin: int, end: int) -> "Run | None":
        begin, end = max(0, begin), min(self.size, end)
        if begin >= end:
            return None
        return replace(self, theirs=self.theirs + begin, ours=self.ours + begin, size=end - begin)


@dataclass(frozen=True)
class Same:
    """One tensor of the same shape."""

    module: str

    def runs(self, param: ParamSpec, model: ModelConfig) -> Iterator[Run]:
        """The rows of ``param``, whose tensor is ``module`` with the parameter's own ending."""
        yield Run(f"{self.module}{ending(param.name)}", 0, 0, param.shape[0])


@dataclass(frozen=True)
class Transposed(Same):
    """One tensor [in, out], as GPT-2's Conv1D keeps it; a bias is as ever."""


@dataclass(frozen=True)
class Segments:
    """A tensor for each segment of the parameter's rows: query, key and value, or gate and up."""

    modules: tuple[str, ...]

    def runs(self, param: ParamSpec, model: ModelConfig) -> Iterator[Run]:
        """As of `Same`."""
        assert param.split is not None and len(param.split.segments) == len(self.modules), param
        begin = 0
        for module, segment in zip(self.modules, param.split.segments):
            yield Run(f"{module}{ending(param.name)}", 0, begin, segment.size)
            begin += segment.size


@dataclass(frozen=True)
class ByHead:
    """One tensor whose rows are head after head, of each its query, key and value (GPT-NeoX)."""

    module: str

    def runs(self, param: ParamSpec, model: ModelConfig) -> Iterator[Run]:
        """As of `Same`."""
        heads, d = model.num_heads, model.head_dim
        for part in range(3):
            for head in range(heads):
                yield Run(f"{self.module}{ending(param.name)}", (3 * head + part) * d, (part * heads + head) * d, d)


Form = Same | Transposed | Segments | ByHead


@dataclass(frozen=True)
class Placement:
    """Where one parameter of ours lies: its ``runs``, ascending in ours. ``transposed``: theirs are [in, out]."""

    param: ParamSpec
    runs: tuple[Run, ...]
    transposed: bool


@dataclass(frozen=True)
class Placements:
    """A whole model's parameters in HF tensors: ``of`` by our names, ``shapes`` of theirs, in the order of ours."""

    of: Mapping[str, Placement]
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Placement]
    """By their names: the parameter of ours of which the tensor is a part."""

    @classmethod
    def make(cls, forms: Mapping[str, Form], model: ModelConfig, vocab_rows: int = 0) -> "Placements":
        """Of a resolved ``model``; ``forms`` by our modules, with * for the layer's number.

        ``vocab_rows``: rows of the vocabulary's tensors, of which the model has the first (0: they have no more).
        Raises ValueError for a parameter that the family has no place for.
        """
        of: dict[str, Placement] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, Placement] = {}
        for param in ModelSpec.of(model).params:
            form = _form(forms, param.name)
            transposed = isinstance(form, Transposed) and len(param.shape) == 2
            placement = Placement(param, tuple(form.runs(param, model)), transposed)
            of[param.name] = placement
            for tensor, rows in _rows(placement.runs).items():
                rows = max(rows, vocab_rows) if param.name in VOCABULARY else rows
                shape = (rows, *param.shape[1:])
                shapes[tensor] = shape[::-1] if transposed else shape
                parts[tensor] = placement
        return cls(of, shapes, parts)


def ending(name: str) -> str:
    """``.weight`` or ``.bias``, in which our names and theirs end alike."""
    return name[name.rindex(".") :]


def _form(forms: Mapping[str, Form], name: str) -> Form:
    module = name.removesuffix(ending(name))
    layer = re.match(r"layers\.(\d+)\.", module)
    general = module if layer is None else f"layers.*.{module[layer.end() :]}"
    if general not in forms:
        raise ValueError(f"the family has no tensor for our parameter {name}")
    form = forms[general]
    if layer is None:
        return form
    number = layer[1]
    if isinstance(form, Segments):
        return Segments(tuple(module.replace("*", number) for module in form.modules))
    return replace(form, module=form.module.replace("*", number))


def _rows(runs: Sequence[Run]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for run in runs:
        rows[run.tensor] = rows.get(run.tensor, 0) + run.size
    return rows

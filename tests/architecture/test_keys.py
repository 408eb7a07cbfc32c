"""No key of a run file is ignored: each is read somewhere, or refused."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from megacore.config.load import all_keys
from megacore.config.schema import RunConfig
from megacore.config.supported import WORKS
from tests.architecture.sources import Source, library


def section_classes(cls: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """The class of every section by its dotted name; that of the run itself by the empty one."""
    found = {prefix: cls.__name__}
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            found |= section_classes(kind, f"{prefix}.{name}".strip("."))
    return found


CLASSES = section_classes()
SECTIONS = {name: section for section, name in CLASSES.items()}
# Names by which a section may be known beyond a file's annotations: `config.model`, `self.optim`, ...
OWN_NAMES = {section.rpartition(".")[2]: section for section in CLASSES if section} | {"config": "", "c": ""}


def last_name(node: ast.AST | None) -> str:
    """`x` of `x`, `a.x` and `"x"`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant):
        return str(node.value).rpartition(".")[2]
    return node.id if isinstance(node, ast.Name) else ""


def meanings(tree: ast.Module) -> dict[str, set[str]]:
    """What names of a file stand for sections: by annotation (`o: OptimConfig`) or assignment (`o = config.optim`)."""
    found: dict[str, set[str]] = {name: {section} for name, section in OWN_NAMES.items()}
    pairs: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and last_name(node.annotation) in SECTIONS:
            found.setdefault(node.arg, set()).add(SECTIONS[last_name(node.annotation)])
        elif isinstance(node, ast.AnnAssign) and last_name(node.annotation) in SECTIONS:
            found.setdefault(last_name(node.target), set()).add(SECTIONS[last_name(node.annotation)])
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs += zip(target.elts, node.value.elts) if both else [(target, node.value)]  # type: ignore[attr-defined]
    for _ in range(3):  # a name of a name of a name
        for target, value in pairs:
            known = found.get(last_name(value), set()) if isinstance(value, (ast.Name, ast.Attribute)) else set()
            if known and last_name(target):
                found.setdefault(last_name(target), set()).update(known)
    return found


def keys_read(source: Source) -> Iterator[str]:
    """The keys that a file reads as attributes of something that stands for their section."""
    names = meanings(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            for section in names.get(last_name(node.value), ()):
                yield f"{section}.{node.attr}".strip(".")


def test_every_key_is_read_or_refused():
    rooms = ("config", "bench", "tools", "demo")
    # it hands hyper-parameters to optimizers under their names
    counts = [s for s in library() if s.room not in rooms or s.name == "megacore/config/settings.py"]
    read = {key for source in counts for key in keys_read(source)}
    ignored = [key for key in all_keys() if key not in read and key not in WORKS]
    assert not ignored, f"nothing reads {ignored}: use them, or put them into config/supported.py"


def test_a_key_counts_only_in_its_section():
    class Text(Source):
        tree = ast.parse(
            "def f(o: OptimConfig, run: RunConfig, other):\n"
            "    g, scale = run.log, o.model.rope_scaling\n"
            "    return g.every, other.name, o.lr, scale.factor, other.seed, run.out\n"
        )

    read = set(keys_read(Text(library()[0].path)))
    assert {"log.every", "optim.lr", "model.rope_scaling.factor", "out"} <= read
    assert not read & {"optim.name", "train.seed", "model.rope_scaling.type", "train.every", "model.out"}


def test_the_sections_are_those_of_the_schema():
    assert set(CLASSES) == {"", "model.rope_scaling", *(f.name for f in fields(RunConfig) if f.name != "out")}

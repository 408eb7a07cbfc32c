"""What ``kernels.use`` says: "OPERATION=BACKEND" takes that backend, where the fastest one is taken otherwise.

Operations and backends are read from the rows of ``megacore/kernels/table.py`` and ``adamw.py`` without importing them,
so that a run can be checked where torch is not installed.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from megacore.config.errors import did_you_mean
from megacore.config.schema import ModelConfig, RunConfig

FOLDER = Path(__file__).parents[1] / "kernels"
TABLES = ("table.py", "transformer_engine.py", "adamw.py")
OPTIMIZER = "adamw"
"""The operation that optimizers choose for; models call the fields of ``Kernels``."""


@cache
def backends() -> Mapping[str, tuple[str, ...]]:
    """The backends of every operation that runs call, in order of preference."""
    found: dict[str, tuple[str, ...]] = {}
    called = {OPTIMIZER}
    for name in TABLES:
        for node in ast.walk(ast.parse((FOLDER / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Kernel":
                operation, backend = (ast.literal_eval(arg) for arg in node.args[:2])
                found[operation] = (*found.get(operation, ()), backend)
            elif isinstance(node, ast.ClassDef) and node.name == "Kernels":
                called |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
    return {operation: names for operation, names in found.items() if operation in called}


def wanted(texts: Sequence[str]) -> dict[str, str]:
    """Operation to backend, of legal ``texts``."""
    return dict(_words(text) for text in texts)


def wanted_of_model(texts: Sequence[str]) -> dict[str, str]:
    """The same without the optimizer's."""
    return {operation: backend for operation, backend in wanted(texts).items() if operation != OPTIMIZER}


def kernel_problems(config: RunConfig) -> Iterator[str]:
    """A line for everything in ``kernels.use`` that cannot be read or would not be called."""
    known, texts = backends(), config.kernels.use
    operations = [_words(text)[0] for text in texts]
    optimizer = {OPTIMIZER} if config.optim.name in ("adam", "adamw") else set()
    called = operations_of(config.model, config.precision.fp8) | optimizer
    for text in texts:
        what = f'kernels.use holds "{text}"'
        operation, backend = _words(text)
        if not operation or not backend:
            yield f'{what}; write "OPERATION=BACKEND", such as "rms_norm=reference"'
        elif operation not in known:
            yield f"{what}, but there is no operation {operation}; {did_you_mean(operation, known)}"
        elif backend not in known[operation]:
            yield f"{what}, but {operation} has no backend {backend}; {did_you_mean(backend, known[operation])}"
        elif operations.count(operation) > 1:
            yield f"{what}, and {operation} is named {operations.count(operation)} times; name it once"
        elif operation not in called:
            yield f"{what}, which this run does not call; it calls {', '.join(sorted(called))}: leave it out"
    if config.kernels.compile:
        yield from compile_problems(config)


def compile_problems(config: RunConfig) -> Iterator[str]:
    """Why what happens to heads cannot be one graph."""
    m, tp = config.model, config.parallel.tp
    if m.qk_norm and m.qk_norm_over == "all" and tp > 1:
        yield (
            f"kernels.compile=true cannot compile model.qk_norm_over=all with parallel.tp={tp}, whose ranks sum within "
            "it; use tp=1, or do not compile"
        )


def operations_of(model: ModelConfig, fp8: str = "off") -> frozenset[str]:
    """The kernels that training a model calls."""
    norms = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
    attention = "attention_softcap" if model.attention_softcap else "attention"
    used = {"linear", norms[model.norm], attention, "logit_statistics", "squares"}
    used.add("bias_gelu" if model.activation == "gelu" and model.mlp_bias else model.activation.replace("-", "_"))
    if model.norm_placement != "post" and not model.parallel_residual:
        used.add(f"{norms[model.norm]}_add")
    if fp8 in ("current", "delayed"):
        used.add("quantise")
    if model.position == "rope":
        used.add("rope")
    if model.qk_norm and model.qk_norm_over == "head":
        used.add("rms_norm")
    if model.attention_dropout and not model.attention_softcap:
        used.add("attention_dropout")
    return frozenset(used)


def _words(text: str) -> tuple[str, str]:
    operation, _, backend = text.partition("=")
    return operation.strip(), backend.strip()

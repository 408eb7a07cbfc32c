"""No load path of a checkpoint runs what it reads: nothing unpickles, evaluates or trusts remote code."""

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.sources import Source, python_files

# The importer of Megatron-LM's own checkpoints, which are pickles: it has an unpickler with a list of what it builds.
EXEMPT = frozenset({"megacore/checkpoint/megatron/unpickle.py"})

MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"})
NAMES = frozenset({"eval", "exec", "compile", "__import__"})
# (owner, attribute): what is called on a library.
CALLS = frozenset({("torch", "load"), ("jit", "load"), ("serialization", "load"), ("dcp", "load")})
FLAGS = frozenset({"allow_pickle", "trust_remote_code"})

SOURCES = [each for each in python_files("megacore", "tools", "launch") if each.name not in EXEMPT]


def unsafe(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of whatever could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield node.lineno, node.module or ""
            if node.module in ("torch", "torch.serialization", "torch.jit"):
                yield from ((node.lineno, f"{node.module}.load") for each in node.names if each.name == "load")
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in NAMES:
                yield node.lineno, called.id
            if isinstance(called, ast.Attribute):
                owner = called.value
                last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if (last, called.attr) in CALLS or called.attr == "load_state_dict_from_url":
                    yield node.lineno, f"{last}.{called.attr}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FLAGS and not is_false:
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"


def test_nothing_that_is_read_is_run():
    wrong = [f"{each.name}:{line}: {what}" for each in SOURCES for line, what in unsafe(each.tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "torch.serialization.load('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.jit.load('x')",
    ],
)
def test_the_test_sees(text):
    assert list(unsafe(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["json.load(file)", "np.load(x, allow_pickle=False)", "config.load(x)", "re.compile('x')"]
)
def test_the_test_does_not_cry_wolf(text):
    assert not list(unsafe(ast.parse(text)))


def test_transformers_is_an_oracle_only():
    """Converting needs nothing of it: it is imported in one file, besides baselines of benchmarks."""
    users = {
        each.name
        for each in python_files("megacore", "tools", "launch")
        for name, _ in _imports(each)
        if name.split(".")[0] == "transformers"
    }
    outside = {name for name in users if not name.startswith("megacore/bench/baselines/")}
    assert outside == {"megacore/verify/transformers_oracle.py"}


def _imports(source: Source) -> Iterator[tuple[str, int]]:
    return source.imports(frozenset())

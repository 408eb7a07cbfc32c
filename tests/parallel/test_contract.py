"""The stand-in for transformer-engine has the signatures of the package, whose sources are read without a GPU.

What our layers pass, they pass to the stand-in in other tests; so whatever it takes must be taken by the real one.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from megacore.parallel.transformer_engine import DIRECTIONS, REMEMBERED
from tests.contracts import folders
from tests.parallel import standin

FILES = {
    "Linear": "pytorch/module/linear.py",
    "autocast": "pytorch/quantization.py",
    "is_fp8_available": "pytorch/quantization.py",
    "is_fp8_block_scaling_available": "pytorch/quantization.py",
    "DelayedScaling": "common/recipe/__init__.py",
    "Float8CurrentScaling": "common/recipe/__init__.py",
    "Float8BlockScaling": "common/recipe/__init__.py",
}
BASE = "pytorch/module/base.py"
Arguments = dict[str, str]
"""Names and defaults, as they are written; "" where there is none."""


@cache
def text_of(file: str) -> str:
    """One of the package's files."""
    return (folders("transformer_engine")[0] / file).read_text(encoding="utf-8")


def functions(tree: ast.AST) -> dict[str, Arguments]:
    """The arguments of everything that can be called at the top of a file: functions, classes, their methods."""
    found: dict[str, Arguments] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = arguments(node)
        elif isinstance(node, ast.ClassDef):
            methods = {f"{node.name}.{name}": args for name, args in functions(node).items()}
            fields = {
                each.target.id: ast.unparse(each.value) if each.value else ""
                for each in node.body
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            }
            found |= {node.name: methods.get(f"{node.name}.__init__", fields), **methods}
    return found


def arguments(node: ast.FunctionDef) -> Arguments:
    args = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    defaults = [""] * (len(args) - len(node.args.defaults)) + [ast.unparse(each) for each in node.args.defaults]
    of_keywords = {
        each.arg: ast.unparse(default) if default else ""
        for each, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }
    of_names = dict(zip(args, defaults, strict=True)) | of_keywords
    return {name: text for name, text in of_names.items() if name != "self"}


def strangers(ours: Arguments, theirs: Arguments) -> list[str]:
    """What of ours they do not take, or take with another default."""
    return [f"{name}={text}" for name, text in ours.items() if theirs.get(name, "nothing") != text]


OURS = functions(ast.parse(Path(standin.__file__).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", FILES)
def test_the_stand_in_takes_what_the_package_takes(name: str) -> None:
    theirs = functions(ast.parse(text_of(FILES[name])))
    assert not strangers(OURS[name], theirs[name]), theirs[name]
    if name == "Linear":
        theirs = functions(ast.parse(text_of(BASE))) | theirs
        base = {key.partition(".")[2]: args for key, args in theirs.items() if "Base" in key} | {
            key.partition(".")[2]: args for key, args in theirs.items() if key.startswith("Linear.")
        }
        for method in ("forward", "backward_dw", "init_fp8_metadata"):
            assert not strangers(OURS[f"Linear.{method}"], base[method]), method


def test_what_is_called_is_exported() -> None:
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(text_of("pytorch/__init__.py")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, file in FILES.items() if file.startswith("pytorch")} <= imported


def test_the_package_does_what_the_stand_in_does() -> None:
    """The lines that our layers rely on, beyond signatures."""
    linear = " ".join(text_of(FILES["Linear"]).split())
    replaces = r"fuse_wgrad_accumulation and not (ctx|bwd_args)\.is_first_microbatch"
    assert re.search(replaces, linear), "the first microbatch replaces"
    assert "weight.main_grad" in linear, "and is read in backward, where it is lent under ZeRO"
    assert '"grad_added_to_main_grad"' in linear, "without which no gradient is given to autograd"
    assert '"weight"' in linear and "register_parameter" in linear
    common = text_of("pytorch/module/_common.py")
    assert "queue.Queue()" in common, "what was put off is done in order"
    base = text_of(BASE)
    assert all(f'"{direction}"' in base for direction in DIRECTIONS) and "fp8_meta" in base
    state = ast.parse(text_of(FILES["autocast"]))
    (delayed,) = (n for n in ast.walk(state) if isinstance(n, ast.ClassDef) and n.name == "DelayedScalingRecipeState")
    names = {n.target.id for n in delayed.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(REMEMBERED) <= names


def test_drift_is_noticed() -> None:
    ours = functions(ast.parse("class A:\n def __init__(self, a, b=1, *, c=None): ...\n@d\nclass B:\n e: int = 2\n"))
    assert ours["A"] == {"a": "", "b": "1", "c": "None"} and ours["B"] == {"e": "2"}
    assert strangers(ours["A"], {"a": "", "b": "2", "c": "None"}) == ["b=1"]
    assert strangers(ours["B"], {"f": "2"}) == ["e=2"]

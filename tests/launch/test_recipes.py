"""Recipes: run files that are legal on their GPUs, fit into their memory, and are what the planner would still say."""

import re
from pathlib import Path

import pytest

import megacore.launch
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.validate import check
from megacore.cost.estimate import estimate
from megacore.cost.machine import find_machine
from megacore.exits import run
from megacore.tools.recipes import HEADROOM, MACHINE, RECIPES, name_of, planned, recipe

FOLDER = Path(megacore.launch.__path__[0]) / "recipes"
ALL = [(preset, world) for preset, worlds in RECIPES for world in worlds]


def test_all_are_there_and_no_other() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {name_of(*each) for each in ALL}


@pytest.mark.parametrize(("preset", "world"), ALL)
def test_a_recipe_is_legal_fits_and_says_that_it_is_derived(preset: str, world: int) -> None:
    path = FOLDER / f"{name_of(preset, world)}.toml"
    config = load(str(path))
    check(config, world)  # what training would refuse is refused here
    assert config.model == load(None, (), preset).model
    found = estimate(resolve(config, world), world, find_machine(MACHINE), headroom=HEADROOM)
    assert found.fits and found.worst.total <= (1 - HEADROOM) * 80e9
    text = path.read_text()
    assert "# derived: planned, not measured" in text
    told = re.search(r"([\d.]+) s a step", text)
    assert told and abs(float(told[1]) / found.step.seconds - 1) < 0.1, "the planner has changed: write recipes again"


@pytest.mark.parametrize("kind", ["k8s", "sky"])
def test_a_job_of_the_largest(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(FOLDER / "llama3-405b-1024xh100.toml")
    words = [kind, path, "--nodes", "128", "--image", "img", "--dry-run", "data.blend=/data/x", "out=/data/run"]
    assert run("megacore.launch.jobs", words) == 0
    assert "--nodes 128" in capsys.readouterr().out


def test_what_is_written_is_what_was_planned() -> None:
    text = recipe("llama3-8b", 8)
    best = planned("llama3-8b", 8)
    assert f"{best.step.seconds:.1f} s a step" in text and f"tp = {best.config.parallel.tp}" in text


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world"), ALL)
def test_the_planner_knows_nothing_much_better(preset: str, world: int) -> None:
    config = load(str(FOLDER / f"{name_of(preset, world)}.toml"))
    ours = estimate(resolve(config, world), world, find_machine(MACHINE), headroom=HEADROOM)
    assert planned(preset, world).tokens_per_s_per_gpu < 1.05 * ours.tokens_per_s_per_gpu

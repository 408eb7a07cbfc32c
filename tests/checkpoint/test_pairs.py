"""What any layout leaves, any other takes up: state bit for bit, and the steps that follow to 1e-9."""

import random
from itertools import permutations, product
from pathlib import Path

import pytest

from megacore.config.errors import ConfigError
from tests.checkpoint.common import Curve, config_of, digests, read_rank, world_of, write_rank
from tests.pool import WorkerPool

Layout = dict[str, int | str]

NUM, MORE = 3, 10
MODELS = {
    "tied, 2 kv heads, frozen block": (
        "model.tie_embeddings=true",
        "model.qk_norm=true",
        'optim.freeze=["layers.1.mlp.*", "final_norm.*"]',
    ),
    "gpt2, 1 kv head, frozen embedding": (
        "model.family=gpt2",
        "model.num_kv_heads=1",
        "model.dropout=0.1",
        'optim.freeze=["embedding.*"]',
        "optim.clip=adagc",
        "optim.adagc_warmup_steps=2",
    ),
}
ALONE: Layout = {"dp": 1}
SCHEDULES = (
    {"pp": 1},
    {"pp": 2, "schedule": "gpipe"},
    {"pp": 2, "schedule": "interleaved", "chunks": 2},
    {"pp": 2, "schedule": "zb-v"},
    {"pp": 2, "schedule": "dualpipe-v"},
    {"pp": 3, "schedule": "1f1b"},
    {"pp": 4, "schedule": "zb-h1"},
)


def legal_layouts() -> list[Layout]:
    """All of up to 8 ranks that a run of four layers can have, of some values of each axis."""
    found = []
    axes = product((1, 2, 4), (False, True), SCHEDULES, (1, 2, 4, 8), (0, 1, 2, 3), (0, 2))
    for tp, sequence, pipeline, dp, zero, shard in axes:
        layout: Layout = {"tp": tp, "sequence_parallel": str(sequence).lower(), **pipeline, "dp": dp, "zero": zero}
        if shard:
            layout["dp_shard"] = shard
        if world_of(layout) > 8 or (tp == 1 and sequence) or (zero and dp == 1) or (shard and not (zero and dp > 2)):
            continue
        try:
            config_of(MODELS["gpt2, 1 kv head, frozen embedding"], layout)
        except ConfigError:
            continue
        found.append(layout)
    return found


def chosen(num: int) -> list[Layout]:
    """One process, and others in which as many new pairs of values meet as can be, few ranks before many."""
    pool = legal_layouts()
    random.Random(1).shuffle(pool)
    taken, seen = [ALONE], set()
    while len(taken) < num:
        best = max(pool, key=lambda layout: len(_pairs(layout) - seen) / world_of(layout) ** 0.5)
        pool.remove(best)
        seen |= _pairs(best)
        taken.append(best)
    return taken


def _pairs(layout: Layout) -> set[tuple[object, ...]]:
    values = {"schedule": "1f1b", **layout, "world": world_of(layout)}
    return {(a, values[a], b, values[b]) for a in values for b in values if a < b}


class Pairs:
    """Checkpoints of one model by layout, each written once."""

    def __init__(self, pool: WorkerPool, folder: Path, words: tuple[str, ...]) -> None:
        self.pool, self.folder, self.words = pool, folder, words
        self.written: dict[str, tuple[str, Curve, dict[str, str]]] = {}

    def source(self, layout: Layout) -> tuple[str, Curve, dict[str, str]]:
        """(folder, the curve that followed, digests of the state)."""
        if str(layout) not in self.written:
            folder, world = str(self.folder / str(len(self.written))), world_of(layout)
            config = config_of(self.words, layout)
            results = self.pool.run(write_rank, world, world, config, folder, NUM, MORE, timeout_s=200)
            assert {tuple(problems) for _, problems in results} == {("", "")}
            self.written[str(layout)] = folder, results[0][0], digests(folder, NUM)
        return self.written[str(layout)]

    def hold(self, sources: list[Layout], target: Layout) -> None:
        """Each source's checkpoint, taken up by the target."""
        known = [self.source(layout) for layout in sources]
        world, config = world_of(target), config_of(self.words, target)
        args = (world, config, [folder for folder, _, _ in known], str(self.folder / "own"), NUM, MORE)
        ranks = self.pool.run(read_rank, world, *args, timeout_s=400)
        for number, (_, curve, expected) in enumerate(known):
            what = f"{sources[number]} -> {target}"
            assert ranks[0][number][1] == expected, what
            for ours, _, difference in (rank[number] for rank in ranks):
                assert difference < 1e-9, what
                for got, wanted in zip(ours, curve, strict=True):
                    assert got == pytest.approx(wanted, rel=1e-9), what


def test_the_layouts_are_many() -> None:
    layouts = chosen(21)
    assert len({str(layout) for layout in layouts}) == 21 and len(list(permutations(layouts, 2))) == 420
    assert {world_of(layout) for layout in layouts} >= {1, 2, 4, 6, 8}
    for key, values in {"tp": {1, 2, 4}, "dp": {1, 2, 4, 8}, "pp": {1, 2, 3, 4}, "zero": {0, 1, 2, 3}}.items():
        assert {layout.get(key, 1) for layout in layouts} >= values - {0}, key


QUICK = {
    "tied, 2 kv heads, frozen block": (
        [ALONE, {"tp": 2, "sequence_parallel": "true", "dp": 2, "zero": 2}, {"pp": 2, "schedule": "zb-v"}],
        [{"tp": 4, "dp": 1}, {"pp": 2, "dp": 2, "zero": 3}],
    ),
    "gpt2, 1 kv head, frozen embedding": (
        [ALONE, {"dp": 4, "zero": 3, "dp_shard": 2}],
        [{"tp": 2, "pp": 2}, {"pp": 2, "dp": 2, "zero": 1, "schedule": "interleaved", "chunks": 2}],
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_some_pairs(pool: WorkerPool, tmp_path: Path, model: str) -> None:
    pairs = Pairs(pool, tmp_path, MODELS[model])
    sources, targets = QUICK[model]
    for target in targets:
        pairs.hold(sources, target)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_420_pairs(pool: WorkerPool, tmp_path: Path) -> None:
    """Every second one of each model."""
    layouts = chosen(21)
    for turn, (name, words) in enumerate(MODELS.items()):
        pairs = Pairs(pool, tmp_path / name, words)
        for j, target in enumerate(layouts):
            pairs.hold([source for i, source in enumerate(layouts) if i != j and (i + j) % 2 == turn], target)

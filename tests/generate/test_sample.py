"""Continuing text: the same tokens in every layout, from the whole context and nothing else."""

import pytest
import torch

from megacore.generate.sample import choose, continue_tokens, next_logits
from megacore.kernels import counter
from megacore.model.inputs import Inputs
from megacore.train.step import Trainer
from tests.engine.common import built_rank, run_config
from tests.pool import WorkerPool

CONTEXT = 12  # learned positions end here, far below the padding
MODEL = (
    "model.num_layers=2",
    "model.hidden_size=12",
    "model.head_dim=4",
    "model.vocab_size=13",
    "model.init_std=0.5",
    "model.dropout=0.5",
    f"train.seq_len={CONTEXT}",
)
LEARNED = (*MODEL, "model.position=learned")
PROMPT = [3, 1, 4, 1, 5]


def model_of(rank: int, size: int, *overrides: str) -> Trainer:
    return built_rank(rank, size, run_config(size, *overrides)).trainer


def logits_alone(model: Trainer, tokens: list[int]) -> torch.Tensor:
    """Of a sequence without padding, by one process."""
    token_bs = torch.tensor([tokens])
    logits = model.logits(Inputs(token_bs, token_bs, torch.zeros(1, dtype=torch.long), training=False))
    assert logits is not None
    return logits


@pytest.mark.parametrize("overrides", [MODEL, LEARNED, (*MODEL, "model.position=alibi")])
def test_padding_and_dropout_do_not_show(overrides: tuple[str, ...]) -> None:
    model = model_of(0, 1, *overrides)
    for length in (1, 5, CONTEXT):
        tokens = (3 * PROMPT)[:length]
        got = next_logits(model, tokens)
        torch.testing.assert_close(got, logits_alone(model, tokens)[-1], rtol=1e-12, atol=1e-12)


def generate(rank: int, size: int, *overrides: str) -> list[int]:
    return continue_tokens(model_of(rank, size, *overrides), PROMPT, 8, CONTEXT, temperature=0.9, seed=5)


SEQUENCE = "parallel.sequence_parallel=true"
LAYOUTS = (
    ("parallel.tp=2",),
    ("parallel.tp=2", SEQUENCE),
    ("parallel.tp=4",),
    ("parallel.pp=2",),
    ("parallel.pp=2", "parallel.schedule=zb-v"),
    ("parallel.pp=2", "parallel.tp=2", SEQUENCE),
)


@pytest.mark.parametrize("overrides", [MODEL, LEARNED, (*MODEL, "model.tie_embeddings=true")])
def test_every_layout_says_the_same(pool: WorkerPool, overrides: tuple[str, ...]) -> None:
    alone = generate(0, 1, *overrides)
    assert len(alone) == 8
    assert len(set(alone)) > 2
    for layout in LAYOUTS:
        size = 4 if "parallel.tp=4" in layout or len(layout) > 2 else 2
        assert pool.run(generate, size, size, *overrides, *layout) == [alone] * size, layout


def test_three_ranks_cut_the_padded_tokens_evenly(pool: WorkerPool) -> None:
    model = (*MODEL, "model.num_heads=3", "model.num_kv_heads=3")
    assert pool.run(generate, 3, 3, *model, "parallel.tp=3", SEQUENCE) == 3 * [generate(0, 1, *model)]


def test_only_the_newest_tokens_that_fit_are_seen() -> None:
    model = model_of(0, 1, *LEARNED)
    long = [7] * 20 + PROMPT * 2
    (greedy,) = continue_tokens(model, long, 1, CONTEXT, temperature=0)
    assert greedy == int(logits_alone(model, long[-CONTEXT:])[-1].argmax())


def test_it_ends_behind_the_stop_token() -> None:
    model = model_of(0, 1, *MODEL)
    free = continue_tokens(model, PROMPT, 12, CONTEXT)
    stop = free[4]
    assert continue_tokens(model, PROMPT, 12, CONTEXT, stop=stop) == free[: free.index(stop) + 1]


def test_the_seed_decides() -> None:
    model = model_of(0, 1, *MODEL)
    texts = [tuple(continue_tokens(model, PROMPT, 12, CONTEXT, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        continue_tokens(model_of(0, 1, *MODEL), [], 1, CONTEXT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 1.0], dtype=torch.float64)
    key, tries = counter.key_of("test"), 3000
    drawn = torch.tensor([choose(logits, temperature, key, place) for place in range(tries)]).bincount(minlength=5)
    chance = (logits / temperature).softmax(-1)
    assert drawn[3] == 0
    assert ((drawn / tries - chance).abs() < 4.5 * (chance * (1 - chance) / tries).sqrt() + 1e-9).all()
    assert choose(logits, 0, key, 0) == 1


def test_rows_without_a_token_are_never_drawn() -> None:
    """A model's vocabulary may be padded beyond its tokenizer's."""
    model = model_of(0, 1, *MODEL)
    drawn = continue_tokens(model, PROMPT, 40, CONTEXT, temperature=5.0, num_choices=6)
    assert len(set(drawn)) > 2
    assert max(drawn) < 6

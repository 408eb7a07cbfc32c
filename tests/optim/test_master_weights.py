"""Weights in two halves are the float32 weights that they stand for, bit for bit; weights of bf16 alone learn, too."""

from dataclasses import replace

import pytest
import torch

from megacore.config.optimizers import defaults, optimizer_names
from megacore.kernels.halves import join, split
from megacore.layout import Layout
from megacore.optim.adam_steps import AdamSteps
from megacore.optim.formats import StateFormat
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from tests.optim.odd_cuts import grads_of, share_of

STEPS = 50
ONE = torch.ones(())


def in_halves(share: Share) -> Share:
    """The same weights, taken apart."""
    upper, lower = zip(*map(split, share.weights), strict=True)
    return replace(share, weights=upper, lower=lower, dtype=torch.bfloat16)


def made(name: str, share: Share) -> Rule:
    """Without kernels, which round otherwise than chunks do."""
    rule = make_rule(name, share, defaults(name))
    for part in (rule, getattr(rule, "rest", rule)):
        if isinstance(part, AdamSteps):
            part.kernel = None
    return rule


@pytest.mark.parametrize("name", optimizer_names())
def test_halves_are_the_master_weights(name: str) -> None:
    share = share_of(0, Layout(), torch.float32)
    halves = in_halves(share)
    rules = made(name, share), made(name, halves)
    for step in range(STEPS):
        taken = torch.tensor(float(step != 7))
        for rule in rules:
            grads = grads_of(share, step)
            rule.update(grads if step != 7 else [torch.zeros_like(grad) for grad in grads], 1e-2, taken)
        assert halves.lower is not None
        for weight, upper, lower in zip(share.weights, halves.weights, halves.lower, strict=True):
            assert torch.equal(join(upper, lower).view(torch.int32), weight.view(torch.int32))


def test_steps_below_half_a_last_bit_are_not_lost() -> None:
    """64 steps of 2^-10 from 1, under which bf16 numbers are 2^-8 apart: the nearest is 1 every time."""
    share = share_of(0, Layout(), torch.float32)
    share = replace(share, weight_decay=(0.0,) * len(share.runs))
    ones = tuple(torch.ones_like(weight, dtype=torch.bfloat16) for weight in share.weights)
    still = tuple(weight.clone() for weight in ones)
    none = replace(share, weights=ones, dtype=torch.bfloat16, format=StateFormat(stochastic_weights=True))
    nearest = replace(none, weights=still, format=StateFormat())
    for each in (none, nearest):
        rule = make_rule("sgd", each, defaults("sgd"))
        for _ in range(64):
            rule.update([torch.full_like(weight, 2.0**-10, dtype=torch.float32) for weight in each.weights], 1.0, ONE)
    assert all((weight == 1).all() for weight in still)
    everything = torch.cat([weight.float() for weight in ones])
    sizes = [weight.numel() * (1 - 2.0**-4 * scale) for weight, scale in zip(ones, share.lr_scale)]
    assert everything.mean().item() == pytest.approx(sum(sizes) / everything.numel(), abs=2e-3)

"""AdamW against torch's, SGD against its formula, and what a skipped step leaves behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megacore.config.schema import OptimConfig
from megacore.optim.adamw import AdamW
from megacore.optim.groups import Optimizer, decay_groups
from megacore.optim.sgd import SGD
from megacore.sharding.flat import FlatParameters
from megacore.spec import ParamSpec

SHAPES = {"embedding": (11, 6), "matrix": (7, 6), "nothing": (0, 6), "bias": (7,), "out": (5, 7), "norm": (6,)}
SPECS = {name: ParamSpec(name, shape, decay=name in ("matrix", "out")) for name, shape in SHAPES.items()}
NO_SKIP, SKIP = torch.zeros(()), torch.ones(())
STEPS = 50


def module_of(dtype: torch.dtype = torch.float64) -> nn.ParameterDict:
    torch.manual_seed(1)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()})


def gradients(step: int) -> dict[str, Tensor]:
    """Of very different sizes: some far below eps."""
    make = torch.Generator().manual_seed(step)
    names = enumerate(SHAPES.items())
    return {
        name: torch.randn(shape, generator=make, dtype=torch.float64) * 10.0 ** (-3 * i) for i, (name, shape) in names
    }


def rate(step: int) -> float:
    return 1e-2 * (1 + step % 7)


def train(optimizer: Callable[..., Optimizer], optim: OptimConfig) -> nn.ParameterDict:
    module = module_of()
    flat = FlatParameters.adopt([module])
    rule = optimizer(flat, SPECS, optim)
    for step in range(1, STEPS + 1):
        for name, grad in gradients(step).items():
            flat.grads.views()[name].copy_(grad)
        rule.step(rate(step), NO_SKIP)
    return module


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    optim = OptimConfig(weight_decay=weight_decay, beta1=0.8, beta2=0.95, eps=1e-8)
    ours, theirs = train(AdamW, optim), module_of()
    groups = [
        {"params": [theirs[name] for name in SHAPES if SPECS[name].decay], "weight_decay": weight_decay},
        {"params": [theirs[name] for name in SHAPES if not SPECS[name].decay], "weight_decay": 0.0},
    ]
    rule = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(1, STEPS + 1):
        for name, grad in gradients(step).items():
            theirs[name].grad = grad
        for group in rule.param_groups:
            group["lr"] = rate(step)
        rule.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_its_formula(momentum: float, weight_decay: float) -> None:
    ours = train(SGD, OptimConfig(name="sgd", momentum=momentum, weight_decay=weight_decay))
    weights = {name: param.detach() for name, param in module_of().items()}
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, STEPS + 1):
        for name, grad in gradients(step).items():
            velocity[name] = momentum * velocity[name] + grad
            kept = 1 - rate(step) * weight_decay if SPECS[name].decay else 1.0
            weights[name] = kept * weights[name] - rate(step) * velocity[name]
    for name in SHAPES:
        torch.testing.assert_close(ours[name].detach(), weights[name], rtol=1e-12, atol=1e-12, msg=name)


def state_of(rule: AdamW | SGD) -> dict[str, Tensor]:
    """Everything that the optimizer keeps, and the weights."""
    state = {"weights": rule.flat.params.data} if isinstance(rule, SGD) else {}
    if isinstance(rule, AdamW):
        state |= {"first": rule.first.data, "second": rule.second.data, "clock": rule.clock}
    elif rule.velocity is not None:
        state["velocity"] = rule.velocity
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("poison", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("make", "optim"),
    [
        (AdamW, OptimConfig()),
        (SGD, OptimConfig(name="sgd", momentum=0.9)),
        (SGD, OptimConfig(name="sgd")),
    ],
    ids=["adamw", "momentum", "sgd"],
)
def test_a_skipped_step_changes_not_a_bit(
    make: type[AdamW] | type[SGD], optim: OptimConfig, poison: float, dtype: torch.dtype
) -> None:
    flat = FlatParameters.adopt([module_of(dtype)])
    rule = make(flat, SPECS, optim)
    flat.grads.data.normal_()
    rule.step(1e-2, NO_SKIP)
    before, weights = state_of(rule), flat.params.data.clone()
    flat.grads.data.fill_(poison)
    rule.step(1e-2, SKIP)
    assert torch.equal(flat.params.data, weights)
    for name, tensor in state_of(rule).items():
        assert torch.equal(tensor, before[name]), name
    flat.grads.data.fill_(1.0)
    rule.step(1e-2, NO_SKIP)
    assert not torch.equal(flat.params.data, weights)
    assert flat.params.data.isfinite().all()


def test_skipped_steps_do_not_age_the_bias_correction() -> None:
    """A step after a skipped one is the step that would have come instead."""
    results = []
    for skips in (0, 3):
        flat = FlatParameters.adopt([module_of()])
        rule = AdamW(flat, SPECS, OptimConfig())
        flat.grads.data.fill_(0.5)
        for _ in range(skips):
            rule.step(1e-2, SKIP)
        rule.step(1e-2, NO_SKIP)
        rule.step(1e-2, NO_SKIP)
        results.append(flat.params.data.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_gaps_between_slots_stay_zero(make: type[AdamW] | type[SGD]) -> None:
    flat = FlatParameters.adopt([module_of()])
    rule = make(flat, SPECS, OptimConfig(name="adamw" if make is AdamW else "sgd"))
    for view in flat.grads.views().values():
        view.fill_(1.0)
    rule.step(1e-2, NO_SKIP)
    for view in flat.params.views().values():
        view.zero_()
    assert not flat.params.data.any()


def test_groups_leave_out_what_is_empty() -> None:
    flat = FlatParameters.adopt([module_of()])
    groups = {group.weight_decay: set(group.names) for group in decay_groups(flat, SPECS, 0.1)}
    assert groups == {0.1: {"matrix", "out"}, 0.0: {"embedding", "bias", "norm"}}
    (only,) = decay_groups(flat, SPECS, 0.0)
    assert set(only.names) == set(SHAPES) - {"nothing"}

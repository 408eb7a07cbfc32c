"""Every optimizer that there is: what all must keep, and element-wise ones against their papers' formulas."""

from types import MappingProxyType

import pytest
import torch

from megacore.config import optimizers
from megacore.config.optimizers import defaults, kept, optimizer_names, state
from megacore.config.schema import OptimConfig
from megacore.optim import rules
from megacore.optim.elementwise import ElementWise
from megacore.optim.formats import StateFormat
from megacore.optim.rule import Share
from megacore.optim.rules import make_rule
from megacore.spec.memory import optimizer_bytes
from tests.optim.pretend import (
    AUTO,
    DECAY,
    SCALES,
    SPECS,
    STEPS,
    TAKEN,
    bits,
    first_weight,
    gradient,
    grads_of,
    make_share,
    put_together,
    random_cuts,
    rate,
    rule_of,
    run_steps,
    whole,
)
from tests.optim.references import REFERENCES

NAMES = optimizer_names()
ELEMENTWISE = tuple(name for name in NAMES if isinstance(rule_of(name, make_share(whole())), ElementWise))
VARIANTS = (
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": 1.0}),
    *((name, {}) for name in ELEMENTWISE if name != "sgd"),
)
VARIANT_IDS = ["-".join([name, *given]) for name, given in VARIANTS]
FORMATS = (AUTO, *(StateFormat(kind) for kind in ("fp32", "bf16", "int8")), StateFormat("bf16", True, 3))


def test_every_element_wise_rule_has_a_reference() -> None:
    assert set(ELEMENTWISE) == REFERENCES.keys()


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_element_wise_rules_are_their_formulas_however_they_are_cut(name: str, given: dict, num_shards: int) -> None:
    shares = [make_share(cut) for cut in random_cuts(num_shards, seed=num_shards)]
    for share in shares:
        run_steps(rule_of(name, share, **given))
    found = put_together(shares)
    for spec in SPECS:
        rates = [rate(step) * SCALES.get(spec.name, 1.0) for step in range(1, STEPS + 1)]
        grads = [gradient(spec, step) for step in range(1, STEPS + 1)]
        decay = DECAY if spec.decay else 0.0
        expected = REFERENCES[name](first_weight(spec), grads, rates, decay, {**defaults(name), **given})
        torch.testing.assert_close(found[spec.name], expected.view(-1), rtol=1e-12, atol=1e-12, msg=spec.name)


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=VARIANT_IDS)
def test_single_precision_follows(name: str, given: dict) -> None:
    single, double = (make_share(whole(), dtype) for dtype in (torch.float32, torch.float64))
    for share in (single, double):
        run_steps(rule_of(name, share, **given))
    for ours, exact in zip(single.weights, double.weights):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_they_are_torchs_own(name: str, in_chunks: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels where there are any, and in chunks."""
    # torch's SGD adds weight decay to the gradient
    share = make_share(whole(), dtype, decay=0.0 if name == "sgd" else DECAY)
    rule = rule_of(name, share, **({"momentum": 0.9, "nesterov": 1.0} if name == "sgd" else {}))
    if in_chunks:
        monkeypatch.setattr(type(rule), "update", ElementWise.update)
    run_steps(rule)
    theirs = theirs_of(name, share)
    for step in range(1, STEPS + 1):
        for spec, group in zip(share.specs, theirs.param_groups):
            group["params"][0].grad = gradient(spec, step).to(dtype)
            group["lr"] = rate(step) * SCALES.get(spec.name, 1.0)
        theirs.step()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for spec, ours, group in zip(share.specs, share.weights, theirs.param_groups):
        expected = group["params"][0].detach().view(-1)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=spec.name)


def theirs_of(name: str, share: Share) -> torch.optim.Optimizer:
    """torch's optimizer with a group for every parameter of the share."""
    groups = [
        {"params": [torch.nn.Parameter(first_weight(spec).to(share.dtype))], "weight_decay": decay}
        for spec, decay in zip(share.specs, share.weight_decay)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    own = defaults(name)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, betas=(own["beta1"], own["beta2"]), eps=own["eps"], foreach=False, fused=False)


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=VARIANT_IDS)
def test_chunks_meet_without_seams(name: str, given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [make_share(whole()) for _ in range(2)]
    for share, size in zip(shares, (64, 1 << 16)):
        rule = rule_of(name, share, **given)
        assert isinstance(rule, ElementWise)
        rule.chunk = size
        monkeypatch.setattr(type(rule), "update", ElementWise.update)
        run_steps(rule, range(1, 6))
    for a, b in zip(*(share.weights for share in shares)):
        assert torch.equal(a, b)


def formats_of(name: str) -> tuple[StateFormat, ...]:
    return FORMATS if {"moment", "square"} & set(kept(state(name), lively(name)).values()) else FORMATS[:1]


def lively(name: str) -> dict[str, float]:
    """Settings with which the rule keeps all the state that it has."""
    conditions = [kind.partition(" if ")[2] for kind in state(name).values()]
    return {**defaults(name), **{each: defaults(name)[each] or 0.9 for each in conditions if each}}


IN_FORMATS = [(name, each) for name in NAMES for each in formats_of(name)]
FORMAT_IDS = [f"{name}-{each.kind}{'-stochastic' if each.stochastic else ''}" for name, each in IN_FORMATS]


@pytest.mark.parametrize(("name", "state"), IN_FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_not_taken_changes_not_a_bit(
    name: str, state: StateFormat, dtype: torch.dtype, before: int
) -> None:
    ours, undisturbed = (make_rule(name, make_share(whole(), dtype, state), lively(name)) for _ in range(2))
    for rule in (ours, undisturbed):
        rule.share.weights[0][:3] = torch.tensor([-0.0, 0.0, 1e-40])
        run_steps(rule, range(1, 1 + before))
    kept_bits = bits(ours)
    for _ in range(3):
        zeros = [torch.zeros_like(weight) for weight in ours.share.weights]
        ours.update(zeros, 0.1, torch.zeros(()))
        now = bits(ours)
        assert now.keys() == kept_bits.keys()
        for what, tensor in now.items():
            assert torch.equal(tensor, kept_bits[what]), what
    for rule in (ours, undisturbed):
        run_steps(rule, range(1 + before, 4 + before))
    now, expected = bits(ours), bits(undisturbed)
    assert any(not torch.equal(now[what], kept_bits[what]) for what in now)
    for what, tensor in now.items():
        assert torch.equal(tensor, expected[what]), what


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_may_hold_nothing(name: str, dtype: torch.dtype) -> None:
    share = make_share([(0, 0)] * len(SPECS), dtype)
    assert not share.runs
    rule = rule_of(name, share)
    rule.update([], 0.1, TAKEN)
    assert sum(tensor.numel() for tensors in rule.state().values() for tensor in tensors) == 0


@pytest.mark.parametrize("name", NAMES)
def test_scales_multiply_the_learning_rate(name: str) -> None:
    scaled = make_share(whole(), scales={spec.name: 0.25 for spec in SPECS})
    plain = make_share(whole(), scales={})
    ours, expected = rule_of(name, scaled), rule_of(name, plain)
    for step in range(1, 6):
        ours.update(grads_of(scaled, step), 4 * rate(step), TAKEN)
        expected.update(grads_of(plain, step), rate(step), TAKEN)
    for a, b in zip(scaled.weights, plain.weights):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_zero_freezes_its_runs_alone(name: str) -> None:
    share = make_share(whole(), scales={"fused": 0.0, "norm": 0.0})
    before = [weight.clone() for weight in share.weights]
    run_steps(rule_of(name, share), range(1, 4))
    for spec, a, b in zip(share.specs, share.weights, before):
        assert torch.equal(a, b) == (spec.name in ("fused", "norm")), spec.name


@pytest.mark.parametrize("name", NAMES)
def test_only_what_decays_decays(name: str) -> None:
    """Without gradients the exempt stand still and the others shrink, by lr * decay where that is decoupled."""
    share = make_share(whole(), scales={})
    before = [weight.clone() for weight in share.weights]
    rule = rule_of(name, share)
    rule.update([torch.zeros_like(weight) for weight in share.weights], 1e-3, TAKEN)
    for spec, now, old in zip(share.specs, share.weights, before):
        if not spec.decay:
            torch.testing.assert_close(now, old, rtol=1e-12, atol=0, msg=spec.name)
        elif name == "adam":  # the decay is all of its gradient, and its first step has the size of the rate
            torch.testing.assert_close(now, old - 1e-3 * old.sign(), rtol=0, atol=1e-5, msg=spec.name)
        else:
            torch.testing.assert_close(now, old * (1 - 1e-3 * DECAY), rtol=1e-12, atol=1e-14, msg=spec.name)


@pytest.mark.parametrize(("name", "state"), IN_FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_takes_the_bytes_that_are_foretold(name: str, state: StateFormat, dtype: torch.dtype) -> None:
    share = make_share(whole(), dtype, state)
    settings = lively(name)
    rule = make_rule(name, share, settings)
    held = sum(tensor.numel() * tensor.element_size() for tensors in rule.state().values() for tensor in tensors)
    momentum = settings["momentum"] if "momentum" in settings else -1.0
    optim = OptimConfig(name=name, state_dtype=state.kind, momentum=momentum)
    words = {torch.float64: "fp64", torch.float32: "fp32"}
    assert held == sum(optimizer_bytes(optim, words[dtype], spec, spec.numel) for spec in share.specs)


def test_an_optimizer_is_one_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (optimizers.RULES / "lion.py").read_text(encoding="utf-8").replace("class Lion(", "class Tiger(")
    (tmp_path / "snow_tiger.py").write_text(text.replace('"beta1": 0.9', '"beta1": 0.8'), encoding="utf-8")
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    monkeypatch.setattr(optimizers, "RULES", tmp_path)
    assert optimizers.optimizer_names.__wrapped__() == ("snow-tiger",)
    own = optimizers.defaults("snow-tiger")
    assert own == {**defaults("lion"), "beta1": 0.8}
    rule = make_rule("snow-tiger", make_share(whole()), own)
    assert type(rule).__name__ == "Tiger"
    assert isinstance(own, MappingProxyType)

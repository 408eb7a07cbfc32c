"""Rules: each broken rule says what, value, rule and fix; legal runs pass; what is not built is refused by name."""

from dataclasses import replace

import pytest

from megacore.config.bounds import BOUNDS
from megacore.config.errors import ConfigError
from megacore.config.load import all_keys, load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve
from megacore.config.supported import WORKS, unsupported
from megacore.config.validate import check, validate
from megacore.config.write import flatten

# Broken rules of llama3-8b (32 layers, 32 heads, 8 kv heads, hidden 4096, seq_len 8192), and what is said.
BROKEN = [
    (["parallel.tp=3"], 3, "parallel.tp=3 does not divide model.num_heads=32; use 2 or 4"),
    (["parallel.tp=3"], 3, "parallel.tp=3 neither divides model.num_kv_heads=8 nor is a multiple of it; use 2 or 4"),
    (["parallel.tp=4", "model.ffn_hidden_size=130"], 4, "does not divide model.ffn_hidden_size=130; use 2 or 5"),
    (["parallel.tp=2"], 3, "parallel.tp*pp*cp=2*1*1=2 does not divide the 3 ranks; start 2 or 4 ranks"),
    (["parallel.tp=8"], 4, "start 8 ranks"),
    (
        ["parallel.tp=16", "optim.state_dtype=int8", "model.qkv_bias=true", "model.head_dim=96"],
        16,
        "whose 96 values in its bias are no multiple of 64",
    ),
    (
        ["parallel.tp=16", "optim.state_dtype=int8", "model.hidden_size=4100", "model.head_dim=24"],
        16,
        "use parallel.tp=8 or less, or optim.state_dtype=bf16",
    ),
    (["parallel.dp=4", "train.global_batch_size=4"], 2, "leave dp out to derive 2, or start 4 ranks"),
    (["parallel.tp=2", "parallel.sequence_parallel=true", "train.seq_len=33"], 2, "use train.seq_len=32 or 34"),
    (["parallel.regather_inputs=true"], 1, "needs parallel.sequence_parallel=true"),
    (["parallel.order=tp-pp-cp-dp"], 1, "must begin with pp"),
    (
        ["parallel.pp=64"],
        64,
        "64 stages, too many for model.num_layers=32 with an embedding and a head; use at most 34",
    ),
    (
        ["parallel.pp=2", "parallel.stage_layers=3,4"],
        2,
        "it must have 2 (parallel.pp*chunks) that sum to model.num_layers=32",
    ),
    (["parallel.pp=4", "parallel.stage_layers=16,0,8,8"], 4, "leaves a stage empty"),
    (["parallel.pp=4", "parallel.stage_layers=16,8,8"], 4, "has 3 counts that sum to 32; it must have 4"),
    (
        ["parallel.pp=2", "parallel.schedule=zb-v", "parallel.stage_layers=16,16"],
        2,
        "it must have 4 (parallel.pp*chunks)",
    ),
    (
        ["parallel.pp=2", "parallel.schedule=zb-v", "parallel.chunks=3"],
        2,
        "whose ranks hold 2 stages each; leave it out",
    ),
    (["parallel.pp=2", "parallel.schedule=dualpipe-v", "parallel.chunks=1"], 2, "parallel.chunks=1 does not go with"),
    (["parallel.schedule=lists/mine.txt"], 1, "parallel.schedule=lists/mine.txt is no file"),
    (
        ["parallel.schedule=mine.txt", "train.batch_ramp=1,1,10", "train.global_batch_size=2"],
        1,
        "train.batch_ramp=[1, 1, 10] changes the number of microbatches",
    ),
    (
        ["model.rotary_fraction=0.26"],
        1,
        "turns 33 of model.head_dim=128 dims, but model.position=rope turns pairs; use 0.25",
    ),
    (["model.rotary_fraction=0.001"], 1, "turns 0 of model.head_dim=128 dims"),
    (["model.rotary_fraction=0.5", "model.position=alibi"], 1, "model.rotary_fraction=0.5 needs model.position=rope"),
    (["model.norm_unit_offset=true", "model.norm=layernorm"], 1, "is for model.norm=rmsnorm, not layernorm"),
    (["model.qk_norm_over=all"], 1, "model.qk_norm_over=all needs model.qk_norm=true"),
    (["model.rope_scaling.long_factor=[2]"], 1, "model.rope_scaling.long_factor is for type=longrope, not none"),
    (
        ["model.rope_scaling.type=longrope", "model.rope_scaling.short_factor=[1.0,1.0]", "model.rotary_fraction=0.5"],
        1,
        "model.rope_scaling.short_factor has 2 numbers; type=longrope needs 32",
    ),
    (
        ["model.rope_scaling.type=longrope"],
        1,
        "model.rope_scaling.original_seq_len is missing, which type=longrope needs",
    ),
    (
        ["model.rope_scaling.type=longrope", "model.head_dim=4", "model.rope_scaling.long_factor=[1.0,-1.0]"],
        1,
        "model.rope_scaling.long_factor holds -1.0; all of its numbers must be more than 0",
    ),
    (
        ["model.rope_scaling.type=longrope", "model.rope_scaling.original_seq_len=1"],
        1,
        "model.rope_scaling.original_seq_len=1 is too short",
    ),
    (
        ["model.logit_softcap=30", "train.label_smoothing=0.1", "precision.dtype=fp16"],
        1,
        "train.label_smoothing=0.1 with model.logit_softcap=30.0 needs numbers down to e^-60, which "
        "precision.dtype=fp16 has not; use model.logit_softcap=4 or less, bf16, or no smoothing",
    ),
    (
        ["model.logit_softcap=50", "train.label_smoothing=0.1"],
        1,
        "precision.dtype=fp32 has not; use model.logit_softcap=43 or less, or no smoothing",
    ),
    (["log.timeline_step=101"], 1, "log.timeline_step=101 comes after the last step, train.steps=100; use at most 100"),
    (
        ["log.timeline_step=3", "parallel.zero=2", "train.global_batch_size=4"],
        2,
        "log.timeline_step=3 times stages, but parallel.zero=2 walks them unit by unit; use parallel.zero=1",
    ),
    (
        ["parallel.dp=4", "parallel.dp_shard=3", "parallel.zero=1", "train.global_batch_size=4"],
        4,
        "parallel.dp_shard=3 does not divide parallel.dp=4; use 2 or 4",
    ),
    (["parallel.dp_shard=4", "train.global_batch_size=6"], 6, "does not divide parallel.dp=6; use 3 or 6"),
    (["model.num_heads=33"], 1, "does not divide model.hidden_size=4096; use 32 or 64, or give model.head_dim"),
    (["model.num_kv_heads=5"], 1, "model.num_kv_heads=5 does not divide model.num_heads=32; use 4 or 8"),
    (["model.head_dim=63"], 1, "model.head_dim=63 is odd"),
    (["model.position=learned", "model.max_positions=100"], 1, "exceeds model.max_positions=100; use at most 100"),
    (["model.top_k=2"], 1, "model.top_k=2 exceeds model.num_experts=0"),
    (["model.num_experts=8"], 1, "model.top_k=0 sends tokens to none of model.num_experts=8"),
    (["model.num_shared_experts=1"], 1, "model.num_shared_experts=1 is for a mixture of experts"),
    (["model.moe_every=2"], 1, "model.moe_every=2 is for a mixture of experts"),
    (["parallel.ep=2"], 2, "parallel.ep=2 is for a mixture of experts"),
    (["model.num_experts=8", "model.top_k=2", "parallel.ep=3"], 3, "ep=3 does not divide model.num_experts=8; use 2"),
    (["model.num_experts=8", "model.top_k=2", "parallel.ep=4"], 2, "parallel.ep*etp=4*1=4 does not divide dp*cp*tp=2"),
    (["model.num_experts=8", "model.top_k=2", "parallel.etp=3"], 3, "parallel.etp=3 does not divide model.moe_ffn"),
    (["model.num_experts=8", "model.top_k=2", "model.num_dense_layers=32"], 1, "leave no MoE layer"),
    (["model.num_experts=8", "model.top_k=2", "model.shared_ffn_hidden_size=9"], 1, "needs model.num_shared_experts"),
    (["model.q_lora_rank=64"], 1, "model.q_lora_rank=64 is for latent attention, but model.kv_lora_rank=0"),
    (["model.kv_lora_rank=512"], 1, "model.num_kv_heads=8 does not go with latent attention"),
    (["model.kv_lora_rank=512", "model.head_dim=128"], 1, "is not qk_nope_head_dim + qk_rope_head_dim=192"),
    (["model.kv_lora_rank=512", "model.num_kv_heads=0", "model.qk_norm=true"], 1, "without qk_norm and qkv_bias"),
    (["model.rope_scaling.type=yarn"], 1, "original_seq_len is missing, which type=yarn needs"),
    (["model.rope_scaling.type=linear", "model.position=alibi"], 1, "needs model.position=rope, not alibi"),
    (
        ["model.rope_scaling={type='llama3', original_seq_len=8192, low_freq_factor=4.0}"],
        1,
        "low_freq_factor=4.0 is not below high_freq_factor=4.0",
    ),
    (
        ["model.rope_scaling={type='yarn', original_seq_len=8192, beta_slow=40}"],
        1,
        "beta_slow=40.0 is not below beta_fast=32.0",
    ),
    (
        ["train.global_batch_size=6", "train.micro_batch_size=2"],
        2,
        "is not a multiple of train.micro_batch_size*dp=2*2=4",
    ),
    (["train.global_batch_size=2", "train.micro_batch_size=2"], 2, "use 4"),
    (["train.global_batch_size=8", "train.batch_ramp=2,4,10"], 1, "the size must be 2 + n*4"),
    (["train.global_batch_size=8", "train.batch_ramp=3,1,10"], 2, "has a start of 3, not a multiple of"),
    (["train.global_batch_size=8", "train.batch_ramp=2,3,10"], 2, "has an increment of 3"),
    (["train.batch_ramp=1,2"], 1, "must be three positive numbers"),
    (["optim.warmup_steps=20", "optim.decay_steps=10"], 1, "exceeds optim.decay_steps=10"),
    (
        ["optim.lr_schedule=wsd", "optim.warmup_steps=60", "optim.wsd_decay_steps=60"],
        1,
        "do not fit into 100 steps; use at most 40",
    ),
    (["log.sample_every=5"], 1, "log.sample_every=5 has no prompts to continue"),
    (["log.sample_prompts=Once"], 1, "log.sample_prompts=['Once'] would never be continued"),
    (["log.sample_prompts=['Once', '']", "log.sample_every=5"], 1, "has an empty prompt"),
    (["model.rope_scaling={type='ntk', factor=2}", "model.head_dim=2"], 1, "only pair of model.head_dim=2"),
    (
        ["model.rope_scaling={type='yarn', factor=2, original_seq_len=64}", "model.rope_theta=1"],
        1,
        "model.rope_theta=1.0 must be more than 1",
    ),
    (["optim.min_lr=1"], 1, "optim.min_lr=1.0 exceeds optim.lr=0.0003"),
    (
        ["optim.offload=cpu", "precision.dtype=bf16", "precision.master=split"],
        1,
        "but optim.offload=cpu updates copies in host memory, whole; use precision.master=fp32",
    ),
    (["optim.offload=nvme", "precision.master=split", "train.device=cuda"], 1, "but optim.offload=nvme updates copies"),
    (["optim.offload_folder=/nvme"], 1, 'optim.offload_folder="/nvme" is for optim.offload=nvme, not none'),
    (["optim.momentum=0.9"], 1, "not known to adamw, which has beta1, beta2, eps, weight_decay; leave it out"),
    (["data.split=0,1,1"], 1, "must be one to three shares"),
    (["data.split=1,1,1,1"], 1, "must be one to three shares"),
    (["data.blend=[[-1, 'a']]"], 1, "data.blend has the weights [-1.0]"),
    (["data.blend=[[0, 'a'], [0, 'b']]"], 1, "one of them more"),
    (["data.blend=[[1, '']]"], 1, "data.blend has an empty prefix"),
    (["data.split=1,0,0", "train.eval_every=5"], 1, "needs validation data"),
    (["data.split=1", "train.eval_every=5"], 1, "needs validation data"),
    (["data.fim_rate=0.5", "data.fim_tokens=a"], 1, "must name the prefix, middle and suffix tokens"),
    (
        ["precision.fp8=current", "precision.dtype=fp16"],
        1,
        "precision.fp8=current goes with bf16 or fp32; precision.dtype=fp16 scales the loss for a format that FP8 does "
        "not need: use bf16",
    ),
    (["precision.fp8=block", "precision.dtype=fp64"], 1, "precision.dtype=fp64 is more exact than FP8: use bf16"),
    (
        ["precision.fp8=current", "precision.fp8_skip_first=30", "precision.fp8_skip_last=2"],
        1,
        "fp8_skip_first=30 and fp8_skip_last=2 leave none of model.num_layers=32",
    ),
    (["precision.fp8_skip_last=2"], 1, "precision.fp8_skip_last=2 is for a precision.fp8, not fp8=off"),
    (
        ["precision.fp8=block", "precision.fp8_history=2"],
        1,
        "fp8_history=2 is for precision.fp8=delayed, not fp8=block",
    ),
    (["precision.fp8=current", "precision.fp8_margin=1"], 1, "fp8_margin=1 is for precision.fp8=delayed"),
    (
        ["precision.fp8=current", "train.seq_len=24"],
        1,
        "precision.fp8=current multiplies matrices whose sizes are multiples of 16, which train.micro_batch_size*"
        "seq_len=1*24=24 tokens are not; change train.seq_len, or use fp8=off",
    ),
    (
        ["precision.fp8=current", "parallel.tp=4", "model.ffn_hidden_size=14368"],
        4,
        "model.ffn_hidden_size/parallel.tp=14368/4=3592 (and twice as many) is not; change ffn_hidden_size=14336 or "
        "14400, or use fp8=off",
    ),
    (
        ["precision.fp8=block", "model.head_dim=20", "parallel.tp=8"],
        8,
        "queries, keys and values of a rank, (4+2*1)*model.head_dim=20: 120 rows, are not",
    ),
    (
        ["precision.fp8=block", "model.head_dim=18", "parallel.tp=8"],
        8,
        "a rank's heads, 4*model.head_dim=18: 72 columns",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), BROKEN)
def test_a_broken_rule_is_told_with_its_fix(overrides, world_size, message):
    config = load(None, overrides, "llama3-8b")
    assert message in "\n".join(validate(config, world_size))
    with pytest.raises(ConfigError, match="."):
        check(config, world_size)


@pytest.mark.parametrize("key", BOUNDS)
def test_every_bound_is_checked(key):
    bound = BOUNDS[key]
    for value in (bound.low - 2, bound.low if bound.low_open else None, bound.high if bound.high_open else None):
        if value is not None:
            lines = validate(load(None, [f"{key}={value}"], "demo"), 1)
            assert any(line.startswith(f"{key}={value}") and "out of range" in line for line in lines), (value, lines)


def test_every_number_has_a_bound():
    numbers = {key for key, value in flatten(load(None, [], "demo")).items() if type(value) in (int, float)}
    assert numbers <= BOUNDS.keys()


def test_missing_shape_is_told():
    assert [line.split(" ")[0] for line in validate(load(None), 1)] == [
        "model.num_layers",
        "model.hidden_size",
        "model.num_heads",
    ]


def test_rules_of_all_sections_are_told_at_once():
    overrides = ["parallel.tp=3", "optim.lr=-1", "data.split=0,2", "train.batch_ramp=1", "model.top_k=2"]
    with pytest.raises(ConfigError) as raised:
        check(load(None, overrides, "llama3-8b"), 3)
    told = str(raised.value)
    for words in ("parallel.tp=3", "optim.lr=-1.0", "data.split", "train.batch_ramp", "model.top_k=2"):
        assert words in told


LEGAL = [
    ([], 1),
    (["parallel.dp=4", "parallel.dp_shard=2", "parallel.zero=3"], 4),
    (["parallel.dp=4", "parallel.dp_shard=2"], 4),  # idle with parallel.zero=0
    (["parallel.tp=16"], 16),  # twice as many ranks as kv heads
    (["parallel.tp=2", "parallel.sequence_parallel=true", "model.vocab_size=1003", "model.num_layers=3"], 2),
    (["parallel.sequence_parallel=true"], 1),  # inactive
    (["parallel.pp=34"], 34),  # the embedding and the head may have a stage of their own
    (["parallel.pp=2", "parallel.chunks=3", "parallel.schedule=interleaved", "train.global_batch_size=5"], 2),
    (["parallel.pp=2", "parallel.chunks=2", "parallel.stage_layers=0,16,16,0"], 2),
    (["parallel.pp=2", "parallel.schedule=zb-v", "parallel.recompute=selective"], 2),
    (["parallel.pp=2", "parallel.schedule=dualpipe-v", "parallel.chunks=2", "train.batch_ramp=2,2,10"], 2),
    (["log.timeline_step=100"], 1),
    (["model.vocab_size=3", "parallel.tp=4"], 4),  # a rank without rows
    (["model.hidden_size=100", "model.head_dim=32"], 1),  # heads * head_dim need not be hidden_size
    (["train.global_batch_size=8", "train.batch_ramp=2,2,10"], 2),
    (["data.split=0.9,0.1", "train.eval_every=5"], 1),
    (["data.split=1"], 1),
    (["optim.lr=0", "optim.min_lr=0"], 1),
    (["optim.warmup_steps=100"], 1),
    (["optim.warmup_steps=200"], 1),  # cut short inside its warm-up
    (["optim.warmup_steps=95", "optim.lr_schedule=wsd"], 1),
    (["optim.warmup_steps=100", "optim.lr_schedule=wsd"], 1),
    (["model.rope_scaling={type='ntk', factor=2}", "model.head_dim=4"], 1),
    (["optim.offload=cpu", "train.device=cpu", "precision.dtype=bf16", "precision.master=none"], 1),
    (["optim.offload=nvme", "train.device=cpu", "precision.dtype=bf16", "precision.master=split"], 1),
    (["parallel.recompute=offload", "parallel.zero=3"], 1),
    (["precision.fp8=delayed", "precision.dtype=bf16", "precision.fp8_margin=2", "parallel.tp=16"], 16),
    (["precision.fp8=block", "precision.fp8_skip_first=1", "precision.fp8_skip_last=30"], 1),
    (["precision.dtype=fp64", "optim.name=sgd", "optim.momentum=0.9", "optim.clip_grad=0"], 1),
]


@pytest.mark.parametrize(("overrides", "world_size"), LEGAL)
def test_legal_runs_pass_resolved_or_not(overrides, world_size):
    config = load(None, ["train.global_batch_size=4", *overrides], "llama3-8b")
    check(config, world_size)
    check(resolve(config, world_size), world_size)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_legal(name):
    config = load(None, [], name)
    assert not validate(config, 1)
    assert resolve(resolve(config, 1), 1) == resolve(config, 1)


def test_derived_values():
    shape = ["model.num_layers=2", "model.hidden_size=256", "model.num_heads=8", "parallel.tp=2"]
    run = resolve(load(None, [*shape, "train.seq_len=64", "train.steps=50"]), 8)
    assert (run.model.ffn_hidden_size, run.model.num_kv_heads, run.model.head_dim) == (704, 8, 32)
    assert run.model.max_positions == 64
    assert (run.parallel.dp, run.parallel.dp_shard, run.parallel.etp) == (4, 4, 2)
    assert (run.optim.decay_steps, run.optim.wsd_decay_steps) == (50, 5)
    ungated = resolve(load(None, [*shape, "model.activation=gelu"]), 2)
    assert ungated.model.ffn_hidden_size == 1024
    yarn = resolve(load(None, [*shape, "model.rope_scaling={type='yarn', factor=4, original_seq_len=64}"]), 2)
    assert yarn.model.rope_scaling.attention_factor == pytest.approx(1.1386294361)


# One value for each key of the table that does not work yet.
REFUSED = {
    "model.num_experts": 8,
    "model.top_k": 2,
    "model.kv_lora_rank": 512,
    "parallel.cp": 2,
    "parallel.ep": 2,
}


def test_the_table_of_what_works_speaks_of_existing_keys():
    assert WORKS.keys() <= all_keys().keys()


@pytest.mark.parametrize("key", WORKS)
def test_what_is_not_built_is_refused(key):
    config = load(None, [], "demo")
    section, _, name = key.partition(".")
    config = replace(config, **{section: replace(getattr(config, section), **{name: REFUSED[key]})})
    assert any(line.startswith(f"{key}=") and "not supported yet" in line for line in unsupported(config))


def test_other_factorings_are_refused():
    config = load(None, ["parallel.tp=2", "parallel.dp=4", "parallel.dp_shard=2", "parallel.etp=1"], "demo")
    assert [line.split("=")[0] for line in unsupported(config)] == ["parallel.etp"]
    assert not list(unsupported(resolve(load(None, ["parallel.tp=2"], "demo"), 8)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zbv", "nor a .txt file; did you mean zb-v?"),
        ("1f1d", "did you mean 1f1b?"),
        ("lists/mine.json", "is not one of gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, dualpipe-v, nor a .txt file"),
    ],
)
def test_a_schedule_is_a_kind_or_a_text_file(value, message):
    with pytest.raises(ConfigError) as raised:
        load(None, [f"parallel.schedule={value}"], "demo")
    assert message in str(raised.value)


def test_a_schedule_of_ones_own_is_taken(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("0: F0.0 B0.0", encoding="utf-8")
    config = load(None, [f"parallel.schedule={path}"], "demo")
    check(config, 1)
    assert resolve(config, 1).parallel.chunks == 1

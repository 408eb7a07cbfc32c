"""The run as data: a frozen tree of sections, each key with its default, its meaning and its choices.

This file says *what can be written* in a run file and nothing else: `load.py` reads it, `families.py` fills
what a model family implies, `validate.py` checks the whole. Every default is stated here, once.
A number 0 (or an empty string or list) means "derived": `resolve.py` replaces it by the value it stands for
before anything else sees the tree, so the rest of the house never meets an unresolved model. Where 0 is a value
of its own, -1 means that.
"""

from dataclasses import dataclass, field
from typing import Any

from megacore.config.alerts import DEFAULTS as ALERTS
from megacore.config.optimizers import optimizer_names

OWN_SCHEDULE = ".txt"
"""How the name of a file ends that holds a user's own schedule."""


def key(default: Any, help: str, choices: tuple[str, ...] = (), **more: Any) -> Any:
    """A dataclass field with its one-line meaning (shown by `megacore config explain`) and its legal values."""
    metadata = {"help": help, "choices": choices, **more}
    if isinstance(default, (list, dict, type)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained at."""

    type: str = key("none", "method", ("none", "linear", "ntk", "yarn", "llama3", "longrope"))
    factor: float = key(1.0, "new length / original length")
    original_seq_len: int = key(0, "length the model was first trained at (yarn, llama3, longrope)")
    low_freq_factor: float = key(1.0, "llama3: wavelengths above original/low are divided by factor")
    high_freq_factor: float = key(4.0, "llama3: wavelengths below original/high are kept")
    beta_fast: float = key(32.0, "yarn: dims that turn more often than this over the original length are kept")
    beta_slow: float = key(1.0, "yarn: dims that turn less often than this are divided by factor")
    attention_factor: float = key(
        0.0,
        "multiplies cos and sin; 0: yarn 0.1 ln(factor) + 1, longrope sqrt(1 + ln(factor) / ln(original_seq_len))",
    )
    short_factor: tuple[float, ...] = key(
        (), "longrope: divides each pair's frequency in samples of at most original_seq_len tokens"
    )
    long_factor: tuple[float, ...] = key((), "longrope: divides each pair's frequency in longer samples")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and features of the decoder."""

    family: str = key(
        "llama",
        "fills the feature keys that are not given (norms, activation, position, biases, tying, soft caps)",
        ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt-neox", "olmo2", "phi3", "gemma2"),
    )
    num_layers: int = key(0, "transformer blocks", required=True)
    hidden_size: int = key(0, "width of the residual stream", required=True)
    ffn_hidden_size: int = key(0, "width inside the MLP; 0: 4 x hidden, or 8/3 x hidden up to 64 if gated")
    num_heads: int = key(0, "query heads", required=True)
    num_kv_heads: int = key(0, "key/value heads (GQA; 1: MQA); 0: num_heads")
    head_dim: int = key(0, "width of a head; 0: hidden_size / num_heads")
    vocab_size: int = key(0, "tokens in the vocabulary; 0: taken from the data's tokenizer")
    norm: str = key("rmsnorm", "normalisation of the residual stream", ("rmsnorm", "layernorm"))
    norm_placement: str = key(
        "pre",
        "where a block norms: before attention and MLP, after them (OLMo-2), or both (Gemma-2)",
        ("pre", "post", "both"),
    )
    norm_unit_offset: bool = key(False, "RMSNorms multiply by 1 + weight, which starts at 0 (Gemma)")
    norm_eps: float = key(1e-5, "added to the variance")
    parallel_residual: bool = key(
        False, "x + attention(norm(x)) + mlp(norm(x)): both read the block's input (GPT-NeoX)"
    )
    activation: str = key(
        "swiglu",
        "MLP non-linearity; gelu and geglu: tanh form, gelu-erf: exact",
        ("swiglu", "geglu", "gelu", "gelu-erf", "relu2"),
    )
    position: str = key("rope", "how positions enter", ("rope", "alibi", "learned", "none"))
    max_positions: int = key(0, "longest sample; rows of the learned position table; 0: train.seq_len")
    rope_theta: float = key(10000.0, "base of the rotary frequencies")
    rotary_fraction: float = key(1.0, "share of head_dim, from its front, that RoPE rotates")
    rope_scaling: RopeScaling = key(RopeScaling, "context extension of RoPE")
    tie_embeddings: bool = key(False, "the output head uses the embedding's weight")
    qk_norm: bool = key(False, "RMSNorm of queries and keys before positions (Qwen3, OLMo-2)")
    qk_norm_over: str = key(
        "head", "what qk_norm norms at once: each head, or all of a token's heads (OLMo-2)", ("head", "all")
    )
    qkv_bias: bool = key(False, "bias on the query, key and value projections")
    attention_out_bias: bool = key(False, "bias on the attention's output projection")
    mlp_bias: bool = key(False, "bias on both MLP projections")
    attention_scale_dim: int = key(0, "attention scores are multiplied by this^-0.5; 0: head_dim")
    attention_softcap: float = key(0.0, "bounds attention scores s to cap tanh(s / cap) (Gemma-2); 0: no bound")
    logit_softcap: float = key(0.0, "bounds the output's logits likewise; 0: no bound")
    scale_embeddings: bool = key(False, "multiply token embeddings by sqrt(hidden_size) (Gemma)")
    sliding_window: int = key(0, "a token sees itself and window-1 tokens before it; 0: all")
    full_attention_every: int = key(
        0, "with a sliding window, every n-th layer sees everything (Gemma-2: 2); 0: no layer does"
    )
    sliding_window_from: int = key(0, "with a sliding window, layers before this one see everything (Qwen2)")
    dropout: float = key(0.0, "after the embedding and on each block's two outputs")
    attention_dropout: float = key(0.0, "on attention probabilities")
    init_std: float = key(0.02, "standard deviation of every weight matrix at the start")
    init_scale_residual: bool = key(True, "divide init_std by sqrt(2 num_layers) where a block writes its output")
    num_experts: int = key(0, "experts per MoE layer; 0: dense")
    top_k: int = key(0, "experts per token")
    moe_ffn_hidden_size: int = key(0, "width inside an expert; 0: ffn_hidden_size")
    num_shared_experts: int = key(0, "experts of each MoE layer that all tokens go through")
    shared_ffn_hidden_size: int = key(0, "width of them all together; 0: num_shared_experts * moe_ffn_hidden_size")
    num_dense_layers: int = key(0, "with experts, layers before the first MoE layer")
    moe_every: int = key(1, "with experts, every n-th layer is an MoE layer (Llama 4: 2), from the first on")
    kv_lora_rank: int = key(0, "width that keys and values are made of (multi-head latent attention, DeepSeek); 0: off")
    q_lora_rank: int = key(0, "latent attention: width that queries are made of; 0: the hidden state itself")
    qk_nope_head_dim: int = key(0, "latent attention: dims of a query's or key's head without position; 0: 128")
    qk_rope_head_dim: int = key(0, "latent attention: dims that RoPE rotates, of which keys share one head; 0: 64")
    v_head_dim: int = key(0, "latent attention: dims of a value's head; 0: 128")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work. world = pp*dp*cp*tp = pp*edp*ep*etp."""

    tp: int = key(1, "tensor parallel size: splits every layer's matrices")
    pp: int = key(1, "pipeline parallel size: splits the layers")
    cp: int = key(1, "context parallel size: splits the sequence")
    dp: int = key(0, "data parallel size; 0: world / (tp*pp*cp)")
    dp_shard: int = key(0, "ranks of a dp group that shard state (hybrid sharding); 0: dp")
    ep: int = key(1, "expert parallel size")
    etp: int = key(0, "tensor parallel size inside experts; 0: tp, with ep > 1 1")
    chunks: int = key(0, "stages per pipeline rank (interleaving); 0: 2 for zb-v and dualpipe-v, else 1")
    stage_layers: tuple[int, ...] = key((), "layers of each stage, in order; empty: balanced by FLOPs")
    schedule: str = key(
        "1f1b",
        "pipeline schedule: a kind, or a text file with a list of one's own",
        ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"),
        file=OWN_SCHEDULE,
    )
    zero: int = key(0, "ZeRO stage: 0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters are sharded")
    sequence_parallel: bool = key(False, "split activations outside the matrices along the sequence over tp")
    regather_inputs: bool = key(
        False, "with sequence_parallel: keep only the shard of a layer's input and gather it again in backward"
    )
    recompute: str = key(
        "none",
        "activations computed again in backward: the core of attention (selective) or whole blocks (full); offload: "
        "kept, but in host memory",
        ("none", "selective", "full", "offload"),
    )
    order: str = key("pp-dp-cp-tp", "rank order, outermost axis first")


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of the run."""

    steps: int = key(100, "optimizer steps")
    seq_len: int = key(256, "tokens per sample")
    micro_batch_size: int = key(1, "samples that one rank computes at once")
    global_batch_size: int = key(1, "samples per optimizer step, over all ranks")
    batch_ramp: tuple[int, ...] = key(
        (), "[start, increment, samples]: grow the batch from start to global over so many samples"
    )
    seed: int = key(1234, "seed of weights, dropout and data order")
    device: str = key("auto", "where to compute; auto: cuda if there is one", ("auto", "cpu", "cuda"))
    deterministic: bool = key(False, "refuse operations whose result may vary from run to run")
    eval_every: int = key(0, "evaluate every so many steps; 0: never")
    eval_steps: int = key(10, "global batches per evaluation")
    label_smoothing: float = key(0.0, "weight of the uniform distribution in the target")
    z_loss: float = key(0.0, "weight of the squared log-partition (PaLM, section 5)")


@dataclass(frozen=True)
class OptimConfig:
    """The update rule."""

    name: str = key("adamw", "optimizer", optimizer_names())
    lr: float = key(3e-4, "peak learning rate")
    min_lr: float = key(0.0, "learning rate at the end of the decay")
    warmup_steps: int = key(0, "steps of linear warm-up from 0")
    lr_schedule: str = key("cosine", "decay after warm-up", ("cosine", "linear", "constant", "wsd", "inverse_sqrt"))
    decay_steps: int = key(0, "step at which the decay ends; 0: train.steps")
    wsd_decay_steps: int = key(0, "wsd: length of the final decay; 0: a tenth of decay_steps, or what warm-up leaves")
    weight_decay: float = key(-1.0, "weight decay; norms, biases and embeddings are exempt; -1: the optimizer's own")
    beta1: float = key(-1.0, "decay of the first moment; -1: the optimizer's own")
    beta2: float = key(-1.0, "decay of the second moment; -1: the optimizer's own")
    eps: float = key(-1.0, "keeps divisors from 0; -1: the optimizer's own")
    momentum: float = key(-1.0, "decay of the momentum; -1: the optimizer's own")
    options: tuple[str, ...] = key((), 'what else the optimizer has, as ["name=value"]')
    state_dtype: str = key(
        "auto",
        "format of moments; auto: as the updated weights; int8: 8 bits and a scale for every 64 elements",
        ("auto", "fp32", "bf16", "int8"),
    )
    state_rounding: str = key(
        "nearest",
        "how moments become bf16; stochastic: up or down by chance, right on average",
        ("nearest", "stochastic"),
    )
    offload: str = key(
        "none",
        "where the optimizer keeps its state; none: beside the weights; cpu: in host memory, with copies of the "
        "weights, which it updates there; nvme: in files, read ahead and written behind",
        ("none", "cpu", "nvme"),
    )
    offload_folder: str = key("", "nvme: folder on a quick disk; empty: offload, in the run's folder")
    clip: str = key(
        "norm",
        "how large gradients are bounded: by the global norm, element by element (value), or each parameter's norm by "
        "what is usual for it (adagc)",
        ("norm", "value", "adagc", "none"),
    )
    clip_grad: float = key(
        1.0, "norm: largest global norm; value: largest element; adagc: global norm in its warm-up; 0: no clipping"
    )
    adagc_ratio: float = key(1.05, "adagc: largest norm of a parameter's gradient, in units of its moving average")
    adagc_beta: float = key(0.98, "adagc: decay of the moving averages of norms")
    adagc_warmup_steps: int = key(100, "adagc: steps of clipping by the global norm, before averages can be trusted")
    groups: tuple[str, ...] = key(
        (), 'settings of some parameters, as ["PATTERN: lr_scale=0.1, weight_decay=0"]; the first that matches counts'
    )
    freeze: tuple[str, ...] = key((), 'patterns of names of parameters that are not trained, such as ["embedding.*"]')


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    dtype: str = key("fp32", "parameters and activations", ("fp64", "fp32", "bf16", "fp16"))
    fp8: str = key(
        "off",
        "matrix products of layers in FP8; current: each tensor is scaled by its largest element; delayed: by the "
        "largest one of the steps before; block: in blocks of 128",
        ("off", "delayed", "current", "block"),
    )
    fp8_skip_first: int = key(0, "with fp8: layers at the beginning that keep multiplying in `dtype`")
    fp8_skip_last: int = key(0, "with fp8: layers at the end that keep multiplying in `dtype`")
    fp8_gather: bool = key(
        False, "current or delayed, with zero: weights that are multiplied in FP8 also travel between the shards in FP8"
    )
    fp8_history: int = key(1024, "delayed: steps whose largest elements set the scales")
    fp8_margin: int = key(0, "delayed: powers of two between the largest element and the end of the format")
    master: str = key(
        "fp32",
        "what 16-bit training updates; fp32: copies of the weights; split: the same, of which bf16 weights are the "
        "upper halves and only the lower ones are kept; none: bf16 weights themselves, rounded by chance",
        ("fp32", "split", "none"),
    )
    loss_scale: str = key("auto", "fp16 loss scaling: dynamic, a number or off; auto: dynamic under fp16, else off")
    loss_scale_start: float = key(65536.0, "dynamic: the first scale")
    loss_scale_every: int = key(2000, "dynamic: steps without overflow after which the scale is doubled")
    loss_scale_min: float = key(1.0, "dynamic: overflows halve the scale, but not below this")
    grad_reduce_dtype: str = key(
        "auto",
        "format in which gradients travel to be summed over data-parallel ranks; auto: fp32, under fp64 fp64",
        ("auto", "fp64", "fp32", "bf16"),
    )


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which mixture and order."""

    blend: tuple[tuple[float, str], ...] = key((), "list of [weight, prefix]; a lone prefix means [1, prefix]")
    eval_blend: tuple[tuple[float, str], ...] = key(
        (), "data of their own for evaluation; empty: the validation split of blend"
    )
    split: tuple[float, ...] = key((969.0, 30.0, 1.0), "shares of train, validation and test documents")
    tokenizer: str = key(
        "", "bytes, FILE.model, FILE.json or folder, tiktoken:NAME; empty: the one the data was made with"
    )
    index: str = key("megacore", "order of samples", ("megacore", "megatron"))
    cache: str = key("", "folder of built sample indices; empty: beside each data file")
    temperature: float = key(0.0, "0: use the weights; T > 0: weights ~ tokens^(1/T)")
    reset_positions: bool = key(False, "positions start at 0 in every document")
    reset_attention: bool = key(False, "tokens do not attend across documents")
    mask_eod_loss: bool = key(False, "the end-of-document token is not a target")
    fim_rate: float = key(0.0, "share of documents rearranged for fill-in-the-middle")
    fim_spm_rate: float = key(0.5, "share of those in suffix-prefix-middle order")
    fim_tokens: tuple[str, ...] = key(
        ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), "names of the prefix, middle and suffix tokens"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and from where a run starts."""

    save_every: int = key(0, "steps between checkpoints, one after the last; 0: never")
    keep: int = key(3, "checkpoints kept, the newest ones; 0: all")
    keep_every: int = key(0, "checkpoints of steps that this divides are kept, too; 0: none")
    keep_best: int = key(0, "so many with the smallest validation loss are kept, too")
    async_save: bool = key(True, "write in the background, from a copy")
    resume: str = key(
        "auto",
        "auto: go on from the newest whole checkpoint of the run's folder, if there is one; never: start anew; PATH: "
        "go on from that checkpoint, or from the newest of that run",
    )
    init_from: str = key("", "checkpoint or HF folder to take weights from, where no checkpoint is resumed")
    export_hf_every: int = key(0, "steps between HF exports to out/hf, one after the last; 0: never")
    export_dtype: str = key("keep", "format of exported weights; keep: as trained", ("keep", "fp32", "bf16", "fp16"))
    folder: str = key("", "where checkpoints lie: a folder, or a URL such as s3://bucket/run; empty: out/checkpoints")


@dataclass(frozen=True)
class LogConfig:
    """What is shown and kept."""

    every: int = key(1, "steps between lines of metrics.jsonl")
    console_every: int = key(0, "steps between metric lines on the console; 0: as `every`")
    tensorboard: bool = key(False, "also write TensorBoard events")
    wandb: bool = key(False, "also log to Weights & Biases")
    wandb_mode: str = key(
        "offline", "offline: files in out/wandb, for `wandb sync`; online: sent at once", ("offline", "online")
    )
    mlflow: bool = key(False, "also log to MLflow")
    mlflow_uri: str = key("", "MLflow's server or store; empty: files in out/mlruns")
    project: str = key("megacore", "W&B's project and MLflow's experiment")
    prometheus_port: int = key(0, "port where rank 0 serves /metrics to Prometheus; 0: none")
    prometheus_file: bool = key(False, "also write out/metrics.prom, for node_exporter's textfile collector")
    gpu_every: float = key(
        5.0, "seconds between samples of every rank's GPU (utilization, power, heat, clocks); 0: never"
    )
    alerts: tuple[str, ...] = key(
        ALERTS, 'rules that are told once when they begin to hold, as ["loss > 1.5 * mean(loss, 50)", "event hang"]'
    )
    alert_webhook: str = key("", "URL that alerts are sent to as JSON, by POST")
    alert_command: str = key("", "command that is run for each alert, with the JSON on its stdin")
    sample_every: int = key(0, "steps between sampled texts; 0: never")
    sample_prompts: tuple[str, ...] = key((), "prompts to continue")
    sample_tokens: int = key(48, "tokens per sampled text")
    sample_temperature: float = key(0.8, "softmax temperature of sampled texts; 0: the likeliest token")
    statistics_every: int = key(
        0, "steps between statistics of parameters, gradients and updates in metrics.jsonl; 0: never"
    )
    timeline_step: int = key(
        0, "step whose instructions are timed, drawn and written to timeline.json and timeline.svg; 0: none"
    )
    profile: tuple[int, ...] = key(
        (),
        "[first, last] of the steps that torch's profiler records: traces and a summary by kind of work in profile/; "
        "empty: none",
    )
    profile_ranks: tuple[int, ...] = key((), "ranks that are profiled; empty: all")
    nvtx: bool = key(False, "CUDA: instructions and collectives are NVTX ranges in every step, for Nsight Systems")
    communication: int = key(
        0, "steps whose collectives and messages each rank writes to communication/rank-N.jsonl; 0: none"
    )


@dataclass(frozen=True)
class GuardConfig:
    """What looks after a run that goes on."""

    heartbeat: bool = key(True, "every rank beats once a second; rank 0 names who is silent or behind")
    silent_s: float = key(6.0, "seconds after which a silent rank is named")
    abort_s: float = key(60.0, "seconds after which the ranks end because one is silent, to be started again")
    step_limit_s: float = key(600.0, "seconds without any progress after which the ranks end; 0: no limit")
    spike: str = key(
        "alert",
        "what is done about a loss that jumps; alert: it is told; rewind: the run goes back before it, to the newest "
        "checkpoint, and leaves its batch out",
        ("off", "alert", "rewind"),
    )
    spike_sigma: float = key(6.0, "robust deviations from what the last losses were that make a jump")
    spike_window: int = key(128, "losses by which deviations are judged")
    max_rewinds: int = key(3, "rewind: batches that may be left out; what jumps after that is only told")
    replicas_every: int = key(
        0, "steps between comparisons of what several ranks hold copies of; 0: never. Ranks that differ are named"
    )
    stragglers_every: int = key(0, "steps between timings of all ranks' own work, to name slow ones; 0: never")


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementations of fused operations are taken."""

    use: tuple[str, ...] = key((), 'list of "OPERATION=BACKEND"; of all others the fastest that was measured')
    explain: bool = key(False, "say at the start why each other backend was not taken")
    compile: bool = key(False, "compile what lies between a block's matrix products with torch.compile")


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = key(ModelConfig, "the decoder")
    parallel: ParallelConfig = key(ParallelConfig, "the layout")
    train: TrainConfig = key(TrainConfig, "length and batch")
    optim: OptimConfig = key(OptimConfig, "the update rule")
    precision: PrecisionConfig = key(PrecisionConfig, "number formats")
    kernels: KernelsConfig = key(KernelsConfig, "implementations")
    data: DataConfig = key(DataConfig, "the corpus")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "saving and resuming")
    log: LogConfig = key(LogConfig, "watching")
    guard: GuardConfig = key(GuardConfig, "looking after a run")
    out: str = key("runs/run", "the run's folder")

"""Bad input of every kind, to every command that takes some: exit code 2, a message that says what and the fix, no
traceback, nothing left behind, and all of it at once.

Cases are made from one good run by rules and seeds. Most go through `main` in this process, where a stub stands for the
start of ranks, so that a case that would train is seen; a sample goes through real processes, whose own work is timed.
"""

import os
import random
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megacore.__main__ import COMMANDS, main
from megacore.config.load import all_keys

GOOD = """out = "{out}"
[model]
num_layers = 4
hidden_size = 64
num_heads = 4
num_kv_heads = 2
[parallel]
tp = 1
[train]
steps = 10
seq_len = 32
global_batch_size = 8
[optim]
lr = 1e-3
[precision]
dtype = "fp32"
[data]
blend = [[1.0, "{data}"]]
"""
LIMIT_S = 3.0
PYTHONS_OWN = (
    "invalid literal",
    "could not convert",
    "Errno",
    "embedded null",
    "NoneType",
    "has no attribute",
    "Exceeds the limit",
    "not subscriptable",
)
"""Words of an exception that nobody has translated."""


class Began(BaseException):
    """Ranks were about to start."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set, and where files of runs go."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.txt").write_text("some words of a text that is long enough. " * 200)
    made = ["--input", str(folder / "text.txt"), "--tokenizer", "bytes", "--output", str(folder / "set")]
    assert main(["data", "prepare", *made, "--workers", "1"]) == 0
    (folder / "file").write_text("x")
    return folder


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs a command line; what it says on stderr, where the exit code is 2 and nothing else is printed."""

    def began(*args, **more):
        raise Began

    monkeypatch.setattr("megacore.launch.train.with_restarts", began)
    monkeypatch.setattr("megacore.launch.train.as_rank", began)

    def run(*words, named=()):
        before = dict(os.environ)
        try:
            code = main(list(words))
        except SystemExit as leaving:
            code = leaving.code
        except Began:
            code = "it began"
        finally:
            os.environ.clear()
            os.environ.update(before)
        shown = capsys.readouterr()
        judge(words, code, shown.out, shown.err, named)
        return shown.err

    return run


def judge(words, code, out, err, named=()):
    """What must be so of each."""
    words = [word[:200] for word in words]
    assert code == 2, (words, code, err[-2000:])
    assert out == "", words
    assert err.strip() and "Traceback" not in err, (words, err[-2000:])
    assert not [word for word in PYTHONS_OWN if word in err], (words, err)
    assert all(letter.isprintable() or letter in "\n\t" for letter in err), words
    assert max(map(len, err.splitlines())) < 12_000, words
    assert all(name in err for name in named), (words, named, err)


def good(place):
    return GOOD.format(out=place / "out", data=place / "set")


def changed(place, old, new):
    text = good(place)
    assert old in text
    return text.replace(old, new, 1).encode()


def bad_files(place):
    """Name -> (bytes of a run file, what its message must name)."""
    text = good(place)
    return {
        "empty": (b"", ("model.num_layers is missing", "data.blend is empty")),
        "utf16": (text.encode("utf-16"), ("not UTF-8", "TOML")),
        "latin1": (text.replace("fp32", "fp32\u00e9").encode("latin-1"), ("not UTF-8",)),
        "nul": (text.encode() + b"\0", ("not TOML", "line")),
        "noise": (random.Random(0).randbytes(4000), ("not UTF-8",)),
        "json": (b'{"model": {"num_layers": 2}}', ("not TOML", "line 1", "mend")),
        "yaml": (b"model:\n  num_layers: 2\n", ("not TOML", "line 1")),
        "deep": (b"x = " + b"[" * 5000 + b"]" * 5000, ("nested too deeply",)),
        "deep value": (changed(place, "layers = 4", "layers = " + "[" * 200 + "]" * 200), ("model.num_layers",)),
        "digits": (changed(place, "steps = 10", "steps = " + "9" * 5000), ("thousands of digits",)),
        "huge": (changed(place, "steps = 10", "steps = " + "9" * 40), ("train.steps", "at most")),
        "many layers": (changed(place, "layers = 4", "layers = 99999999999"), ("model.num_layers", "at most")),
        "wide": (changed(place, "hidden_size = 64", "hidden_size = 99999999999"), ("model.hidden_size", "at most")),
        "infinite": (changed(place, "lr = 1e-3", "lr = 1e999"), ("optim.lr", "finite")),
        "nan": (changed(place, "lr = 1e-3", "lr = nan"), ("optim.lr", "finite")),
        "date": (changed(place, "steps = 10", "steps = 2024-01-01"), ("train.steps=2024-01-01", "integer")),
        "time": (changed(place, "lr = 1e-3", "lr = 12:00:00"), ("optim.lr", "number")),
        "no date": (changed(place, "steps = 10", "steps = 2024-13-45"), ("not TOML", "line")),
        "section twice": (text.encode() + b"\n[model]\nnum_heads = 2\n", ("not TOML", "[model]", "line")),
        "key twice": (changed(place, "num_layers = 4", "num_layers = 4\nnum_layers = 5"), ("not TOML", "line 4")),
        "list of sections": (changed(place, "[model]", "[[model]]"), ("model=", "section")),
        "number for section": (b"model = 3\n", ("model=3", "section")),
        "list for section": (b"model = [1, 2]\n", ("model=[1, 2]", "section")),
        "wrong level": (b"num_layers = 3\n" + text.encode(), ("did you mean model.num_layers",)),
        "wrong section": (changed(place, "steps = 10", "lr = 10"), ("train.lr", "did you mean optim.lr")),
        "look-alike": (changed(place, "num_layers", '"num_l\u0430yers"'), ("did you mean model.num_layers",)),
        "no name": (b'"" = 3\n' + text.encode(), ('"" is not a key',)),
        "odd names": (b'"x\\ny" = 1\n"a.b" = 2\n' + text.encode(), ("x\\ny", '"a.b"')),
        "escape": (changed(place, '"fp32"', '"fp32\\u001b[31m"'), ("precision.dtype", "\\x1b")),
        "nul in out": (b'out = "a\\u0000b"\n' + text.split("\n", 1)[1].encode(), ("out=", "control character")),
        "no out": (b'out = ""\n' + text.split("\n", 1)[1].encode(), ("out=", "folder")),
        "long out": (
            b'out = "' + b"a" * 5000 + b'"\n' + text.split("\n", 1)[1].encode(),
            ("out=", "cannot be written"),
        ),
        "long prefix": (changed(place, str(place / "set"), "x" * 5000), ("cannot be read",)),
        "weight as text": (changed(place, "[[1.0", '[["1.0"'), ("data.blend", "number")),
        "negative weight": (changed(place, "[[1.0", "[[-1.0"), ("data.blend", "at least 0")),
        "three in a pair": (changed(place, "[[1.0", "[[1.0, 2"), ("data.blend",)),
    }


def broken(place, seed):
    """The good file with a few letters of its syntax lost or changed, so that no TOML reader takes it."""
    rng = random.Random(seed)
    while True:
        text = list(good(place))
        for _ in range(rng.randint(1, 3)):
            at = rng.choice([at for at, letter in enumerate(text) if letter in '[]="'])
            text[at] = rng.choice(("", "[", "=", '"', "\x01", "}"))
        data = "".join(text)
        try:
            tomllib.loads(data)
        except tomllib.TOMLDecodeError:
            return data.encode()


def test_bad_run_files(place, ask, tmp_path):
    cases = bad_files(place) | {f"broken {seed}": (broken(place, seed), ("not TOML",)) for seed in range(40)}
    for name, (data, named) in cases.items():
        path = tmp_path / f"{name}.toml"
        path.write_bytes(data)
        ask("train", str(path), named=named)
        if "not TOML" in named or "not UTF-8" in named:
            for words in (["plan"], ["verify"], ["config", "show"], ["launch", "slurm"]):
                ask(*words, str(path), named=named)
    assert not (place / "out").exists()


def test_a_mark_at_the_beginning_of_a_file_is_no_error(place, ask, tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + changed(place, "steps = 10", "steps = 0"))
    ask("train", str(tmp_path / "run.toml"), named=("train.steps=0",))


def test_paths_that_are_no_run_files(place, ask):
    loop = place / "loop.toml"
    loop.symlink_to(loop)
    for path in (place, "nowhere.toml", "", "a" * 300 + ".toml", place / "file" / "x", loop, "x" * 9000):
        for words in (["train"], ["plan"], ["verify"], ["config", "show"], ["launch", "local"]):
            ask(*words, str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="changes to a user who may not read")
def test_a_file_that_may_not_be_read_and_a_folder_that_may_not_be_written(place, ask):
    (place / "secret.toml").write_text(good(place))
    ask("config", "show", str(place / "secret.toml"), "model.num_layers=x")  # all that it imports is imported
    run = good(place)
    Path(place / "secret.toml").chmod(0)
    (place / "mine").mkdir(0o700)
    os.seteuid(65534)
    try:
        ask("train", str(place / "secret.toml"), named=("cannot be read", "Permission denied"))
        from megacore.launch.folders import obstacle

        assert obstacle(place / "mine" / "run")
    finally:
        os.seteuid(0)
    assert run


def near_misses():
    """A misspelt name of every key, and the key."""
    rng = random.Random(1)
    for key in all_keys():
        section, dot, name = key.rpartition(".")
        at = rng.randrange(len(name) - 1) if len(name) > 1 else 0
        yield section + dot + name[:at] + name[at] + name[at:], key


def test_every_key_that_is_misspelt_is_suggested(place, ask, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    for wrong, key in near_misses():
        err = ask("train", str(path), f"{wrong}=1", named=(wrong, "did you mean"))
        assert key in err, (wrong, err)


def test_values_that_no_key_takes(place, ask, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    for key, field in all_keys().items():
        default = field.default
        for value in ("a\x1b[31mb", "9" * 4400):
            if isinstance(default, (int, float)):
                ask("train", str(path), f"{key}={value}", named=(key,))
        if isinstance(default, float):
            for value in ("nan", "-inf", "1e400"):
                ask("train", str(path), f"{key}={value}", named=(key, "finite"))
        elif isinstance(default, int) and not isinstance(default, bool):
            ask("train", str(path), f"{key}=1e40", named=(key, "at most"))
        elif isinstance(default, str):
            ask("train", str(path), f"{key}=a\x07b", named=(key, "\\x07"))


def test_data_and_folders(place, ask, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    index, tokens, note = ((place / f"set.{end}").read_bytes() for end in ("idx", "bin", "meta.json"))
    damaged = {"no bin": (index, None, note), "no idx": (None, tokens, note), "half": (index, tokens[:99], note)}
    damaged |= {f"cut {n}": (index[:n], tokens, note) for n in range(0, len(index), 7)}
    damaged |= {f"note {n}": (index, tokens, text) for n, text in enumerate((b"{", b"[]", b"3", b"\xff", b"{}"))}
    for name, parts in damaged.items():
        for end, data in zip(("idx", "bin", "meta.json"), parts, strict=True):
            if data is not None:
                (tmp_path / f"{name}.{end}").write_bytes(data)
        if not name.startswith("note"):
            ask("data", "inspect", str(tmp_path / name))
        message = ask("train", str(path), f"data.blend={tmp_path / name}")
        assert name in message or "cannot be read" in message
    for tokenizer in ("nowhere", "tiktoken:nothing", "x.json", str(place)):
        ask("train", str(path), f"data.tokenizer={tokenizer}")
    for key in ("out", "checkpoint.folder", "data.cache"):
        for folder in (place / "file", place / "file" / "x", "/dev/null/x", "/proc/x/y", place / ("y" * 300)):
            ask("train", str(path), f"{key}={folder}", "checkpoint.save_every=5", named=(f"{key}=",))
    for key in ("resume", "init_from"):
        ask("train", str(path), f"checkpoint.{key}={place / 'nothing'}", named=(f"checkpoint.{key}",))
    assert sorted(entry.name for entry in place.iterdir() if entry.name.startswith("out")) == []


def flags(run):
    """Command lines with an option that cannot be."""
    for value in ("0", "-1", "abc", "1.5", "", "9" * 5000):
        yield "train", run, f"--nproc={value}"
        yield "doctor", f"--nproc={value}"
        yield "plan", run, f"--top={value}"
        yield "schedule", "1f1b", f"--stages={value}", "--microbatches=4"
        yield "schedule", "1f1b", "--stages=2", f"--microbatches={value}"
        for kind in ("local", "slurm", "k8s", "sky"):
            for option in ("nodes", "gpus", "grace", "wait"):
                yield "launch", kind, run, "--dry-run", f"--{option}={value}"
    for value in ("-1", "x", "1.5", ""):
        yield "train", run, f"--max-restarts={value}"
        yield "launch", "local", run, "--dry-run", f"--max-restarts={value}"
    yield "train", run, "--nproc=10000"
    yield "doctor", "--nproc=10000"
    for command in COMMANDS:
        yield command, "--nothing"
    for command in ("train", "plan", "verify"):
        yield from ((command,), (command, "--preset"), (command, "--preset", ""), (command, "--preset", "llama9"))
    yield from (("tran",), ("",), ("--nothing",), ("launch",), ("launch", "mars", run), ("launch", "slurm"))
    yield from (("train", run, "--json"), ("train", run, "--gpu", "h100"), ("launch", "slurm", run, "--env", "="))
    yield from (("launch", "k8s", run), ("launch", "slurm", run, "--name", "a/b"), ("launch", "sky", run, "--gpu", "x"))
    for command in (["report"], ["inspect"], ["convert", "verify", "x"], ["convert", "to-hf", "x"]):
        yield *command, "/nowhere/at/all"
    yield from ((command, "z" * 300) for command in ("report", "inspect"))
    yield "schedule", "1f1b", "--stages=2", "--microbatches=4", "--plot=/proc/x.svg"
    yield from (("convert",), ("bench",), ("bench", "nothing"), ("data",), ("config", "explain", "modle"))
    yield from (("verify", run, "--layouts", "tp"), ("verify", run, "--layouts", "nothing=2"))


def test_options(place, ask, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    for words in flags(str(path)):
        ask(*words)


RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}


def variables():
    """Environments that contradict themselves."""
    for value in ("x", "-1", "", "9" * 20, "1.5"):
        yield from ({**RANK, name: value} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        yield from ({**STEP, name: value} for name in (*STEP, "SLURM_NODEID", "SLURM_JOB_ID"))
    for fault in ("x", "step:0:1", "step:0:1:explode", "step#0:0:1:kill", "weight:0:1:kill", "step:a:1:kill", ":::"):
        yield {"MEGACORE_FAIL": fault}


def test_variables(place, ask, tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    for environment in variables():
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            ask("train", str(path))
    monkeypatch.undo()


PAIRS = (
    ("parallel.tp", (1, 2, 3, 5, 8)),
    ("parallel.pp", (1, 2, 3, 5)),
    ("parallel.cp", (1, 2, 3)),
    ("parallel.dp", (0, 2, 3)),
    ("parallel.ep", (1, 2, 3)),
    ("parallel.etp", (0, 2)),
    ("parallel.zero", (0, 1, 2, 3)),
    ("parallel.chunks", (0, 2, 3)),
    ("parallel.schedule", ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")),
    ("parallel.sequence_parallel", ("true", "false")),
    ("parallel.recompute", ("none", "selective", "full", "offload")),
    ("parallel.stage_layers", ("", "[1,3]", "[4,4]", "[0,4]")),
    ("model.num_heads", (4, 3, 8)),
    ("model.num_kv_heads", (0, 2, 3, 8)),
    ("model.num_layers", (4, 1, 7)),
    ("model.num_experts", (0, 2, 3)),
    ("model.top_k", (0, 1, 4)),
    ("model.kv_lora_rank", (0, 8)),
    ("model.position", ("rope", "alibi", "learned", "none")),
    ("model.qk_norm", ("true", "false")),
    ("model.sliding_window", (0, 8)),
    ("model.tie_embeddings", ("true", "false")),
    ("train.global_batch_size", (8, 7, 1)),
    ("train.micro_batch_size", (1, 3, 16)),
    ("train.seq_len", (32, 31, 1)),
    ("train.batch_ramp", ("", "[2,2,8]", "[9,1,1]")),
    ("optim.name", ("adamw", "muon", "sgd", "lion")),
    ("optim.lr_schedule", ("cosine", "wsd")),
    ("optim.warmup_steps", (0, 99)),
    ("optim.offload", ("none", "cpu", "nvme")),
    ("optim.state_dtype", ("auto", "int8", "bf16")),
    ("precision.dtype", ("fp64", "fp32", "bf16", "fp16")),
    ("precision.fp8", ("off", "delayed", "block")),
    ("precision.master", ("fp32", "split", "none")),
    ("guard.spike", ("off", "rewind")),
    ("log.timeline_step", (0, 3, 99)),
)


def mixture(seed):
    """Four to nine keys at once, each with a value that it takes alone."""
    rng = random.Random(seed)
    return [f"{key}={rng.choice(values)}" for key, values in rng.sample(PAIRS, rng.randint(4, 9))]


def check_mixtures(place, path, seeds, capsys, monkeypatch):
    """How many mixtures were refused; the others would have trained."""

    def began(*args, **more):
        raise Began

    monkeypatch.setattr("megacore.launch.train.with_restarts", began)
    refused = 0
    for seed in seeds:
        words = ["train", str(path), *mixture(seed)]
        try:
            code = main(words)
        except Began:
            continue
        finally:
            shown = capsys.readouterr()
        judge(words, code, shown.out, shown.err)
        refused += 1
    assert not (place / "out").exists()
    return refused


def test_keys_that_contradict_each_other(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.toml").write_text(good(place))
    assert check_mixtures(place, tmp_path / "run.toml", range(100), capsys, monkeypatch) > 50


@pytest.mark.slow
def test_two_thousand_mixtures_of_keys(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.toml").write_text(good(place))
    refused = check_mixtures(place, tmp_path / "run.toml", range(100, 2100), capsys, monkeypatch)
    assert 1000 < refused < 2000


@pytest.mark.slow
def test_forty_of_them_as_processes_in_less_than_three_seconds_of_work(place, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(good(place))
    rng = random.Random(3)
    cases = [(["train", str(path), f"{wrong}=1"], {}) for wrong, _ in rng.sample(list(near_misses()), 10)]
    words = [line for line in flags(str(path)) if max(map(len, line)) < 1000]
    cases += [(list(line), {}) for line in rng.sample(words, 15)]
    cases += [(["train", str(path)], environment) for environment in rng.sample(list(variables()), 5)]
    for name, (data, _) in rng.sample(sorted(bad_files(place).items()), 10):
        (tmp_path / f"{name}.toml").write_bytes(data)
        cases.append((["train", str(tmp_path / f"{name}.toml")], {}))
    for words, environment in cases:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "megacore", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **environment},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        judge(words, done.returncode, done.stdout, done.stderr)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT_S, words
    assert not (place / "out").exists()

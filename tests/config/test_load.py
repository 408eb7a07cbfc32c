"""Reading runs: sources and their order, types, and the same run back from its own text."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.config.errors import ConfigError
from megacore.config.families import FAMILIES
from megacore.config.load import all_keys, load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve
from megacore.config.schema import LogConfig, ModelConfig, RunConfig
from megacore.config.write import config_hash, flatten, to_toml, toml_value

SHAPE = ("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4")


@pytest.fixture
def run_file(tmp_path):
    """Writes a run file and gives its path."""

    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems(*overrides, path=None, preset=None):
    with pytest.raises(ConfigError) as raised:
        load(path, overrides, preset)
    return raised.value.problems


def test_later_sources_win(run_file):
    path = run_file("[model]\nnum_layers = 3\nnorm_eps = 1e-3\n[optim]\nlr = 1\n")
    config = load(path, ["optim.lr=2", "optim.lr=3"], "qwen3-0.6b")
    assert config.optim.lr == 3.0
    assert config.model.num_layers == 3
    assert config.model.norm_eps == 1e-3  # the file, not the family's 1e-6
    assert config.model.hidden_size == 1024  # the preset
    assert config.model.rope_theta == 1e6  # the family


def test_a_family_fills_only_what_is_not_given():
    config = load(None, [*SHAPE, "model.family=gpt2", "model.norm=rmsnorm"])
    assert config.model.norm == "rmsnorm"
    assert config.model.position == "learned"
    assert config.model.tie_embeddings


def test_families_speak_of_existing_features():
    assert set(FAMILIES) == set(all_keys()["model.family"].metadata["choices"])
    names = {field.name for field in fields(ModelConfig)}
    for implied in FAMILIES.values():
        assert implied.keys() <= names


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=12", 12),
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=.1", 0.1),
        ("optim.lr=1", 1.0),
        ("model.qk_norm=true", True),
        ("model.norm=layernorm", "layernorm"),
        ('model.norm="layernorm"', "layernorm"),
        ("precision.loss_scale=128", "128"),
        ("precision.fp8=off", "off"),
        ("out=2026-01-02", "2026-01-02"),
        ("out=runs/a=b", "runs/a=b"),
        ("data.tokenizer=", ""),
        ("data.split=969,30,1", (969.0, 30.0, 1.0)),
        ("data.split=[8, 1, 1]", (8.0, 1.0, 1.0)),
        ("train.batch_ramp=8,8,100", (8, 8, 100)),
        ("parallel.stage_layers=2", (2,)),
        ("data.blend=corpus", ((1.0, "corpus"),)),
        ('data.blend=["a", [2, "b,c"]]', ((1.0, "a"), (2.0, "b,c"))),
        ("data.blend=[]", ()),
        ("log.sample_prompts=To be, or not", ("To be, or not",)),
        ('log.sample_prompts=["one", "two"]', ("one", "two")),
        ("model.rope_scaling.factor=8", 8.0),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(override, value):
    flat = flatten(load(None, [override], "demo"))
    assert flat[override.partition("=")[0]] == value
    assert type(flat[override.partition("=")[0]]) is type(value)


def test_an_inline_table_is_merged():
    overrides = ["model.rope_scaling.factor=8", 'model.rope_scaling={type="yarn", original_seq_len=128}']
    scaling = load(None, overrides, "demo").model.rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_seq_len) == ("yarn", 8.0, 128)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=1.5", "train.steps=1.5 must be an integer"),
        ("train.steps=true", "train.steps=true must be an integer"),
        ("optim.lr=fast", "optim.lr=fast must be a number"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("optim.lr=1e999", "must be a finite number"),
        (f"optim.lr=1{'0' * 400}", "must be a finite number"),
        ("model.qk_norm=True", "model.qk_norm=True must be true or false"),
        ("model.qk_norm=1", "must be true or false"),
        ("data.split=8,x,1", "each item of which must be a number"),
        ("data.blend=[[1, 2]]", 'a list of [weight, "prefix"], but holds [1, 2]'),
        ('data.blend=[["a", "b"]]', "a weight that must be a number"),
        ("data.blend=3", 'a list of [weight, "prefix"]'),
        ("model.norm=layernom", "did you mean layernorm?"),
        ("model.norms=rmsnorm", "model.norms is not a key of a run; did you mean model.norm?"),
        ("train.lr=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("optimizer.learning=1", "optimizer is not a key of a run; did you mean optim?"),
        ("zzz=1", "zzz is not a key of a run; known are model, parallel"),
        ("train.qqqq=1", "known are steps, seq_len"),
        ("model=3", "model=3 is a section; write model.KEY=value"),
        ("out.x=3", "out is a key, not a section"),
        ("train.steps.x=3", "train.steps is a key, not a section"),
        ("train.steps", "is not an override; write section.key=value"),
        ("=3", "is not an override"),
        ("train..steps=3", "is not an override"),
    ],
)
def test_what_cannot_be_read_is_told(override, message):
    (line,) = problems(override, preset="demo")
    assert message in line


def test_files_are_read_strictly(run_file):
    path = run_file('[optim]\nlr = "3e-4"\n[train]\nsteps = "7"\n[precision]\nloss_scale = 128\n')
    lines = "\n".join(problems(path=path, preset="demo"))
    assert "optim.lr=3e-4 must be a number; write it without quotes" in lines
    assert "train.steps=7 must be an integer; write it without quotes" in lines
    assert "precision.loss_scale=128 must be text; put it in quotes" in lines


def test_all_problems_are_told_at_once(run_file):
    path = run_file('[model]\nnum_layers = "many"\nnorms = 1\n[train]\nsteps = 0\n[data]\nsplit = [0, 2]\n')
    lines = problems("model.hidden_size=30", "model.num_heads=4", "parallel.tp=x", path=path)
    told = "\n".join(lines)
    for words in ("model.num_layers=many", "model.norms", "train.steps=0", "data.split=[0.0, 2.0]", "parallel.tp=x"):
        assert words in told
    # num_layers and tp could not be read, so nothing more is said about them
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[model\n", "is not TOML"), (b"\xff\xfe", "is not UTF-8"), (b"a = 1\na = 2\n", "is not TOML")],
)
def test_unreadable_files(tmp_path, content, message):
    (tmp_path / "run.toml").write_bytes(content)
    (line,) = problems(path=str(tmp_path / "run.toml"))
    assert message in line


def test_absent_files_and_presets(tmp_path):
    assert "there is no run file" in problems(path=str(tmp_path / "no.toml"))[0]
    assert "cannot be read" in problems(path=str(tmp_path))[0]
    assert "did you mean llama3-8b?" in problems(preset="lama3-8b")[0]


@pytest.mark.parametrize("name", preset_names())
def test_a_run_is_the_same_after_a_round_trip(name, run_file):
    config = load(None, ["data.blend=corpus"], name)
    for run in (config, resolve(config, 4)):
        again = load(run_file(to_toml(run)), [])
        assert again == run
        assert config_hash(again) == config_hash(run)


text = st.text(st.characters(blacklist_categories=("Cs",)))


@given(prompts=st.lists(text).map(tuple), out=text, number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_number_survive_a_round_trip(tmp_path_factory, prompts, out, number):
    log = replace(LogConfig(), sample_prompts=prompts, sample_temperature=number)
    config = replace(load(None, [], "demo"), log=log, out=out)
    path = tmp_path_factory.mktemp("round") / "run.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(str(path)) == config


@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
def test_numbers_are_written_in_full(value):
    assert flatten(load(None, [f"optim.lr={toml_value(value)}"], "demo"))["optim.lr"] == float(value)


def test_the_hash_sees_every_key():
    config = load(None, [], "demo")
    assert config_hash(config) != config_hash(replace(config, out="elsewhere"))
    assert config_hash(config) == config_hash(load(None, [], "demo"))


def test_every_key_has_a_default_and_a_meaning():
    keys = all_keys()
    assert keys.keys() == flatten(RunConfig()).keys()
    for key, field in keys.items():
        assert field.metadata["help"], key
        assert not field.metadata["choices"] or field.default in field.metadata["choices"], key

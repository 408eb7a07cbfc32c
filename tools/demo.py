"""`megacore demo`: from real text to a trained language model on this machine, in a few minutes.

Text found on any machine with Python (or your own) becomes a tokenizer, a dataset and a small Llama-like model, trained
with tensor and data parallelism on four local processes. A second call uses again what is there and unchanged.
"""

import argparse
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megacore import __version__
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.write import flatten, toml_value
from megacore.data import found_text
from megacore.data.files import write_atomic
from megacore.data.prepare import Progress, prepare
from megacore.data.stamps import Stamps
from megacore.data.text.sources import find_sources
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.launch.terminal import colour_wanted, page_width
from megacore.monitor.console import Console, Phases, human_count, human_time, phase_lines
from megacore.monitor.curves import read_curves, terminal_curve
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.plots import save_loss_plot
from megacore.monitor.run_folder import CURVE, EVENTS, METRICS
from megacore.spec import ModelSpec

SOURCE_BYTES = 1_500_000  # of library source code, beside all topics and docstrings
USER_BYTES = 20_000_000  # of the user's text: more would not be read in a few minutes of training
LEAST_BYTES = 20_000  # a smaller text teaches nothing
PROMPTS = ('The "for" statement', "def ", "Return the")
EXAMPLE = 'The "for" statement iterates over the elements of a sequence.'  # shown cut into tokens
FAST_STEPS, FAST_BYTES = 40, 600_000


def main(argv: list[str] | None = None) -> int:
    """The tour; returns the exit code."""
    args = parser().parse_args(argv)
    console = Console(sys.stdout, colour=colour_wanted(sys.stdout), width=page_width())
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1; the usual number is {preset().train.steps}")
    for path in map(Path, args.text):
        if not path.expanduser().exists():
            raise ValueError(f"--text {path}: there is no such file or folder; give text files or folders of them")
    try:
        return Demo(args, console).run()
    finally:
        console.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore demo", description=__doc__.partition(": ")[2])
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH", help="your own files or folders to learn from")
    parser.add_argument("--steps", type=int, metavar="N", help=f"training steps (default {preset().train.steps})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default runs/demo)")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens in the vocabulary (default: by corpus size)"
    )
    parser.add_argument("--fast", action="store_true", help="less text and few steps, to see that everything works")
    parser.add_argument("--fresh", action="store_true", help="make everything anew (an earlier run is kept aside)")
    return parser


def preset() -> RunConfig:
    """The model and the training settings of the tour."""
    return load(None, preset="demo")


@dataclass(frozen=True)
class Corpus:
    """Where the text lies and how much it is."""

    path: Path
    num_documents: int
    num_bytes: int


class Demo:
    """The stages, in order; each prints what it does and leaves its results in `out`."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console, self.out = args, console, args.out
        self.phases = Phases()
        self.out.mkdir(parents=True, exist_ok=True)
        self.stamps = Stamps(self.out / "demo.json", args.fresh)

    def run(self) -> int:
        """All stages; the exit code is that of training."""
        self.welcome()
        with self.phases.time("text"):
            corpus = self.gather()
        with self.phases.time("tokenizer"):
            tokenizer = self.tokenizer(corpus)
        with self.phases.time("dataset"):
            prefix = self.dataset(corpus, tokenizer)
        with self.phases.time("training"):
            config = self.configure(corpus, tokenizer, prefix)
            code = self.train(config)
        if code:
            return code
        with self.phases.time("pictures"):
            self.curve(config)
        self.samples()
        self.goodbye()
        return 0

    def welcome(self) -> None:
        """What is going to happen."""
        what = "a small corpus" if self.args.fast else "your text" if self.args.text else "Python's own documentation"
        self.console.box(
            "megacore demo",
            [
                f"{what} → tokenizer → dataset → training → text that the model writes",
                "tensor parallel 2 × data parallel 2: four processes on this machine's CPU",
                f"everything goes to {self.out}",
            ],
        )

    def gather(self) -> Corpus:
        """Stage 1: the text, as documents in a JSON lines file."""
        self.title(1, "Text")
        path = self.out / "corpus.jsonl"
        files = [[source.name, source.size, mtime(source.name)] for source in find_sources(self.args.text)]
        inputs = [files or sys.version, SOURCE_BYTES, USER_BYTES, self.args.fast]
        if not self.unchanged("text", inputs, path):
            texts = list(self.user_text() if self.args.text else self.python_text())
            size = sum(len(text.encode("utf-8")) for text in texts)
            if size < LEAST_BYTES:
                raise ValueError(
                    f"--text holds {size:,} bytes of text, too few to learn from; give {LEAST_BYTES:,} or more"
                )
            found_text.write_corpus(texts, path)
            self.stamps.done("text", inputs)
        lines = path.read_bytes().splitlines()
        corpus = Corpus(path, len(lines), sum(map(len, lines)))
        self.result(f"{corpus.num_bytes / 1e6:.1f} MB in {corpus.num_documents:,} documents", path)
        return corpus

    def python_text(self) -> Iterator[str]:
        """The text that comes with Python."""
        files = found_text.library_files()
        every = [("pages of the language reference", found_text.topics())]
        if not self.args.fast:
            every.append(("modules' docstrings", found_text.docstrings(files)))
            every.append(("source files of the library", found_text.sources(files, SOURCE_BYTES)))
        for name, texts in every:
            self.console.progress(f"  reading {name} ...")
            found = list(texts)
            self.console.line(f"  {len(found):>5} {name:<32} {sum(map(len, found)) / 1e6:5.2f} MB")
            yield from found

    def user_text(self) -> Iterator[str]:
        """The text of the user's files."""
        limit = FAST_BYTES if self.args.fast else USER_BYTES
        num_texts = size = 0
        for text in found_text.user_texts(self.args.text, limit):
            num_texts, size = num_texts + 1, size + len(text.encode("utf-8"))
            yield text
        self.console.line(f"  read {size / 1e6:.2f} MB, {num_texts:,} text{'s' * (num_texts != 1)}")
        if size >= limit:
            self.console.line(f"  there may be more, but {limit / 1e6:.1f} MB are enough for a few minutes")

    def tokenizer(self, corpus: Corpus) -> Tokenizer:
        """Stage 2: a SentencePiece vocabulary learned from the text."""
        self.title(2, "Tokenizer")
        path = self.out / "tokenizer.model"
        size = self.args.vocab_size or vocabulary_for(corpus.num_bytes)
        inputs = [self.stamps.made["text"], size]
        if not self.unchanged("tokenizer", inputs, path):
            train_sentencepiece([str(corpus.path)], str(path), size, overwrite=True, on_progress=self.passing)
            self.stamps.done("tokenizer", inputs)
        tokenizer = open_tokenizer(str(path))
        self.result(f"{tokenizer.vocab_size:,} tokens, learned from the text", path)
        example = [EXAMPLE] if not self.args.text else found_text.openings(corpus.path, 1, 60)
        for text in example:
            self.console.line("  " + self.split(tokenizer, text))
        return tokenizer

    def split(self, tokenizer: Tokenizer, text: str) -> str:
        """The text with its tokens set apart."""
        tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        styles = ("cyan", "magenta")
        return self.console.paint("│", "dim").join(self.console.paint(t, styles[n % 2]) for n, t in enumerate(tokens))

    def dataset(self, corpus: Corpus, tokenizer: Tokenizer) -> Path:
        """Stage 3: tokens in a memory-mapped .bin/.idx pair."""
        self.title(3, "Dataset")
        prefix = self.out / "data" / "corpus"
        inputs = [self.stamps.made["tokenizer"], __version__]
        results = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
        if self.unchanged("dataset", inputs, *results):
            self.result("token ids, memory-mapped", results[0])
            return prefix
        workers = max(1, min(4, os.cpu_count() or 1))
        source, spec, output = str(corpus.path), tokenizer.spec, str(prefix)
        done = prepare([source], spec, output, workers=workers, overwrite=True, on_progress=self.tokenised)
        self.stamps.done("dataset", inputs)
        each = done.num_bytes / max(done.num_tokens, 1)
        self.result(f"{done.num_tokens:,} tokens of {each:.2f} bytes, by {workers} worker processes", results[0])
        return prefix

    def tokenised(self, progress: Progress) -> None:
        """Shows how far the dataset is."""
        self.passing(f"{progress.consumed / max(progress.total, 1):4.0%}  {progress.num_tokens:,} tokens")

    def configure(self, corpus: Corpus, tokenizer: Tokenizer, prefix: Path) -> RunConfig:
        """The run file: the preset with this tour's data, layout and length."""
        base = preset()
        steps = self.args.steps or (FAST_STEPS if self.args.fast else base.train.steps)
        prompts = found_text.openings(corpus.path, len(PROMPTS), 24) if self.args.text else list(PROMPTS)
        shown = max(1, steps // 24)  # evaluations and samples fall on steps that are shown
        config = replace(
            base,
            model=replace(base.model, vocab_size=tokenizer.vocab_size),
            parallel=replace(base.parallel, tp=2, dp=2),
            train=replace(base.train, steps=steps, device="cpu", eval_every=3 * shown, eval_steps=4),
            optim=replace(base.optim, warmup_steps=min(base.optim.warmup_steps, steps // 4)),
            data=replace(base.data, blend=((1.0, str(prefix)),), split=(96.0, 4.0, 0.0), tokenizer=tokenizer.spec),
            log=replace(
                base.log,
                every=max(1, steps // 200),
                console_every=shown,
                sample_every=6 * shown,
                sample_prompts=tuple(prompts),
                sample_tokens=64,
            ),
            out=str(self.out),
        )
        write_atomic(self.run_file, run_file_text(config).encode("utf-8"))
        return config

    @property
    def run_file(self) -> Path:
        """What `megacore train` takes to do the training again."""
        return self.out / "run.toml"

    def train(self, config: RunConfig) -> int:
        """Stage 4: `megacore train` on the run file."""
        self.title(4, "Training")
        inputs = [self.stamps.made["dataset"], self.run_file.read_text(encoding="utf-8")]
        if finished(self.out) and self.unchanged("training", inputs, self.out / METRICS):
            self.console.line("  this very model is trained already: its results follow; --fresh makes everything anew")
            return 0
        from megacore.launch.train import main as train

        self.console.line(self.console.paint(f"$ {command()} train {self.run_file}", "bold"))
        code = train([str(self.run_file)])
        if code == 0:
            self.stamps.done("training", inputs)
        return code

    def curve(self, config: RunConfig) -> None:
        """Stage 5: the loss, in the terminal and as a picture."""
        self.title(5, "Loss")
        curves = read_curves(self.out)
        for line in terminal_curve(curves, min(self.console.width - 2, 100), 14, self.console.paint):
            self.console.line(line)
        model = resolve(config, 4).model
        title = f"{human_count(ModelSpec.of(model).num_params)} parameters on {human_count(curves.tokens)} tokens"
        layers = (
            f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size:,}"
        )
        picture = self.out / CURVE
        self.console.line()
        try:
            save_loss_plot(curves, picture, f"megacore demo: {title}", f"{layers}; tp=2 × dp=2 on four CPU processes")
        except ValueError as missing:
            self.console.line(f"  no picture: {missing}")
        else:
            self.result("the same as a picture", picture)

    def samples(self) -> None:
        """Stage 6: how the model wrote early on, and how it writes now."""
        self.title(6, "Text that the model writes")
        samples = [event for event in read_json_lines(self.out / EVENTS) if event["event"] == "sample"]
        steps = sorted({sample["step"] for sample in samples})
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            self.console.line(f"  {self.console.paint(f'after {step} steps', 'bold')}")
            for sample in samples:
                if sample["step"] == step:
                    self.sample(sample["prompt"], sample["text"], "green" if step == steps[-1] else "yellow")

    def sample(self, prompt: str, text: str, style: str) -> None:
        """One text with a bar beside it, the prompt in bold."""
        written = self.console.paint(prompt, "bold") + text.rstrip()
        for line in filter(str.strip, written.split("\n")):
            self.console.line(f"  {self.console.paint('▌', style)} {line}")
        self.console.line()

    def goodbye(self) -> None:
        """What was made, where it lies, what to try next."""
        made = [
            ["corpus.jsonl", "the text"],
            ["tokenizer.model", "SentencePiece vocabulary"],
            ["data/corpus.bin, .idx", "tokens, in Megatron-LM's format"],
            ["run.toml", "the run: model, layout, training; change and train again"],
            ["metrics.jsonl, events.jsonl", "every figure, and what happened"],
            ["log.txt, config.toml", "the console, and the resolved run"],
        ]
        if (self.out / CURVE).exists():
            made.append([CURVE, "the loss curve"])
        self.title(0, f"Done in {human_time(self.phases.total())}")
        for line in phase_lines(self.phases, self.console.paint)[:-1]:
            self.console.line(line)
        self.console.line()
        self.console.table(made, [f"in {self.out}", ""])
        self.console.line()
        self.console.line(self.console.paint("  What to try next", "bold"))
        out, run = self.out, f"{command()} train {self.run_file}"
        other_text = Path(sysconfig.get_path("stdlib")) / "asyncio"
        for why, what in (
            ("the same on one process: compare its losses", f"{run} parallel.tp=1 parallel.dp=1 out={out}-one"),
            ("a wider model", f"{run} model.hidden_size=256 model.num_heads=8 out={out}-wide"),
            ("look into the dataset", f"{command()} data inspect {out / 'data' / 'corpus'}"),
            ("another text (any file or folder)", f"{command()} demo --text {other_text} --out {out}-text"),
        ):
            self.console.line(f"  {self.console.paint('# ' + why, 'dim')}")
            self.console.line(f"  {what}")

    def title(self, number: int, text: str) -> None:
        """The line above a stage."""
        self.console.line()
        self.console.rule(f"{number} · {text}" if number else text)

    def result(self, what: str, path: Path) -> None:
        """What a stage has made, and where it lies."""
        self.console.line(f"  {what}  {self.console.paint(f'→ {path}', 'green')}")

    def unchanged(self, stage: str, inputs: object, *results: Path) -> bool:
        """Whether a stage need not be done again, and says so; else its stamp is taken away until it is done."""
        if self.stamps.current(stage, inputs, *results):
            self.console.line(f"  {self.console.paint('unchanged since last time, used again', 'dim')}")
            return True
        self.stamps.begin(stage)
        return False

    def passing(self, text: str) -> None:
        """A line that the next one replaces; terminals only."""
        self.console.progress(f"  {text}")


def mtime(path: str) -> int:
    """When the file was last written, in nanoseconds."""
    return Path(path).stat().st_mtime_ns


def vocabulary_for(num_bytes: int) -> int:
    """Tokens that so much text can teach a small model: a power of two from 512 to 4096."""
    return 2 ** max(9, min(12, (num_bytes // 400).bit_length() - 1))


def run_file_text(config: RunConfig) -> str:
    """The run as TOML, only the keys that differ from the defaults."""
    usual = flatten(RunConfig())
    sections: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        if value != usual[name]:
            section, _, key = name.rpartition(".")
            sections.setdefault(section, []).append(f"{key} = {toml_value(value)}")
    lines = [
        "# Written by `megacore demo`; `megacore config explain KEY` says what a key means.",
        *sections.pop("", []),
    ]
    for section, keys in sections.items():
        lines += ["", f"[{section}]", *keys]
    return "\n".join(lines) + "\n"


def finished(out: Path) -> bool:
    """Whether the run in the folder came to its end."""
    path = out / EVENTS
    return path.exists() and any(event["event"] == "finish" for event in read_json_lines(path))


def command() -> str:
    """How the user can call megacore from here."""
    if shutil.which("megacore"):
        return "megacore"
    beside = Path(sys.executable).parent / "megacore"  # a virtual environment that is not activated
    if beside.exists():
        return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return f"{sys.executable} -m megacore"


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.demo", sys.argv[1:]))

"""`megacore demo`: from real text to a trained language model on this machine, in a few minutes.

Text found on any machine with Python (or your own) becomes a tokenizer, a dataset and a small Llama-like model, trained
with tensor and data parallelism on four local processes. A second call uses again what is there and unchanged.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.write import flatten, toml_value
from megacore.data import python_corpus
from megacore.data.files import write_atomic
from megacore.data.prepare import Progress, prepare
from megacore.data.text.blocks import ReadOptions, read_blocks
from megacore.data.text.documents import documents
from megacore.data.text.sources import find_sources
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.launch.terminal import colour_wanted, page_width
from megacore.monitor.console import Console, Phases, human_count, human_time, phase_lines
from megacore.monitor.curves import read_curves, terminal_curve
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.plots import save_loss_plot
from megacore.monitor.run_folder import CURVE, EVENTS
from megacore.spec import ModelSpec

SOURCE_BYTES = 1_500_000  # of library source code, beside all topics and docstrings
USER_BYTES = 20_000_000  # of the user's text: more would not be read in a few minutes of training
LEAST_BYTES = 20_000  # a smaller text teaches nothing
PROMPTS = ('The "for" statement', "def ", "Return the")
FAST_STEPS, FAST_BYTES = 40, 600_000


def main(argv: list[str] | None = None) -> int:
    """The tour; returns the exit code."""
    args = parser().parse_args(argv)
    console = Console(sys.stdout, colour=colour_wanted(sys.stdout), width=page_width())
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1; the usual number is {preset().train.steps}")
    return Demo(args, console).run()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore demo", description=__doc__.partition(": ")[2])
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH", help="your own files or folders to learn from")
    parser.add_argument("--steps", type=int, metavar="N", help=f"training steps (default {preset().train.steps})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default runs/demo)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens in the vocabulary (default: by corpus size)")
    parser.add_argument("--fast", action="store_true", help="less text and few steps, to see that everything works")
    parser.add_argument("--fresh", action="store_true", help="make everything anew (an earlier run is kept aside)")
    return parser


def preset() -> RunConfig:
    """The model and the training settings of the tour."""
    return load(None, preset="demo")


class Stamps:
    """What every stage was last made from, in out/demo.json: a stage is done again only if that has changed."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.made: dict[str, str] = json.loads(path.read_text()) if path.exists() and not fresh else {}

    def current(self, stage: str, inputs: Any, *results: Path) -> bool:
        """Whether the stage's results are there and were made from these inputs."""
        return self.made.get(stage) == fingerprint(inputs) and all(path.exists() for path in results)

    def set(self, stage: str, inputs: Any) -> str:
        """Notes that the stage is done; returns the fingerprint, an input of the stages after it."""
        self.made[stage] = fingerprint(inputs)
        write_atomic(self.path, json.dumps(self.made, indent=1).encode())
        return self.made[stage]


def fingerprint(inputs: Any) -> str:
    """16 hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
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
        self.reused: list[str] = []

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
        if self.stamps.current("text", inputs, path):
            self.reuse("text", path)
        else:
            texts = list(self.user_texts() if self.args.text else self.python_texts())
            size = sum(len(text.encode("utf-8")) for text in texts)
            if size < LEAST_BYTES:
                raise ValueError(f"--text holds {size:,} bytes of text, too few to learn from; give {LEAST_BYTES:,} or more")
            # Pieces, so that even one huge book gives a validation split; shuffled, so that it holds some of everything.
            cut = [part for text in texts for part in python_corpus.pieces(text, min(12_000, size // 200))]
            random.Random(0).shuffle(cut)
            write_atomic(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in cut).encode())
            self.stamps.set("text", inputs)
        lines = path.read_bytes().splitlines()
        corpus = Corpus(path, len(lines), sum(map(len, lines)))
        self.result(f"{corpus.num_bytes / 1e6:.1f} MB of text in {corpus.num_documents:,} documents", path)
        return corpus

    def python_texts(self) -> Iterator[str]:
        """The text that comes with Python."""
        files = python_corpus.library_files()
        every = [("pages of the language reference", python_corpus.topics())]
        if not self.args.fast:
            every.append(("modules' docstrings", python_corpus.docstrings(files)))
            every.append(("source files of the library", python_corpus.sources(files, SOURCE_BYTES)))
        for name, texts in every:
            self.console.progress(f"  reading {name} ...")
            found = list(texts)
            size = sum(map(len, found)) / 1e6
            self.console.line(f"  {len(found):>5} {name:<34} {size:5.2f} MB")
            yield from found

    def user_texts(self) -> Iterator[str]:
        """The text of the user's files, of any kind that `megacore data prepare` reads."""
        options = ReadOptions(errors="skip")
        left = FAST_BYTES if self.args.fast else USER_BYTES
        for block in read_blocks(find_sources(self.args.text), options):
            yield from documents(block, options).texts
            left -= block.num_bytes
            if left < 0:
                self.console.line(f"  the first {USER_BYTES / 1e6:.0f} MB of it are enough for a few minutes")
                return

    def tokenizer(self, corpus: Corpus) -> Tokenizer:
        """Stage 2: a SentencePiece vocabulary learned from the text."""
        self.title(2, "Tokenizer")
        path = self.out / "tokenizer.model"
        size = self.args.vocab_size or vocabulary_for(corpus.num_bytes)
        inputs = [self.stamps.made["text"], size]
        if self.stamps.current("tokenizer", inputs, path):
            self.reuse("tokenizer", path)
        else:
            train_sentencepiece(
                [str(corpus.path)], str(path), size, overwrite=True, on_progress=lambda text: self.console.progress(f"  {text}")
            )
            self.stamps.set("tokenizer", inputs)
        tokenizer = open_tokenizer(str(path))
        self.result(f"{tokenizer.vocab_size:,} tokens, learned from the text", path)
        example = openings(corpus.path, 1, 60)[0] if self.args.text else 'The "for" statement iterates over the elements'
        self.console.line("  " + self.split(tokenizer, example))
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
        inputs = [self.stamps.made["tokenizer"]]
        results = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
        if self.stamps.current("dataset", inputs, *results):
            self.reuse("dataset", prefix)
            self.result("token ids, memory-mapped", results[0])
            return prefix
        workers = max(1, min(4, os.cpu_count() or 1))

        def show(progress: Progress) -> None:
            self.console.progress(f"  {progress.consumed / max(progress.total, 1):4.0%}  {progress.num_tokens:,} tokens")

        done = prepare([str(corpus.path)], tokenizer.spec, str(prefix), workers=workers, overwrite=True, on_progress=show)
        self.stamps.set("dataset", inputs)
        each = done.num_bytes / max(done.num_tokens, 1)
        self.result(f"{done.num_tokens:,} tokens, {each:.2f} bytes each, by {workers} worker processes", results[0])
        return prefix

    def configure(self, corpus: Corpus, tokenizer: Tokenizer, prefix: Path) -> RunConfig:
        """The run file: the preset with this tour's data, layout and length."""
        base = preset()
        steps = self.args.steps or (FAST_STEPS if self.args.fast else base.train.steps)
        prompts = openings(corpus.path, len(PROMPTS), 24) if self.args.text else PROMPTS
        part = max(1, steps // 8)
        config = replace(
            base,
            model=replace(base.model, vocab_size=tokenizer.vocab_size),
            parallel=replace(base.parallel, tp=2, dp=2),
            train=replace(base.train, steps=steps, device="cpu", eval_every=part, eval_steps=4),
            optim=replace(base.optim, warmup_steps=min(base.optim.warmup_steps, steps // 4)),
            data=replace(base.data, blend=((1.0, str(prefix)),), split=(96.0, 4.0, 0.0), tokenizer=tokenizer.spec),
            log=replace(
                base.log,
                every=max(1, steps // 200),
                console_every=max(1, steps // 20),
                sample_every=2 * part,
                sample_prompts=tuple(prompts),
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
        if self.stamps.current("training", inputs) and finished(self.out):
            self.reuse("training", self.out / "metrics.jsonl")
            self.console.line("  this very model is trained already; --fresh makes everything anew")
            return 0
        from megacore.launch.train import main as train

        self.console.line(self.console.paint(f"$ {command()} train {self.run_file}", "bold"))
        code = train([str(self.run_file)])
        if code == 0:
            self.stamps.set("training", inputs)
        return code

    def curve(self, config: RunConfig) -> None:
        """Stage 5: the loss, in the terminal and as a picture."""
        self.title(5, "Loss")
        curves = read_curves(self.out)
        for line in terminal_curve(curves, min(self.console.width - 2, 100), 14, self.console.paint):
            self.console.line(line)
        model = resolve(config, 4).model
        title = f"{human_count(ModelSpec.of(model).num_params)} parameters on {human_count(curves.tokens)} tokens"
        layers = f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size:,}"
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
        paint = self.console.paint
        samples = [event for event in read_json_lines(self.out / EVENTS) if event["event"] == "sample"]
        if not samples:
            return
        first, last = samples[0]["step"], samples[-1]["step"]
        for step in dict.fromkeys((first, last)):
            self.console.line(f"  {paint(f'after {step} steps', 'dim')}")
            for sample in samples:
                if sample["step"] == step:
                    head, *rest = (paint(sample["prompt"], "bold") + sample["text"].rstrip()).split("\n")
                    self.console.line(f"  {paint('▌', 'green')} {head}")
                    for line in rest:
                        self.console.line(f"  {paint('▌', 'green')} {line}")
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
        out, run = self.out, f"{command()} train {self.run_file}"
        self.console.line()
        self.console.line(self.console.paint("  What to try next", "bold"))
        tries = [
            ["the same on one process: the losses agree to round-off", f"{run} parallel.tp=1 parallel.dp=1 out={out}-one"],
            ["a wider model", f"{run} model.hidden_size=256 model.num_heads=8 out={out}-wide"],
            ["look into the dataset", f"{command()} data inspect {out / 'data' / 'corpus'}"],
            ["your own text (any file or folder)", f"{command()} demo --text {out / 'corpus.jsonl'} --out {out}-mine"],
        ]
        for why, what in tries:
            self.console.line(f"  {self.console.paint('# ' + why, 'dim')}")
            self.console.line(f"  {what}")

    def title(self, number: int, text: str) -> None:
        """The line above a stage."""
        self.console.line()
        self.console.rule(f"{number} · {text}" if number else text)

    def result(self, what: str, path: Path) -> None:
        """What a stage has made, and where it lies."""
        self.console.line(f"  {what}  {self.console.paint(f'→ {path}', 'green')}")

    def reuse(self, stage: str, path: Path) -> None:
        """Says that a stage need not be done again."""
        self.reused.append(stage)
        self.console.line(f"  {self.console.paint('unchanged since last time, used again', 'dim')}")


def mtime(path: str) -> int:
    """When the file was last written, in nanoseconds."""
    return Path(path).stat().st_mtime_ns


def vocabulary_for(num_bytes: int) -> int:
    """Tokens that so much text can teach a small model: a power of two from 512 to 4096."""
    return 2 ** max(9, min(12, (num_bytes // 400).bit_length() - 1))


def openings(corpus: Path, count: int, length: int) -> list[str]:
    """The first words of `count` documents: something to continue, in the corpus' own language."""
    found: list[str] = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = next(filter(None, map(str.strip, json.loads(line)["text"].splitlines())), "")
            words = text[:length].rsplit(" ", 1)[0] if len(text) > length else text
            if len(words) >= min(8, length // 2) and words not in found:
                found.append(words)
            if len(found) == count:
                break
    return found or ["The"]


def run_file_text(config: RunConfig) -> str:
    """The run as TOML, only the keys that differ from the defaults."""
    usual = flatten(RunConfig())
    sections: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        if value != usual[name]:
            section, _, key = name.rpartition(".")
            sections.setdefault(section, []).append(f"{key} = {toml_value(value)}")
    lines = ["# Written by `megacore demo`; `megacore config explain KEY` says what a key means.", *sections.pop("", [])]
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
    from megacore.__main__ import run

    sys.exit(run("megacore.tools.demo", sys.argv[1:]))

"""The run file: the preset `demo` with this tour's data, layout and length."""

from dataclasses import replace
from pathlib import Path

from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.config.write import to_toml
from megacore.data import found_text
from megacore.data.files import write_atomic
from megacore.data.tokenizers import Tokenizer
from megacore.demo.text import Corpus
from megacore.demo.workshop import Workshop

FAST_STEPS = 40
PROMPTS = ('The "for" statement', "def ", "Return the")
HEADER = "# Written by `megacore demo`; `megacore config explain KEY` says what a key means.\n\n"


def write_run_file(shop: Workshop, corpus: Corpus, tokenizer: Tokenizer, prefix: Path) -> RunConfig:
    """Settle the run and write it for `megacore train`."""
    base, options = load(None, preset="demo"), shop.options
    steps = options.steps or (FAST_STEPS if options.fast else base.train.steps)
    prompts = found_text.openings(corpus.path, len(PROMPTS), 24) if options.text else list(PROMPTS)
    shown = max(1, steps // 24)  # evaluations and samples fall on steps that are shown
    config = replace(
        base,
        model=replace(base.model, vocab_size=tokenizer.vocab_size),
        parallel=replace(base.parallel, tp=2, pp=2),
        train=replace(base.train, steps=steps, device="cpu", eval_every=3 * shown, eval_steps=4),
        optim=replace(base.optim, warmup_steps=min(base.optim.warmup_steps, steps // 4)),
        data=replace(base.data, blend=((1.0, str(prefix)),), split=(96.0, 4.0, 0.0), tokenizer=tokenizer.spec),
        checkpoint=replace(base.checkpoint, save_every=max(1, steps // 3), keep=2),
        log=replace(
            base.log,
            every=max(1, steps // 200),
            console_every=shown,
            sample_every=6 * shown,
            sample_prompts=tuple(prompts),
            sample_tokens=64,
            timeline_step=max(1, steps // 2),
        ),
        out=str(shop.out),
    )
    write_atomic(shop.run_file, run_file_text(config).encode("utf-8"))
    return config


def run_file_text(config: RunConfig) -> str:
    """The run as TOML, only the keys that differ from the defaults."""
    return HEADER + to_toml(config, usual=RunConfig())

"""What the tour shows around the stages: a welcome, the loss, texts that the model wrote, what to try next."""

import sysconfig
from pathlib import Path

from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.cost.plot.terminal import terminal_picture
from megacore.cost.trace import read_timeline
from megacore.demo.workshop import Workshop
from megacore.monitor.console import human_count, human_time, phase_lines
from megacore.monitor.curves import read_curves, terminal_curve
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.plots import save_loss_plot
from megacore.monitor.run_folder import CURVE, EVENTS, TIMELINE, TIMELINE_PICTURE
from megacore.spec import ModelSpec

MADE = (
    ("corpus.jsonl", "the text"),
    ("tokenizer.model", "SentencePiece vocabulary"),
    ("data/corpus.bin, .idx", "tokens, in Megatron-LM's format"),
    ("run.toml", "the run: model, layout, training; change and train again"),
    ("metrics.jsonl, events.jsonl", "every figure, and what happened"),
    ("timeline.json", "one step of all ranks, for ui.perfetto.dev"),
    ("checkpoints", "all state: killed, the run goes on from the last one, on any layout"),
    ("hf", "the model with its tokenizer, for transformers"),
    ("log.txt, config.toml", "the console, and the resolved run"),
)


def welcome(shop: Workshop) -> None:
    """What is going to happen."""
    options = shop.options
    what = "a small corpus" if options.fast else "your text" if options.text else "Python's own documentation"
    shop.console.box(
        "megacore demo",
        [
            f"{what} → tokenizer → dataset → training → text → a Hugging Face model",
            "tensor parallel 2 × pipeline parallel 2: four processes on this machine's CPU",
            f"everything goes to {shop.out}",
        ],
    )


def pipeline(shop: Workshop) -> None:
    """Stage 5: when each stage of the pipeline worked, in one step that was timed."""
    shop.title("5 · The pipeline in one step")
    console = shop.console
    measured = read_timeline(shop.out / TIMELINE)
    for line in terminal_picture(measured, min(console.width - 2, 100), console.paint if console.live else None):
        console.line(line)
    console.line()
    for what, name in (("expected above measured", TIMELINE_PICTURE), ("the same as a trace for Perfetto", TIMELINE)):
        if (shop.out / name).exists():
            shop.result(what, shop.out / name)


def loss(shop: Workshop, config: RunConfig) -> None:
    """Stage 6: the loss, in the terminal and as a picture."""
    shop.title("6 · Loss")
    console, curves = shop.console, read_curves(shop.out)
    for line in terminal_curve(curves, min(console.width - 2, 100), 14, console.paint):
        console.line(line)
    console.line()
    model = resolve(config, 4).model
    title = f"{human_count(ModelSpec.of(model).num_params)} parameters on {human_count(curves.tokens)} tokens"
    shape = f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size:,}"
    picture = shop.out / CURVE
    try:
        save_loss_plot(curves, picture, f"megacore demo: {title}", f"{shape}; tp=2 × pp=2 on four CPU processes")
    except ValueError as missing:
        console.line(f"  no picture: {missing}")
    else:
        shop.result("the same as a picture", picture)


def samples(shop: Workshop) -> None:
    """Stage 7: how the model wrote early on, and how it writes now."""
    shop.title("7 · Text that the model writes")
    every = [event for event in read_json_lines(shop.out / EVENTS) if event["event"] == "sample"]
    steps = sorted({sample["step"] for sample in every})
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        shop.console.line(f"  {shop.console.paint(f'after {step} steps', 'bold')}")
        for sample in every:
            if sample["step"] == step:
                _sample(shop, sample["prompt"], sample["text"], "green" if step == steps[-1] else "yellow")


def goodbye(shop: Workshop, command: str, steps: int) -> None:
    """What was made, where it lies, what to try next; `command` is how the user calls megacore from here, `steps` how
    long the model was trained."""
    console, out = shop.console, shop.out
    shop.title(f"Done in {human_time(shop.phases.total())}")
    for line in phase_lines(shop.phases, console.paint)[:-1]:
        console.line(line)
    console.line()
    picture = [(CURVE, "the loss curve")] if (out / CURVE).exists() else []
    console.table([*MADE, *picture], [f"in {out}", ""])
    console.line()
    console.line(console.paint("  What to try next", "bold"))
    run = f"{command} train {shop.run_file}"
    other_text = Path(sysconfig.get_path("stdlib")) / "asyncio"
    for why, what in (
        ("the same on one process: compare its losses", f"{run} parallel.tp=1 parallel.pp=1 out={out}-one"),
        (
            "go on from its checkpoint, in another layout",
            f"{run} checkpoint.resume={out} train.steps={steps + steps // 2} parallel.tp=1 parallel.zero=1 "
            f"parallel.pp=1 out={out}-more --nproc 2",
        ),
        ("what is in the checkpoint", f"{command} inspect {out}"),
        ("another schedule", f"{run} parallel.schedule=zb-v out={out}-zb-v"),
        ("what schedules cost", f"{command} schedule zb-h1 --stages 4 --microbatches 8"),
        ("a wider model", f"{run} model.hidden_size=256 model.num_heads=8 out={out}-wide"),
        ("look into the dataset", f"{command} data inspect {out / 'data' / 'corpus'}"),
        ("another text (any file or folder)", f"{command} demo --text {other_text} --out {out}-text"),
    ):
        console.line(f"  {console.paint('# ' + why, 'dim')}")
        console.line(f"  {what}")


def _sample(shop: Workshop, prompt: str, text: str, style: str) -> None:
    """One text with a bar beside it, the prompt in bold."""
    console = shop.console
    written = console.paint(prompt, "bold") + text.rstrip()
    for line in filter(str.strip, written.split("\n")):
        console.line(f"  {console.paint('▌', style)} {line}")
    console.line()

"""Stage 8: the trained model as a Hugging Face folder, and whether `transformers` computes the same with it."""

from functools import partial

from megacore.checkpoint.find import CHECKPOINTS
from megacore.checkpoint.hf.export import Exported, export
from megacore.checkpoint.read import Checkpoint
from megacore.demo.workshop import Workshop
from megacore.monitor.console import human_bytes
from megacore.verify import transformers_oracle as oracle
from megacore.verify.conversion import LIMIT, verify

HF = "hf"
NUM_TOKENS = 256


def to_huggingface(shop: Workshop) -> None:
    """Export the last checkpoint, whatever layout saved it, unless that was done.

    Raises ValueError where the exported model is not the trained one.
    """
    shop.title("8 · As a Hugging Face model")
    target = shop.out / HF
    source = Checkpoint.open(str(shop.out / CHECKPOINTS))
    inputs = [source.manifest.step, [each.header_hash for each in source.manifest.files], shop.stamps.made["training"]]
    if shop.unchanged("hf", inputs, target / "config.json"):
        return
    layout = " × ".join(f"{axis}={source.manifest.layout[axis]}" for axis in ("tp", "pp"))
    size = human_bytes(source.manifest.num_bytes)
    shop.result(f"checkpoint of step {source.manifest.step}: {size} saved by {layout}", shop.out / CHECKPOINTS)
    done: Exported = export(source, str(target), force=True, reopen=partial(Checkpoint.open, source.store.describe()))
    shop.result(f"{done.model_type} model with tokenizer, {human_bytes(done.num_bytes)}", target)
    for note in done.notes:
        shop.console.line(f"  {note}")
    _compare(shop, source, str(target))
    shop.stamps.done("hf", inputs)


def _compare(shop: Workshop, source: Checkpoint, target: str) -> None:
    verdict = verify(source.store.describe(), target, NUM_TOKENS, lambda text: shop.passing(text))
    if not verdict.agrees:
        raise ValueError(
            f"{target} is not the model that was trained: {verdict.to_json()}; this is a fault of megacore"
        )
    w = verdict.weights
    shop.console.line(f"  {w.equal} of {w.num} weights are equal bit for bit")
    for what, far in verdict.logits:
        shop.console.line(f"  logits of {what}: largest difference {far:.1e} (allowed {LIMIT:.0e})")
    if not oracle.is_installed():
        shop.console.line("  the package transformers is not installed, so it was not asked; pip install transformers")

"""`megacore convert verify`: two models at two places, weight by weight and logit by logit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megacore.checkpoint.hf.folder import is_hf_folder
from megacore.checkpoint.opening import open_weights
from megacore.checkpoint.source import WeightSource
from megacore.checkpoint.store import open_store
from megacore.verify import transformers_oracle as oracle
from megacore.verify.weights import (
    Compared,
    compare_weights,
    engine_logits,
    largest,
    made_up_tokens,
    model_differences,
)

LIMIT = 1e-4
"""Of the largest difference between logits in float32."""


@dataclass(frozen=True)
class Verdict:
    """``logits``: what was compared and the largest difference, in order."""

    weights: Compared
    model: tuple[str, ...]
    logits: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the conversion is right."""
        return self.weights.agrees and not self.model and all(far <= LIMIT for _, far in self.logits)

    def to_json(self) -> dict[str, Any]:
        """All of it; a difference that is no number is null."""
        w = self.weights
        return {
            "agree": self.agrees,
            "weights": {
                "number": w.num,
                "equal": w.equal,
                "rounded": w.rounded,
                "different": list(w.different),
                "max_difference": w.max_difference,
            },
            "model": list(self.model),
            "logits": [{"of": of, "max_difference": None if far == float("inf") else far} for of, far in self.logits],
            "notes": list(self.notes),
        }


def verify(one: str, other: str, num_tokens: int, say: Callable[[str], object]) -> Verdict:
    """Compare the weights at two paths and then logits, with the oracle where one is an HF folder.

    Raises ValueError where a path holds no weights or the models have other parameters.
    """
    if num_tokens < 2:
        raise ValueError(f"--tokens {num_tokens} must be at least 2")
    sources = [open_weights(path) for path in (one, other)]
    say(f"weights of {sources[0].what} and {sources[1].what}")
    weights = compare_weights(*sources)
    differences = model_differences(sources[0].model, sources[1].model)
    token_bs = made_up_tokens(min((each.model for each in sources), key=lambda model: model.vocab_size), num_tokens)
    folder = next((path for path in (other, one) if is_hf_folder(path)), None)
    if folder is None or not oracle.is_installed():
        why = "neither is an HF folder" if folder is None else "the package transformers is not installed"
        say("logits of both by the engine")
        far = largest(*(engine_logits(source, token_bs) for source in sources))
        note = (f"logits were compared between both by the engine alone: {why}",)
        return Verdict(weights, tuple(differences), (("engine, both", far),) if weights.is_exact else (), note)
    ours, notes = sources[0 if folder == other else 1], []
    if not weights.is_exact:
        ours = sources[1 if folder == other else 0]
        notes.append("not all weights are the same bits, so both logits are of the HF folder's")
    found = _against_oracle(ours, folder, token_bs, say)
    return Verdict(weights, tuple(differences), tuple(found), tuple(notes))


def _against_oracle(
    ours: WeightSource, folder: str, token_bs: Tensor, say: Callable[[str], object]
) -> list[tuple[str, float]]:
    """(what, largest difference) of the engine's logits and those of transformers, on random tokens and on text."""
    batches = [("random tokens", token_bs)]
    has_text = not {"tokenizer.json", "tokenizer.model", "vocab.json"}.isdisjoint(open_store(folder).names())
    text_bs = oracle.text_tokens(folder) if has_text else None
    if text_bs is not None and int(text_bs.max()) < ours.model.vocab_size:
        batches.append(("text", text_bs[:, : max(1, ours.model.max_positions)]))
    found = []
    for what, batch in batches:
        say(f"logits of {batch.numel()} {what.removeprefix('random ')} by the engine and by transformers")
        far = largest(engine_logits(ours, batch), oracle.oracle_logits(folder, batch))
        found.append((f"{what}, engine and transformers", far))
    return found

"""`transformers` as an oracle: the only place of the library that imports it, and only if it is there."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905 a clerk in Bern wrote four papers; "
    "def f(x): return x ** 2  # and this is code"
)


def is_installed() -> bool:
    """Whether there is an oracle."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def oracle_logits(folder: str, token_bs: Tensor) -> Tensor:
    """[b, s, V] of the HF folder's model in float32, with plain attention. Raises ValueError where it does not load."""
    import transformers

    try:
        with _quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception as reason:  # it raises what it pleases
        raise ValueError(f"transformers does not load {folder}: {type(reason).__name__}: {reason}") from reason
    logits: Tensor = model.eval()(token_bs, use_cache=False).logits
    return logits


def text_tokens(folder: str) -> Tensor | None:
    """[1, s]: a text in the tokens of the HF folder's tokenizer; None where AutoTokenizer loads none."""
    import transformers

    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            ids: list[int] = tokenizer(TEXT)["input_ids"]
    except Exception:  # a folder without a tokenizer fails in as many ways as there are tokenizers
        return None
    return torch.tensor([ids]) if ids else None


class _quiet:
    """Keeps the oracle's progress and warnings off the screen."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.logging: Any = logging
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        self.logging.enable_progress_bar()

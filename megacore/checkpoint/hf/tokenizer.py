"""The tokenizer's files of an exported folder, such that AutoTokenizer loads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from megacore.checkpoint.hf.folder import TOKENIZER
from megacore.checkpoint.hf.sentencepiece_json import SentencePiece, byte_level_json
from megacore.checkpoint.hf.strict_json import read_object, write_object
from megacore.data.tokenizers.bytes import END_OF_DOCUMENT
from megacore.data.tokenizers.huggingface import END_OF_DOCUMENT_NAMES

JSON, CONFIG, MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
BEGIN, END = "<s>", ("<|endoftext|>", "<eod>", "<EOD>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True)
class TokenizerFiles:
    """``files`` by name; ``ids`` are those of special tokens as config.json has them; ``notes`` for the user."""

    files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    ids: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()


def tokenizer_files(attachments: Mapping[str, bytes], name: str = "") -> TokenizerFiles:
    """From what came with the weights, under tokenizer/; ``name`` is ``data.tokenizer`` where nothing did.

    Files of HF's go through as they are. A SentencePiece model, and `bytes`, become a tokenizer.json.
    """
    own = {key.removeprefix(TOKENIZER): data for key, data in attachments.items() if key.startswith(TOKENIZER)}
    if not own:
        return _built_in(name)
    models = [key for key in own if key.endswith(".model")]
    if JSON not in own and models and CONFIG not in own:
        return _of_sentencepiece(own, models[0])
    others = [key for key in own if key.endswith(".json")]
    if JSON not in own and len(own) == 1 and others:  # FILE.json
        own = {JSON: own[others[0]]}
    if JSON in own and CONFIG not in own:
        names = {token.get("content") for token in _added(own[JSON])}
        end = next((each for each in END_OF_DOCUMENT_NAMES if each in names), None)
        own[CONFIG] = _config(None, end, None)
    return TokenizerFiles(own, _ids(own))


def _built_in(name: str) -> TokenizerFiles:
    if name == "bytes":
        files = {JSON: write_object(byte_level_json(END_OF_DOCUMENT)), CONFIG: _config(None, END_OF_DOCUMENT, None)}
        return TokenizerFiles(files, _ids(files))
    if name.startswith("tiktoken:"):
        why = f"the folder has no tokenizer: {name} has no files; load it with the package tiktoken"
    else:
        why = "the folder has no tokenizer: none came with the weights; put its files there"
    return TokenizerFiles(ids=_tokens(None, None), notes=(why,))


def _of_sentencepiece(own: Mapping[str, bytes], name: str) -> TokenizerFiles:
    model = SentencePiece.of(own[name])
    special = model.special()
    begin = BEGIN if BEGIN in special else None
    end = next((each for each in END if each in special), None)
    unknown = next((piece.text for piece in model.pieces if piece.type == 2), None)
    files = {MODEL: own[name]}
    try:
        files[JSON] = write_object(model.to_json())
    except ValueError as reason:
        note = f"{MODEL} is written as it is, and AutoTokenizer may not load it: {reason}"
        return TokenizerFiles(files, _tokens(None, None), (note,))
    files[CONFIG] = _config(begin, end, unknown)
    return TokenizerFiles(files, _ids(files))


def _config(begin: str | None, end: str | None, unknown: str | None) -> bytes:
    tokens = {"bos_token": begin, "eos_token": end, "unk_token": unknown}
    return write_object(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: token for key, token in tokens.items() if token is not None},
        }
    )


def _ids(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """Ids of the first and the last token of a text, as far as the files say."""
    if JSON not in files or CONFIG not in files:
        return _tokens(None, None)
    ids = {token.get("content"): token.get("id") for token in _added(files[JSON])}
    config = read_object(files[CONFIG], f"the {CONFIG} that came with the weights")
    named = [config.get(f"{which}_token") for which in ("bos", "eos")]
    begin, end = (ids.get(token.get("content") if isinstance(token, dict) else token) for token in named)
    return _tokens(begin, end)


def _tokens(begin: Any, end: Any) -> Mapping[str, Any]:
    return MappingProxyType({"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None})


def _added(data: bytes) -> list[dict[str, Any]]:
    added = read_object(data, f"the {JSON} that came with the weights").get("added_tokens")
    return [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []

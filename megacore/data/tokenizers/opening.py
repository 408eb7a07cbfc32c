"""From a tokenizer's name, as users write it, to the tokenizer."""

from pathlib import Path

from megacore.data.tokenizers.base import Tokenizer

CHOICES = "bytes, a SentencePiece FILE.model, a tokenizer.json or its folder, or tiktoken:NAME"


def open_tokenizer(spec: str) -> Tokenizer:
    """Open the tokenizer that `spec` names: "bytes", FILE.model, FILE.json, a folder or "tiktoken:NAME".

    Only the library that this tokenizer needs is imported.

    Raises:
        ValueError: there is no such tokenizer, its file is damaged, or its library is not installed; says what to do.
    """
    if spec == "bytes":
        from megacore.data.tokenizers.bytes import ByteTokenizer

        return ByteTokenizer()
    if spec.startswith("tiktoken:"):
        from megacore.data.tokenizers.tiktoken_names import TiktokenTokenizer

        return TiktokenTokenizer(spec.removeprefix("tiktoken:"))
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        raise ValueError(f"data.tokenizer={spec!r}: there is no such file or folder; a tokenizer is {CHOICES}")
    try:
        return _open_path(path)
    except OSError as reason:
        raise ValueError(f"data.tokenizer={spec!r} cannot be read: {reason.strerror}") from reason


def _open_path(path: Path) -> Tokenizer:
    if path.is_dir():
        json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
        if not json_file.exists() and not model_file.exists():
            raise ValueError(f"data.tokenizer={str(path)!r}: the folder has neither tokenizer.json nor tokenizer.model")
        if not json_file.exists():
            path = model_file
    if path.is_dir() or path.suffix == ".json":
        from megacore.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        from megacore.data.tokenizers.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    raise ValueError(f"data.tokenizer={str(path)!r}: unknown kind of file; a tokenizer is {CHOICES}")

"""How files become documents: the user's choices. (No imports: the command line shows them without loading numpy.)"""

from dataclasses import dataclass

FORMATS = ("auto", "text", "jsonl", "parquet")
DOCUMENTS = ("file", "line", "paragraph")
ERRORS = ("strict", "replace", "skip")


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    format: str = "auto"
    """text, jsonl or parquet; auto: by the file's name."""
    json_key: str = "text"
    """The field (JSON) or column (Parquet) that holds the text."""
    documents: str = "file"
    """In plain text a document is a whole file, a line, or a paragraph (between blank lines)."""
    errors: str = "strict"
    """A broken document (bad UTF-8 or JSON): stop; put U+FFFD for bad bytes (replace); leave it out (skip)."""

    def __post_init__(self) -> None:
        rules = (
            ("format", self.format, FORMATS),
            ("documents", self.documents, DOCUMENTS),
            ("errors", self.errors, ERRORS),
        )
        for name, value, choices in rules:
            if value not in choices:
                raise ValueError(f"--{name} {value} is not known; choose {', '.join(choices)}")

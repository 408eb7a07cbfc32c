"""Which tokenizer a run uses: the one it names, else the one its data was made with; and that both are the same."""

from collections.abc import Mapping
from pathlib import Path

from megacore.config.schema import DataConfig
from megacore.data.meta import DataMeta
from megacore.data.tokenizers import Tokenizer, open_tokenizer


def resolve_tokenizer(data: DataConfig, metas: Mapping[str, DataMeta]) -> Tokenizer | None:
    """The tokenizer of a run; None if neither `data.tokenizer` nor any data set names one.

    Args:
        data: the `data` section.
        metas: the facts of its data sets, by prefix.

    Raises:
        ValueError: the tokenizer cannot be opened, or a data set was made with another one.
    """
    noted = [prefix for prefix, meta in metas.items() if meta.tokenizer and meta.tokenizer_hash]
    if data.tokenizer:
        tokenizer = open_tokenizer(data.tokenizer)
    elif noted:
        tokenizer = open_recorded(noted[0], metas[noted[0]])
    else:
        return None
    for prefix in noted:
        _check_same(prefix, metas[prefix], tokenizer, given=bool(data.tokenizer))
    return tokenizer


def open_recorded(prefix: str, meta: DataMeta) -> Tokenizer:
    """The tokenizer that a data set was made with: where it was then, or beside the data set.

    Raises:
        ValueError: it is in neither place, or its content has changed since.
    """
    recorded = meta.tokenizer or ""
    beside = Path(prefix).parent / Path(recorded).name
    is_path = recorded != "bytes" and not recorded.startswith("tiktoken:")
    if is_path and not Path(recorded).exists():
        if not beside.exists():
            raise ValueError(
                f"{prefix} was made with the tokenizer {recorded!r}, which is not there any more; put it back, copy it "
                f"to {beside}, or name its new place in data.tokenizer"
            )
        recorded = str(beside)
    tokenizer = open_tokenizer(recorded)
    _check_same(prefix, meta, tokenizer, given=False)
    return tokenizer


def _check_same(prefix: str, meta: DataMeta, tokenizer: Tokenizer, given: bool) -> None:
    if meta.tokenizer_hash in (None, tokenizer.hash):
        return
    hashes = f"{(meta.tokenizer_hash or '')[:12]} then, {tokenizer.hash[:12]} now"
    if given:
        raise ValueError(
            f"data.tokenizer={tokenizer.spec!r} is not the tokenizer that {prefix} was made with ({meta.tokenizer!r}; "
            f"content hash {hashes}): its ids would mean other text; leave data.tokenizer empty to use the data's own"
        )
    raise ValueError(
        f"{prefix} was made with the tokenizer {meta.tokenizer!r}, but {tokenizer.spec!r} is another one (content hash "
        f"{hashes}): the file has changed, or the data sets of data.blend differ; prepare all of them with one"
    )

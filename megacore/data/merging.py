"""Several data sets as one."""

from collections.abc import Sequence

from megacore.data.indexed import IndexedDataset, merge
from megacore.data.meta import DataMeta, merge_metas
from megacore.data.prepare import output_lock


def merge_datasets(prefixes: Sequence[str], output: str, overwrite: bool = False) -> DataMeta:
    """Concatenate data sets, in the order given; memory does not grow with them.

    Raises:
        ValueError: a data set is missing or damaged, dtypes or tokenizers differ, or the output is taken.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    metas = [DataMeta.load(dataset) for dataset in datasets]
    known = [i for i, meta in enumerate(metas) if meta.tokenizer_hash]
    for i in known[1:]:
        if metas[i].tokenizer_hash != metas[known[0]].tokenizer_hash:
            one, other = (f"{prefixes[j]} ({metas[j].tokenizer})" for j in (known[0], i))
            raise ValueError(
                f"{one} and {other} were made with different tokenizers, so the same ids mean different text; prepare "
                "both with one tokenizer"
            )
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            one, other = (f"{each.prefix} holds {each.dtype}" for each in (datasets[0], dataset))
            raise ValueError(f"{one}, {other}; prepare both with one tokenizer")
    with output_lock(output, overwrite):
        merge(list(prefixes), output)
        merged = merge_metas(metas, IndexedDataset(output))
        merged.save(output)
    return merged

"""Opens a run's data: the tokenizer, the streams of samples, and each rank's feed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacore.checkpoint.hf.files import TOKENIZER_FILES
from megacore.checkpoint.hf.folder import TOKENIZER
from megacore.config.schema import RunConfig
from megacore.data.fim import FimTokens
from megacore.data.sampler import BatchPlan
from megacore.data.skipping import Holes
from megacore.data.source import Source
from megacore.data.stream import SampleStream
from megacore.data.tokenizers.base import Tokenizer
from megacore.data.tokenizers.opening import open_tokenizer
from megacore.mesh.mesh import ParallelMesh
from megacore.model.inputs import Inputs
from megacore.train.feed import Feed
from megacore.train.overview import summary


@dataclass(frozen=True)
class RunData:
    """What a run reads. ``tokenizer`` is None for data sets that do not say how they were made; ``eod`` ends a document
    in them, None if nothing says which token does."""

    tokenizer: Tokenizer | None
    eod: int | None
    plan: BatchPlan
    feed: Feed
    evaluation: Callable[[], Iterator[list[Inputs]]]
    summary: str
    identity: str
    """A hash of what the samples are made of, wherever it lies: equal where every ordinal means the same sample."""


def open_data(config: RunConfig, mesh: ParallelMesh, start: tuple[int, int] = (1, 0), holes: Holes = ()) -> RunData:
    """Open the corpus of a resolved run (``data.tokenizer`` filled in where it is known), which begins with step
    ``start[0]`` at ordinal ``start[1]`` of those that are not among ``holes``.

    All ranks may call it at once: what has to be built is built by one of them while the others wait.
    """
    t, data = config.train, config.data
    tokenizer = open_tokenizer(data.tokenizer) if data.tokenizer else None
    plan = BatchPlan(t.global_batch_size, t.micro_batch_size, t.batch_ramp, start)
    plan.check(mesh.dp.size)
    num_samples = plan.num_samples(max(t.steps, start[0] - 1))  # a run that is done already reads nothing
    stream = _stream(config, tokenizer, "train", num_samples, holes)
    feed = Feed(stream, plan, mesh.dp, mesh.device)
    described = summary(stream.sources, num_samples, t.seq_len)
    known = (tokenizer, stream.eod, plan, feed)
    if not t.eval_every:
        return RunData(*known, lambda: iter(()), described, identity_of(stream.sources))
    eval_stream = _stream(config, tokenizer, "valid", t.eval_steps * t.global_batch_size)
    eval_feed = Feed(eval_stream, plan, mesh.dp, mesh.device)

    def evaluation() -> Iterator[list[Inputs]]:
        return eval_feed.evaluation(t.eval_steps, t.global_batch_size)

    return RunData(*known, evaluation, described, identity_of(stream.sources))


def identity_of(sources: Sequence[Source]) -> str:
    """A hash of the data sets by their content, their shares and weights; not of where they lie."""
    facts = [[each.meta.fingerprint, each.first, each.last, each.weight] for each in sources]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def tokenizer_files(spec: str) -> dict[str, bytes]:
    """The files of a tokenizer (``data.tokenizer``) as checkpoints keep them; none of those that have no file."""
    path = Path(spec)
    if not spec or not path.exists():
        return {}
    files = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES]
    return {f"{TOKENIZER}{file.name}": file.read_bytes() for file in files if file.is_file()}


def _stream(
    config: RunConfig, tokenizer: Tokenizer | None, split: str, num_samples: int, holes: Holes = ()
) -> SampleStream:
    data = config.data
    fim = None
    if data.fim_rate and tokenizer is not None:
        fim = FimTokens(*(tokenizer.token_id(name) for name in data.fim_tokens))
    stream = SampleStream(
        data,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        num_samples=num_samples,
        split=split,
        eod=tokenizer.eod if tokenizer else None,
        fim=fim,
        vocab_size=config.model.vocab_size,
        holes=holes,
    )
    stream.build()
    return stream

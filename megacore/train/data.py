"""Opens a run's data: the tokenizer, the streams of samples, and each rank's feed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megacore.config.schema import RunConfig
from megacore.data.fim import FimTokens
from megacore.data.sampler import BatchPlan
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


def open_data(config: RunConfig, mesh: ParallelMesh) -> RunData:
    """Open the corpus of a resolved run (``data.tokenizer`` filled in where it is known).

    All ranks may call it at once: what has to be built is built by one of them while the others wait.
    """
    t, data = config.train, config.data
    tokenizer = open_tokenizer(data.tokenizer) if data.tokenizer else None
    plan = BatchPlan(t.global_batch_size, t.micro_batch_size, t.batch_ramp)
    plan.check(mesh.dp.size)
    stream = _stream(config, tokenizer, "train", plan.num_samples(t.steps))
    feed = Feed(stream, plan, mesh.dp, mesh.device)
    described = summary(stream.sources, plan.num_samples(t.steps), t.seq_len)
    if not t.eval_every:
        return RunData(tokenizer, stream.eod, plan, feed, lambda: iter(()), described)
    eval_stream = _stream(config, tokenizer, "valid", t.eval_steps * t.global_batch_size)
    eval_feed = Feed(eval_stream, plan, mesh.dp, mesh.device)

    def evaluation() -> Iterator[list[Inputs]]:
        return eval_feed.evaluation(t.eval_steps, t.global_batch_size)

    return RunData(tokenizer, stream.eod, plan, feed, evaluation, described)


def _stream(config: RunConfig, tokenizer: Tokenizer | None, split: str, num_samples: int) -> SampleStream:
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
    )
    stream.build()
    return stream

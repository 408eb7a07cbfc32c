"""A run's data, opened: which token ends a document."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.data.prepare import prepare
from megacore.data.run_data import fill_in
from megacore.train.data import open_data


def test_documents_end_where_the_data_says(tmp_path):
    """Prepared with another --eod-token than the tokenizer's own, that one is masked and ends sampled texts."""
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n" * 200)
    prefix = str(tmp_path / "data")
    prepare([str(tmp_path / "a.txt")], "bytes", prefix, eod_token="\n")
    overrides = [f"data.blend={prefix}", "data.mask_eod_loss=true", "train.eval_every=0", "model.vocab_size=0"]
    config = load(None, overrides, "demo")
    config = resolve(fill_in(replace(config, parallel=replace(config.parallel, tp=1))), 1)
    mesh = SimpleNamespace(dp=SimpleNamespace(rank=0, size=1), device=torch.device("cpu"))
    data = open_data(config, mesh)  # type: ignore[arg-type]
    assert data.tokenizer is not None and data.tokenizer.eod == 256
    assert data.eod == ord("\n")
    (inputs, *_) = data.feed.step(1)
    ends = inputs.token_bs[:, 1:] == ord("\n")
    assert ends.any()
    assert (inputs.label_bs[:, :-1][ends] == -100).all()
    assert (inputs.label_bs[:, :-1][~ends] == inputs.token_bs[:, 1:][~ends]).all()

"""The tour's stages in their order, each timed."""

from megacore.demo import screens
from megacore.demo.dataset import make_dataset
from megacore.demo.huggingface import to_huggingface
from megacore.demo.run_file import write_run_file
from megacore.demo.text import gather
from megacore.demo.tokenizer import learn_tokenizer
from megacore.demo.training import Launcher, train
from megacore.demo.workshop import Options, Workshop
from megacore.monitor.console import Console


def run_tour(options: Options, console: Console, launcher: Launcher) -> int:
    """All stages; the exit code is that of training.

    Raises:
        ValueError: the user's text cannot be read or is too small, or the vocabulary does not fit it.
    """
    shop = Workshop(options, console)
    time = shop.phases.time
    screens.welcome(shop)
    with time("text"):
        corpus = gather(shop)
    with time("tokenizer"):
        tokenizer = learn_tokenizer(shop, corpus)
    with time("dataset"):
        prefix = make_dataset(shop, corpus, tokenizer)
    with time("training"):
        config = write_run_file(shop, corpus, tokenizer, prefix)
        code = train(shop, launcher)
    if code:
        return code
    with time("pictures"):
        screens.pipeline(shop)
        screens.loss(shop, config)
    screens.samples(shop)
    with time("export"):
        to_huggingface(shop)
    screens.goodbye(shop, launcher.command, config.train.steps)
    return 0

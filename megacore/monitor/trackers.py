"""Programs that watch many runs: each gets the same figures through one small interface."""

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from megacore.config.schema import RunConfig
from megacore.config.secrets import without_secrets
from megacore.data.files import write_atomic
from megacore.monitor.background import Background
from megacore.monitor.metrics import StepMetrics
from megacore.monitor.prometheus import Exposition, Server, TextFile
from megacore.monitor.run_folder import PROMETHEUS, TENSORBOARD, TRACKERS

TAGS = MappingProxyType(
    {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/learning_rate",
        "tokens": "train/tokens",
        "val_loss": "validation/loss",
        "tokens_per_s": "throughput/tokens_per_sec",
        "step_time_s": "throughput/step_time_s",
        "tflops_per_device": "throughput/tflops_per_device",
        "mfu": "throughput/mfu",
        "memory_gb": "memory/peak_gb",
    }
)
"""Key of metrics.jsonl -> tag. Statistics and figures of GPUs have their own names."""


class Tracker(Protocol):
    """Something that is told each logged step."""

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Takes a text, such as a sample from the model."""

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Takes what events.jsonl is told."""

    def close(self) -> None:
        """Writes out what is still held back."""


def scalars(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    """Tag and value of everything that is known of a step."""
    for name, tag in TAGS.items():
        value = getattr(metrics, name)
        if value is not None:
            yield tag, value
    yield from _flat("statistics", metrics.statistics or {})
    yield from _flat("gpu", metrics.gpu or {})


def _flat(tag: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            yield from _flat(f"{tag}/{name}", figure)
        elif isinstance(figure, (int, float)):
            yield f"{tag}/{name}", figure


class TensorBoard:
    """Writes TensorBoard event files to out/tensorboard. Needs the `monitor` extra."""

    def __init__(self, out: Path, purge_step: int | None = None) -> None:
        """``purge_step``: the first step of a run that is taken up again; what was written of later ones is void."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional
        except ImportError as error:
            raise ValueError(
                f'log.tensorboard=true needs the tensorboard package ({error}); run: pip install "megacore[monitor]", '
                "or set log.tensorboard=false"
            ) from error
        self._writer: Any = SummaryWriter(str(out / TENSORBOARD), purge_step=purge_step)

    def log(self, metrics: StepMetrics) -> None:
        """Sends every known figure at x = step."""
        for tag, value in scalars(metrics):
            self._writer.add_scalar(tag, value, metrics.step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Shows the text as it is: four spaces make it a code block of TensorBoard's markdown."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Has no place for it."""

    def close(self) -> None:
        """Writes out what is still held back."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, offline unless `log.wandb_mode` says otherwise. Needs the `wandb` extra.

    The run's folder keeps its id, so that a run that is taken up again stays one run there. The step is a figure of its
    own (`trainer/step`): W&B's counter never goes back, and would drop steps that are made again.
    """

    def __init__(self, out: Path, config: RunConfig, flat: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = config.log.wandb_mode
        self._run: Any = wandb.init(
            project=config.log.project,
            id=known_id(out, "wandb", lambda: secrets.token_hex(8)),
            name=out.name,
            resume="allow",
            mode=mode,
            dir=str(out),
            config=dict(flat),
            # what W&B finds out itself has the command line, which may bring a secret
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=without_secrets(config) is not config),
        )
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")

    def log(self, metrics: StepMetrics) -> None:
        """Hands it to W&B's own process."""
        self._run.log({**dict(scalars(metrics)), "trainer/step": metrics.step})

    def text(self, tag: str, text: str, step: int) -> None:
        """As preformatted text: nothing in it is taken for markup."""
        from html import escape

        import wandb

        self._run.log({tag: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False), "trainer/step": step})

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """The newest of each kind stands in the run's summary."""
        self._run.summary[f"event/{name}"] = facts.get("step") or facts.get("text") or True

    def close(self) -> None:
        """Waits for what is on its way."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in files below out/mlruns unless `log.mlflow_uri` names a server. Needs the `mlflow` extra."""

    PARAMS_AT_ONCE, LONGEST_PARAM = 100, 500

    def __init__(self, out: Path, config: RunConfig, flat: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=config.log.mlflow_uri or (out / "mlruns").resolve().as_uri())
        experiment = self._client.get_experiment_by_name(config.log.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.log.project)

        def begin() -> str:
            run = self._client.create_run(number, run_name=out.name).info.run_id
            params = [Param(name, str(value)[: self.LONGEST_PARAM]) for name, value in flat.items()]
            for first in range(0, len(params), self.PARAMS_AT_ONCE):
                self._client.log_batch(run, params=params[first : first + self.PARAMS_AT_ONCE])
            return str(run)

        self._id = known_id(out, "mlflow", begin)
        try:
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException:  # another store than last time
            self._id = known_id(out, "mlflow", begin, anew=True)

    def log(self, metrics: StepMetrics) -> None:
        """One message to the store."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(tag, float(value), now, metrics.step) for tag, value in scalars(metrics)]
        self._client.log_batch(self._id, metrics=[each for each in found if math.isfinite(each.value)])

    def text(self, tag: str, text: str, step: int) -> None:
        """A text file among the run's artifacts; one that is there is replaced."""
        self._client.log_text(self._id, text, f"{tag}/step-{step:08d}.txt")

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """The newest of each kind is a tag of the run."""
        self._client.set_tag(self._id, f"event.{name}", str(facts.get("step") or facts.get("text") or ""))

    def close(self) -> None:
        """The run has ended, or will be taken up again."""
        self._client.set_terminated(self._id)


def known_id(out: Path, name: str, make: Callable[[], str], anew: bool = False) -> str:
    """The run's id in a tracker, which its folder keeps from one start to the next."""
    path, known = out / TRACKERS, {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not isinstance(known.get(name), str) or anew:
        known = {**(known if isinstance(known, dict) else {}), name: make()}
        write_atomic(path, json.dumps(known).encode())
    return str(known[name])


def open_trackers(
    out: Path,
    config: RunConfig,
    flat: Mapping[str, Any],
    warn: Callable[[str], None],
    first_step: int | None = None,
) -> Sequence[Tracker]:
    """The trackers that `log` asks for (call it in one process of the run only).

    flat: the run's keys by dotted name. warn: told what goes wrong later, which never ends the run. first_step: of a
    run that is taken up again.
    """
    log = config.log
    found: list[Tracker] = []
    if log.tensorboard:
        found.append(TensorBoard(out, first_step))
    # what may have to wait, for a network or a disk, does so in a thread of its own
    if log.wandb:
        found.append(Background("log.wandb", partial(WandB, out, config, flat), warn))
    if log.mlflow:
        found.append(Background("log.mlflow", partial(MLflow, out, config, flat), warn))
    if log.prometheus_port:
        try:
            found.append(Server(Exposition(str(out)), log.prometheus_port))
        except OSError as error:
            warn(f"log.prometheus_port={log.prometheus_port} serves nothing: {error}")
    if log.prometheus_file:
        found.append(Background("log.prometheus_file", partial(TextFile, Exposition(str(out)), out / PROMETHEUS), warn))
    return found

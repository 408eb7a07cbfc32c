"""Python packages: those that are needed, and extras with what is lost without them."""

from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from types import MappingProxyType

from packaging.version import Version

from megacore.doctor.finding import FAIL, OK, WARN, Finding

OLDEST_TORCH = "2.10"
NEEDED = ("numpy", "safetensors", "xxhash", "packaging", "pyyaml", "sentencepiece")
EXTRAS = MappingProxyType(
    {
        "matplotlib": ("plots", "no pictures of curves and schedules"),
        "tensorboard": ("monitor", "log.tensorboard cannot be set"),
        "wandb": ("wandb", "log.wandb cannot be set"),
        "mlflow-skinny": ("mlflow", "log.mlflow cannot be set"),
        "nvidia-ml-py": ("monitor", "no figures of GPUs in metrics and alerts"),
        "tokenizers": ("data", "no tokenizers of Hugging Face"),
        "tiktoken": ("data", "no tokenizers of tiktoken"),
        "pyarrow": ("data", "no Parquet files as input"),
        "zstandard": ("data", "no .zst files as input"),
        "transformers": ("hf", "`megacore convert verify` has no logits to compare with"),
        "fsspec": ("remote", "no checkpoints in object stores"),
    }
)
"""Distribution -> (our extra, what is lost without it)."""


def version_of(name: str) -> str | None:
    """A distribution's version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_itself() -> Iterator[Finding]:
    """torch, its build, and whether it is one of those that are supported."""
    version = version_of("torch")
    if version is None:
        yield Finding("torch", FAIL, "not installed", "pip install torch==2.13.0, then bash launch/setup.sh")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    text = f"{version}, {build}"
    if Version(version) < Version(OLDEST_TORCH):
        yield Finding("torch", FAIL, f"{text}: {OLDEST_TORCH} or later is needed", "pip install torch==2.13.0")
    elif not torch.distributed.is_available():
        yield Finding("torch", FAIL, f"{text}, built without torch.distributed", "install another build of torch")
    else:
        yield Finding("torch", OK, f"{text}; gloo{' and NCCL' if torch.distributed.is_nccl_available() else ''}")


def needed() -> Iterator[Finding]:
    """Hard dependencies, in one line."""
    missing = [name for name in NEEDED if version_of(name) is None]
    if missing:
        yield Finding("packages", FAIL, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Finding("packages", OK, ", ".join(f"{name} {version_of(name)}" for name in NEEDED))


def extras() -> Iterator[Finding]:
    """What can be had besides."""
    for name, (extra, lost) in EXTRAS.items():
        version = version_of(name)
        if version is None:
            yield Finding(name, OK, f"not installed: {lost}", f'pip install "megacore[{extra}]"')
        else:
            yield Finding(name, OK, version)


def kernels() -> Iterator[Finding]:
    """Our compiled parts and other people's kernels, each with the reason why it is not used."""
    native = find_spec("megacore.data._native")
    build = "pip install --no-build-isolation -e ."
    if native is None:
        yield Finding("csrc/data", WARN, "not built: numpy builds sample indices, more slowly", build)
    else:
        yield Finding("csrc/data", OK, "built")
    import torch

    on_gpu = torch.cuda.is_available()
    for line in import_module("megacore.kernels.table").packages():
        name, _, reason = line.partition(": ")
        detail, _, fix = reason.partition("; ")
        wanted = name == "csrc/cpu" or (on_gpu and name == "csrc/cuda")
        yield Finding(name, WARN if wanted and reason != "found" else OK, detail, fix)
    yield from impostor()


def impostor() -> Iterator[Finding]:
    """The package named apex on the index is a web toolkit of 2013."""
    version = version_of("apex")
    if version is not None and find_spec("amp_C") is None:
        text = f"the apex that is installed ({version}) is not NVIDIA's: it has no amp_C"
        yield Finding("apex's impostor", WARN, text, "pip uninstall apex")

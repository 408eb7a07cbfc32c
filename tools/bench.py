"""`megacore bench`: measures, always beside another implementation or a prediction, in the same run."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.bench.bubble import Bubble
    from megacore.bench.calibrate import Point
    from megacore.bench.harness import AnyCase, Comparison
    from megacore.bench.kernels import Measured as Kernel
    from megacore.bench.optim import Measured


def main(argv: list[str] | None = None) -> int:
    """Run one group of benchmarks and show it; --output keeps it."""
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds} must be at least 1")
    from megacore.bench.report import machine

    on = machine()
    if arguments.benchmark == "layouts":  # keeps what it found as it goes, and draws it beside predictions
        from megacore.bench.layouts_command import run

        text, code = run(arguments, on)
        print(text)
        return code
    found = arguments.measure(arguments)
    report = import_module(arguments.report)
    if arguments.output:
        report.write(Path(arguments.output), arguments.benchmark, found, on)
    if arguments.json:
        print(json.dumps({"machine": on, arguments.found: [report.as_dict(one) for one in found]}, indent=1))
    else:
        print(report.table(found))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore bench", description=__doc__.partition(": ")[2])
    parser.set_defaults(report="megacore.bench.report", found="comparisons")
    groups = parser.add_subparsers(
        dest="benchmark",
        required=True,
        metavar="{layouts,calibrate,data,train,pipeline,zero,bubble,optim,kernels,checkpoint,convert}",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--output", metavar="FOLDER", help="also write JSON and CSV there")
    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given again")
    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument("overrides", nargs="*", metavar="key=value", help="model.*, train.* and optim.* keys of a run")

    add_files(groups, common, cases, keys)
    add_steps(groups, common, cases, keys)
    add_layouts(groups)
    add_calibrate(groups, common)
    return parser


def add_files(groups: Any, common: Any, cases: Any, keys: Any) -> None:
    """What reads and writes: data, checkpoints, conversions."""
    data = groups.add_parser(
        "data", parents=[common], help="building sample indices against megatron-core, tokenising against libraries"
    )
    data.add_argument("--case", default="", metavar="WORDS", help="only those whose name contains this")
    data.add_argument("--rounds", type=int, default=7, help="timed runs of each side (default 7)")
    data.set_defaults(measure=measure_data)
    keeping = groups.add_parser(
        "checkpoint", parents=[common, cases, keys], help="saving and loading against torch.distributed.checkpoint"
    )
    keeping.add_argument("--rounds", type=int, default=9, help="timed saves of each side (default 9)")
    keeping.add_argument("--folder", metavar="PATH", help="where to write (default: a temporary folder)")
    keeping.set_defaults(measure=measure_checkpoint)
    convert = groups.add_parser(
        "convert", parents=[common, cases, keys], help="conversion as whole commands, against transformers"
    )
    convert.add_argument("--rounds", type=int, default=3, help="timed runs of each side (default 3)")
    convert.add_argument("--folder", metavar="PATH", help="where to write (default: a temporary folder)")
    convert.set_defaults(measure=measure_convert)


def add_steps(groups: Any, common: Any, cases: Any, keys: Any) -> None:
    """What computes: steps of training, and parts of them."""
    step = groups.add_parser("train", parents=[common, cases, keys], help="a training step: one process, tp=2, dp=2")
    step.add_argument("--rounds", type=int, default=30, help="timed steps of each side (default 30)")
    step.set_defaults(measure=measure_train)
    pipeline = groups.add_parser(
        "pipeline",
        parents=[common, cases, keys],
        help="a training step at pp=2 and 4 against torch.distributed.pipelining",
    )
    pipeline.add_argument("--rounds", type=int, default=20, help="timed steps of each side (default 20)")
    pipeline.set_defaults(measure=measure_pipeline)
    zero = groups.add_parser(
        "zero",
        parents=[common, cases, keys],
        help="a training step under ZeRO at dp=2 and 4 against DDP, ZeroRedundancyOptimizer and FSDP2",
    )
    zero.add_argument("--rounds", type=int, default=20, help="timed steps of each side (default 20)")
    zero.set_defaults(measure=measure_zero)
    bubble = groups.add_parser(
        "bubble", parents=[common, cases], help="the idle share of pipelines of sleeping stages against the simulator's"
    )
    bubble.add_argument("--rounds", type=int, default=5, help="measured steps (default 5)")
    bubble.add_argument("--microbatches", type=int, default=8, metavar="N", help="of each step (default 8)")
    bubble.add_argument(
        "--milliseconds",
        type=float,
        nargs=3,
        default=(100.0, 100.0, 100.0),
        metavar=("F", "I", "W"),
        help="of a stage's forward, input gradient and weight gradient (default 100 100 100)",
    )
    bubble.set_defaults(measure=measure_bubble, report="megacore.bench.bubble_report", found="bubbles")
    optim = groups.add_parser(
        "optim", parents=[common, cases, keys], help="a step of every optimizer against torch's AdamW and a plain copy"
    )
    optim.add_argument("--rounds", type=int, default=15, help="timed steps of each side (default 15)")
    optim.set_defaults(measure=measure_optim, report="megacore.bench.optim_report", found="cases")
    kernels = groups.add_parser(
        "kernels",
        parents=[common, cases],
        help="every backend of every operation against a copy's bandwidth or a product's peak, torch.compile and Liger",
    )
    kernels.add_argument("--rounds", type=int, default=15, help="timed calls of each side (default 15)")
    kernels.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is")
    kernels.add_argument("--dtype", action="append", metavar="NAME", help="fp32, bf16 or fp16; may be given again")
    kernels.add_argument("--tokens", type=int, default=0, metavar="N", help="default 2048; on CUDA 16384")
    kernels.add_argument("--hidden", type=int, default=0, metavar="N", help="default 2048; on CUDA 4096")
    kernels.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes its time")
    kernels.set_defaults(measure=measure_kernels, report="megacore.bench.kernels_report", found="cases")


def add_layouts(groups: Any) -> None:
    """Whole runs, one layout after the other."""
    layouts = groups.add_parser(
        "layouts",
        help="a run in many layouts, each for a few steps, beside the planner's predictions; goes on where it stopped",
    )
    layouts.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file; without data, tokens are made up")
    layouts.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    layouts.add_argument("--preset", metavar="NAME", help="start from a known model")
    layouts.add_argument(
        "--layouts", metavar="LIST", help='such as "tp=2;pp=2,zero=0;dp=2,zero=3"; default: legal ones'
    )
    layouts.add_argument("--max-ranks", type=int, default=4, metavar="N", help="of legal layouts (default 4)")
    layouts.add_argument(
        "--choose",
        choices=("sizes", "pairs", "all"),
        default="sizes",
        help="of legal layouts: all sizes of tp, pp and dp with the run's other keys (default), layouts in which every "
        "pair of values occurs, or all of them",
    )
    layouts.add_argument("--rounds", type=int, default=3, help="turns that every layout gets (default 3)")
    layouts.add_argument("--steps", type=int, default=8, help="counted steps of each (default 8), behind 2 others")
    layouts.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for each (default 300)")
    layouts.add_argument(
        "--points", metavar="FILE", help="predict from what `megacore bench calibrate --output` wrote: calibrate.json"
    )
    layouts.add_argument(
        "--launcher",
        default="",
        metavar="WORDS",
        help='what starts ranks, such as "srun -n {nproc} python -m megacore" (default: local processes)',
    )
    layouts.add_argument("--output", required=True, metavar="FOLDER", help="results, also those of an earlier start")
    layouts.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_calibrate(groups: Any, common: Any) -> None:
    """Parts of a step, for the planner."""
    calibrate = groups.add_parser(
        "calibrate",
        parents=[common],
        help="products, attention, memory, calls, collectives of this machine; `layouts --points` predicts from them",
    )
    calibrate.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is"
    )
    calibrate.add_argument("--dtype", action="append", metavar="NAME", help="fp32 or bf16; may be given again")
    calibrate.add_argument(
        "--ranks",
        type=int,
        action="append",
        metavar="N",
        help="of collectives; default 2 and 4, or on CUDA the machine's GPUs",
    )
    calibrate.add_argument("--rounds", type=int, default=15, help="timed calls of each collective (default 15)")
    calibrate.add_argument(
        "--machine", metavar="FILE.toml", help="on GPUs: write what differs from the known machine, for `plan --gpu`"
    )
    calibrate.set_defaults(measure=measure_calibrate, report="megacore.bench.calibrate_report", found="points")


def measure_calibrate(arguments: argparse.Namespace) -> list["Point"]:
    """Points of one process for each core, then of ranks together: each on fresh processes."""
    from megacore.bench.calibrate_command import measure

    return measure(arguments, ranks)


def measure_data(arguments: argparse.Namespace) -> list["Comparison"]:
    """Indices and tokenising; a benchmark whose other side is not installed is left out, and that is said."""
    from megacore.bench.data import benchmarks

    chosen = benchmarks(arguments.case)
    runnable = [one for one in chosen if one.runnable]
    packages = sorted({one.package for one in chosen if not one.runnable})
    if not runnable:
        raise ValueError(f"nothing to compare with: {', '.join(packages)} not installed; pip install them first")
    if packages:
        sys.stderr.write(f"left out: what compares with {', '.join(packages)}, not installed here\n")
    comparisons = []
    for one in runnable:
        sys.stderr.write(f"{one.name} ...\n")
        comparisons.append(one.measure(arguments.rounds))
    return comparisons


def measure_train(arguments: argparse.Namespace) -> list["Comparison"]:
    """Training steps: each case on fresh processes."""
    from megacore.bench.train import CASES, collect, configure

    config = configure(arguments.overrides)
    comparisons = []
    for case in chosen(arguments.case, CASES):
        with ranks("megacore.bench.train:measure", case.nproc, case.name, config, arguments.rounds) as result:
            comparisons.append(collect(case, config, result))
    return comparisons


def measure_pipeline(arguments: argparse.Namespace) -> list["Comparison"]:
    """Training steps of pipelines: each case on fresh processes."""
    from megacore.bench.pipeline import CASES, SHAPE, collect
    from megacore.bench.train import configure

    config = configure([*SHAPE, *arguments.overrides])
    comparisons = []
    for case in chosen(arguments.case, CASES):
        with ranks("megacore.bench.pipeline:measure", case.pp, case.name, config, arguments.rounds) as result:
            comparisons.append(collect(case, config, result))
    return comparisons


def measure_zero(arguments: argparse.Namespace) -> list["Comparison"]:
    """Training steps that share state among ranks: each case on fresh processes."""
    from megacore.bench.train import configure
    from megacore.bench.zero import CASES, collect

    config = configure(arguments.overrides)
    comparisons = []
    for case in chosen(arguments.case, CASES):
        with ranks("megacore.bench.zero:measure", case.dp, case.name, config, arguments.rounds) as result:
            comparisons.append(collect(case, config, result))
    return comparisons


def measure_checkpoint(arguments: argparse.Namespace) -> list["Comparison"]:
    """Saves and loads: each case on fresh processes, in a folder of its own."""
    from megacore.bench.checkpoint import CASES, SHAPE, collect
    from megacore.bench.train import configure

    config = configure([*SHAPE, *arguments.overrides])
    comparisons = []
    for case in chosen(arguments.case, CASES):
        with tempfile.TemporaryDirectory(prefix="megacore-bench-", dir=arguments.folder) as folder:
            told = case.name, config, arguments.rounds, folder
            with ranks("megacore.bench.checkpoint:measure", case.num_ranks, *told) as result:
                comparisons.append(collect(case, config, result))
    return comparisons


def measure_convert(arguments: argparse.Namespace) -> list["Comparison"]:
    """Conversions, each a process."""
    from megacore.bench.convert import CASES, SHAPE, measure
    from megacore.config.load import load

    config = load(None, [*SHAPE, *arguments.overrides])
    with tempfile.TemporaryDirectory(prefix="megacore-bench-", dir=arguments.folder) as folder:
        comparisons = []
        for case in chosen(arguments.case, CASES):
            sys.stderr.write(f"{case.name} ...\n")
            comparisons.append(measure(case, config, arguments.rounds, Path(folder)))
    return comparisons


def measure_bubble(arguments: argparse.Namespace) -> list["Bubble"]:
    """Pipelines of sleeping stages: each case on fresh processes."""
    from megacore.bench.bubble import CASES, check_settings, collect

    number = arguments.microbatches
    seconds = check_settings(arguments.milliseconds, number)
    bubbles = []
    for case in chosen(arguments.case, CASES):
        told = case.name, seconds, number, arguments.rounds
        with ranks("megacore.bench.bubble:measure", case.pp, *told) as result:
            bubbles.append(collect(case, seconds, number, result))
    return bubbles


def measure_optim(arguments: argparse.Namespace) -> list["Measured"]:
    """Steps of optimizers, in this process: each case with moments in another format."""
    from megacore.bench.optim import CASES, measure
    from megacore.bench.train import configure

    config = configure(arguments.overrides)
    return [measure(case, config, arguments.rounds) for case in chosen(arguments.case, CASES)]


def measure_kernels(arguments: argparse.Namespace) -> list["Kernel"]:
    """Fused operations, in this process: each (a case) with every willing backend, in every format."""
    from megacore.bench.kernels import measure, peak_of, sizes
    from megacore.kernels.operations import OPERATIONS

    operations = chosen(arguments.case, tuple(OPERATIONS.values()))
    found: list[Kernel] = []
    for size in sizes(arguments.device, arguments.dtype, arguments.tokens, arguments.hidden):
        peak = peak_of(size)
        for operation in operations:
            if size.dtype in operation.tolerance:
                sys.stderr.write(f"{operation.name}, {size.dtype} ...\n")
                found += measure(operation.name, size, arguments.rounds, peak, not arguments.no_compile)
    return found


def chosen(names: Sequence[str] | None, cases: Sequence["AnyCase"]) -> Sequence["AnyCase"]:
    """The cases of these names; all of them if none is named."""
    from megacore.bench.harness import case_named

    return [case_named(name, cases) for name in names] if names else cases


@contextmanager
def ranks(measure: str, nproc: int, name: str, *arguments: Any) -> Iterator[Path]:
    """Runs ``measure`` (module:function) for the case ``name`` on new processes; gives the file of its result."""
    from megacore.launch.processes import run_local

    sys.stderr.write(f"{name} ...\n")
    with tempfile.TemporaryDirectory(prefix="megacore-bench-") as folder:
        result = Path(folder) / "result.json"
        code = run_local(measure, (name, *arguments, str(result)), nproc)
        if code:  # the cause has been told
            raise SystemExit(code)
        yield result


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.bench", sys.argv[1:]))

"""All pictures of a plan, as SVG text."""

import tempfile
from pathlib import Path

from megacore.cost.estimate import GB
from megacore.cost.outcome import Outcome
from megacore.cost.page import Figure
from megacore.cost.plot.heat_map import heat_map
from megacore.cost.plot.memory_bars import memory_bars
from megacore.cost.plot.mesh_map import mesh_map
from megacore.cost.plot.scaling import scaling_curve
from megacore.cost.step import StepTime


def pictures(outcome: Outcome) -> dict[str, Figure]:
    """Name -> figure: memory, heat map, schedule (where matplotlib is installed), mesh, scaling."""
    wish, winner = outcome.wish, outcome.best[0]
    capacity = wish.machine.accelerator.memory_gb * GB
    figures = {
        "memory": Figure("Memory", "of each pipeline rank, by component", memory_bars(winner, capacity)),
        "layouts": Figure(
            "Layouts", "the best step of each tensor and pipeline size, whatever else is chosen", heat_map(wish.cells())
        ),
    }
    if gantt := schedule_picture(winner.step):
        figures["schedule"] = Figure("Schedule", "of one step, simulated with the predicted times", gantt)
    figures["mesh"] = Figure("Ranks", "which rank sits where", mesh_map(winner.layout, wish.machine.gpus_per_node))
    figures["scaling"] = Figure(
        "Scaling",
        "the best plan of each number of devices" + ("" if wish.batch else ", each with its own usual batch"),
        scaling_curve(wish.scaling(), wish.world),
    )
    return figures


def schedule_picture(step: StepTime) -> str:
    """The schedule's Gantt chart; empty where it was not simulated, or matplotlib is not installed."""
    if step.timeline is None:
        return ""
    from megacore.cost.plot.picture import save_picture

    with tempfile.TemporaryDirectory(prefix="megacore-plan-") as folder:
        path = Path(folder) / "schedule.svg"
        try:
            save_picture(path, step.timeline)
        except ValueError:  # without matplotlib; the rest of the plan needs none
            return ""
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]

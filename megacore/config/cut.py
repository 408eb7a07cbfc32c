"""How layers may be cut into pipeline stages: the one statement of the rule, for a run file and for the split."""

from collections.abc import Sequence


def cut_problem(num_layers: int, num_stages: int, stage_layers: Sequence[int] = ()) -> str:
    """What keeps ``num_layers`` from being cut into ``num_stages`` (of ``stage_layers`` each, if given), else nothing.

    Stage 0 also holds the embedding and the last stage the head with the loss, so these two may do without layers; a
    stage between them has one at least.
    """
    if num_stages > num_layers + 2:
        return (
            f"parallel.pp*chunks makes {num_stages} stages, too many for model.num_layers={num_layers} with an "
            f"embedding and a head; use at most {num_layers + 2}"
        )
    if not stage_layers:
        return ""
    what = f"parallel.stage_layers={list(stage_layers)}"
    if len(stage_layers) != num_stages or sum(stage_layers) != num_layers:
        return (
            f"{what} has {len(stage_layers)} counts that sum to {sum(stage_layers)}; it must have {num_stages} "
            f"(parallel.pp*chunks) that sum to model.num_layers={num_layers}; leave it out for a balanced split"
        )
    if min(stage_layers) < 0 or 0 in stage_layers[1:-1]:
        return (
            f"{what} leaves a stage empty; only the first, which has the embedding, and the last, which has the head, "
            "may have 0 layers"
        )
    return ""

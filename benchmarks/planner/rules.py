"""Rules of thumb of the field, priced: is each layout that practitioners name near the winner, and if not, why?

    python benchmarks/planner/rules.py [--gpu a100-80gb] [--json] [--csv OUT.csv]

Each named layout (data parallel times tensor parallel times pipeline) is given its best microbatch, ZeRO stage,
schedule and recomputation, as a practitioner would, and held against the best of all layouts of as many devices, with
the same batch, in the same run.
"""

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from megacore.cost.explain import Judge
from megacore.cost.machine import find_machine
from megacore.cost.planning import Wish, read_wish
from megacore.cost.search import Search, by_everything

NEAR = 0.15
GPT_30B = ("num_layers=48", "hidden_size=7168", "num_heads=56", "vocab_size=51200")
PALM_540B = ("num_layers=118", "hidden_size=18432", "num_heads=48", "num_kv_heads=1", "head_dim=256",
             "ffn_hidden_size=73728", "vocab_size=256000")  # fmt: skip

# (name, preset, keys of a model without one, tp, pp, devices)
NAMED = (
    ("7B", "llama2-7b", (), 1, 1, 8),
    ("7B", "llama2-7b", (), 1, 1, 64),
    ("13B", "llama2-13b", (), 2, 1, 16),
    ("13B", "llama2-13b", (), 2, 1, 64),
    ("30B", None, GPT_30B, 4, 2, 64),
    ("70B", "llama2-70b", (), 8, 4, 128),
    ("175B", "gpt3-175b", (), 8, 16, 512),
    ("175B", "gpt3-175b", (), 8, 16, 1024),
    ("540B", None, PALM_540B, 8, 32, 4096),
)
COLUMNS = ("model", "gpus", "tp", "pp", "rule", "rule_tokens", "winner", "winner_tokens", "slower", "near", "why")


def price(name: str, preset: str | None, model: tuple[str, ...], tp: int, pp: int, world: int, gpu: str) -> dict:
    """One named layout against the winner, as COLUMNS; ``slower`` is None where it does not fit."""
    keys = [f"model.{key}" for key in model] + ([] if preset else ["train.seq_len=2048", "model.family=gpt2"])
    wish = read_wish(None, preset, keys, world, find_machine(gpu))
    winner = search(wish)
    judge = Judge(wish.space(), wish.machine, winner, wish.practice, wish.headroom)
    verdict = judge.verdict(name, MappingProxyType({"tp": (tp,), "pp": (pp,), "cp": (1,)}))
    found = verdict.estimate if verdict.slower is not None else None
    return {
        "model": name, "gpus": world, "tp": tp, "pp": pp,
        "rule": found.name() if found else "", "rule_tokens": found.tokens_per_s_per_gpu if found else None,
        "winner": winner.name(), "winner_tokens": winner.tokens_per_s_per_gpu, "slower": verdict.slower,
        "near": verdict.slower is not None and verdict.slower <= NEAR, "why": verdict.why,
    }  # fmt: skip


def search(wish: Wish):
    """The winner among what the engine can run: without context parallelism, which the rules do not name either."""
    space = replace(wish.space(), allowed=MappingProxyType({"cp": (1,)}))
    return Search(space, wish.machine, wish.practice, wish.headroom).run(1, by_everything).best[0]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="the machine (h100)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the table there")
    args = parser.parse_args()
    rows = [price(*named, args.gpu) for named in NAMED]
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        pace = "does not fit" if row["slower"] is None else f"{row['slower']:+.1%}"
        mark = "near" if row["near"] else "why not:"
        print(f"{row['model']:>5} on {row['gpus']:>5,}  tp {row['tp']} pp {row['pp']:<3} {pace:>8}  {mark}")
        print(f"       winner {row['winner']}\n       rule   {row['rule'] or row['why']}\n       {row['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokenising a corpus, `data prepare` against the tokenizer library alone, in one run: ratios per core.

python benchmarks/data_tokenize.py [--rounds 5] [--json]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megacore.bench import data_tokenize, report


def main() -> int:
    """Measure every case and show it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    comparisons = [data_tokenize.measure(case, arguments.rounds) for case in data_tokenize.CASES]
    if arguments.json:
        rows = [report.as_dict(one) for one in comparisons]
        print(json.dumps({"machine": report.machine(), "comparisons": rows}, indent=1))
    else:
        print(report.table(comparisons))
    return 0


if __name__ == "__main__":
    sys.exit(main())

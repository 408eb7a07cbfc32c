"""Building sample indices, ours against megatron-core's, in one run: ratios, not absolute times.

python benchmarks/data_index.py [--rounds 7] [--json]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megacore.bench import data_index, report


def main() -> int:
    """Measure every case and show it; 2: there is nothing to compare with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed builds of each side (default 7)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        comparisons = [data_index.measure(case, arguments.rounds) for case in data_index.CASES]
    except ValueError as reason:
        sys.stderr.write(f"{reason}\n")
        return 2
    if arguments.json:
        rows = [report.as_dict(one) for one in comparisons]
        print(json.dumps({"machine": report.machine(), "comparisons": rows}, indent=1))
    else:
        print(report.table(comparisons))
    return 0


if __name__ == "__main__":
    sys.exit(main())

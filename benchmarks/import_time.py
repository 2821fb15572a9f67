"""What `import vishub` costs beside `import timm`: fresh processes in turn, median time of each, and the ratio.

    python benchmarks/import_time.py [--repeats 15] [--json]

The budget is a ratio of 1.15. Time is that of the import statement alone, measured inside the process.
"""
import argparse
import json
import statistics
import subprocess
import sys
from typing import Dict, List

_STATEMENT = 'import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)'


def measure(repeats: int) -> Dict[str, float]:
    """Median seconds of both imports and their ratio; a first pair, which warms the file cache, is not counted."""
    seconds: Dict[str, List[float]] = {'timm': [], 'vishub': []}
    for repeat in range(repeats + 1):
        # Taking turns, each going first every other time, spreads the machine's moods over both.
        for module in ('timm', 'vishub') if repeat % 2 else ('vishub', 'timm'):
            statement = _STATEMENT.format(module=module)
            output = subprocess.run([sys.executable, '-c', statement], capture_output=True, text=True, check=True)
            if repeat:
                seconds[module].append(float(output.stdout))
    medians = {module: statistics.median(values) for module, values in seconds.items()}
    return {**medians, 'ratio': medians['vishub'] / medians['timm'], 'repeats': repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=15, help='pairs of imports')
    parser.add_argument('--json', action='store_true', help='print a JSON object')
    options = parser.parse_args()
    result = measure(options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        print(f'import timm   {result["timm"]:.3f} s')
        print(f'import vishub {result["vishub"]:.3f} s, {result["ratio"]:.3f} times (budget 1.15)')


if __name__ == '__main__':
    main()

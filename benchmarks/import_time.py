"""What `import vishub` costs beside `import timm`: fresh processes in turn, median time and ratio.

    python benchmarks/import_time.py [--repeats 15] [--json]

The budget is a ratio of 1.15. Time is that of the import statement alone, measured inside the process.
"""
import argparse
import json
import statistics
import subprocess
import sys
from typing import Dict

from timing import ratios, take_turns

_STATEMENT = 'import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)'


def measure(repeats: int) -> Dict[str, float]:
    """Median seconds of both imports and their ratio; a first pair, which warms the file cache, is not counted."""
    def seconds_of(module: str) -> float:
        statement = _STATEMENT.format(module=module)
        output = subprocess.run([sys.executable, '-c', statement], capture_output=True, text=True, check=True)
        return float(output.stdout)

    seconds = take_turns({name: lambda name=name: seconds_of(name) for name in ('timm', 'vishub')}, repeats)
    medians = {module: statistics.median(values) for module, values in seconds.items()}
    ratio = statistics.median(ratios(seconds['vishub'], seconds['timm']))
    return {**medians, 'ratio': ratio, 'repeats': repeats}


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

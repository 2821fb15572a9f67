"""What the speed benchmarks share besides the clock: their common options, their setting in words, and their files."""
import argparse
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

import torch
from timing import clock_name

__all__ = ['add_options', 'begin', 'write']

RESULTS = Path(__file__).resolve().parent / 'results'


def add_options(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """--rounds, --threads, --device and --output."""
    parser.add_argument('--rounds', type=int, default=rounds)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, default=RESULTS, metavar='DIR', help='folder of the table')


def begin(options: argparse.Namespace) -> Callable[[], Dict[str, Any]]:
    """Set the threads; returns a call that tells the setting, once everything is measured."""
    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]

    def setting() -> Dict[str, Any]:
        cuda = options.device.startswith('cuda')
        return {
            'device': torch.cuda.get_device_name(options.device) if cuda else options.device,
            'clock': clock_name(options.device, options.threads), 'threads': options.threads,
            'rounds': options.rounds, 'torch': torch.__version__,
            'machine_load': f'{before:.1f} to {os.getloadavg()[0]:.1f}',
        }
    return setting


def write(options: argparse.Namespace, name: str, page: str, content: Mapping[str, Any]) -> None:
    """Write NAME_DEVICE.md and .json into the output folder, and print the page."""
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f'{name}_{options.device.partition(":")[0]}'
    target.with_suffix('.md').write_text(page, encoding='utf-8')
    target.with_suffix('.json').write_text(f'{json.dumps(content, indent=2)}\n', encoding='utf-8')
    print(page, end='')
    print(f'written: {target}.md, .json')

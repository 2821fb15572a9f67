"""Throughput of `vishub predict … --output results.jsonl` against the bare model on batches that are ready.

    python benchmarks/predict.py                                    # two models, 64 JPEGs of 500 x 375, batch 16
    python benchmarks/predict.py --models favit_b2 --images 512 --batch-size 32 --threads 2 --rounds 5

`predict` lists files, decodes them in worker processes, runs the model, writes parts and puts the table together; the
bare model runs as many batches of the same size from memory. Both take turns; figures are medians over the rounds of
bare / predict. By the wall clock decoding competes with the model where cores are few or busy; by the CPU time of the
process that runs the model, only what `predict` adds to it counts, which is what is left where workers have cores of
their own. Weights are random, which costs the same as trained ones.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import timm
import torch
from PIL import Image
from timing import ratios, take_turns

import vishub
from vishub.tasks.base import Pipeline
from vishub.tasks.table import predict_table

GOAL = 0.9
RESULTS = Path(__file__).resolve().parent / 'results'


def write_pictures(folder: Path, number: int, width: int = 500, height: int = 375) -> None:
    """JPEGs of ImageNet's usual size: smooth colours with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{index:05}.jpg', quality=90)


def contenders(
        pipe: Pipeline,
        pictures: Path,
        options: argparse.Namespace,
        cpu: Dict[str, List[float]],
) -> Dict[str, Callable[[], float]]:
    """Calls that return wall seconds for all pictures, and note this process's CPU seconds in `cpu`."""
    batches = [
        torch.randn(min(options.batch_size, options.images - start), *pipe.input_size, device=pipe.device)
        for start in range(0, options.images, options.batch_size)]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                pipe.model(batch).cpu()  # waits for an accelerator

    def predict() -> None:
        output = pictures.with_name('results.jsonl')
        report = predict_table(
            pipe, [str(pictures)], output, batch_size=options.batch_size, workers=options.workers)
        assert report.num_rows == options.images
        output.unlink()

    def timed(name: str, call: Callable[[], None]) -> Callable[[], float]:
        def measure() -> float:
            wall, busy = time.perf_counter(), time.process_time()
            call()
            cpu[name].append(time.process_time() - busy)
            return time.perf_counter() - wall
        return measure

    return {'bare': timed('bare', bare), 'predict': timed('predict', predict)}


def measure(name: str, pictures: Path, options: argparse.Namespace) -> Dict[str, Any]:
    """A row of the table: rates by the wall clock, and medians over the rounds of bare / predict."""
    pipe = vishub.pipeline(model=timm.create_model(name), device=options.device)
    cpu: Dict[str, List[float]] = {'bare': [], 'predict': []}
    before = os.getloadavg()[0]
    wall = take_turns(contenders(pipe, pictures, options, cpu), options.rounds)
    cpu = {key: values[1:] for key, values in cpu.items()}  # without the round that warms up
    return {
        'model': name,
        'images_per_second': {key: options.images / statistics.median(values) for key, values in wall.items()},
        'ratio_wall': statistics.median(ratios(wall['bare'], wall['predict'])),
        'ratio_cpu': statistics.median(ratios(cpu['bare'], cpu['predict'])),
        'load': [before, os.getloadavg()[0]],
    }


def report(rows: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f'# `vishub predict` and the bare model, {setting["device"]}',
        '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.',
        '',
        'Images a second by the wall clock; predict / bare is the median over the rounds, in which both take turns. '
        '*CPU* counts the CPU time of the process that runs the model alone: what `predict` adds to it where the '
        'workers that decode have cores of their own. The start of the workers and the wait for the first batch count, '
        f'which a long run does not notice. Goal: {GOAL}. Made by `python benchmarks/predict.py`.',
        '',
        '| model | bare, images/s | predict, images/s | predict / bare, wall | predict / bare, CPU | machine load |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for row in rows:
        rates, load = row['images_per_second'], row['load']
        lines.append(
            f'| {row["model"]} | {rates["bare"]:.1f} | {rates["predict"]:.1f} | {row["ratio_wall"]:.3f} '
            f'| {row["ratio_cpu"]:.3f} | {load[0]:.1f} to {load[1]:.1f} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['favit_b0', 'fcaformer_l1'], metavar='NAME')
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--workers', type=int, default=None, help='as in vishub predict')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of the model')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, default=RESULTS, metavar='DIR', help='folder of the table')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / 'pictures'
        pictures.mkdir()
        write_pictures(pictures, options.images)
        rows = [measure(name, pictures, options) for name in options.models]
    setting = {
        'device': options.device, 'images': f'{options.images} JPEGs of 500 x 375', 'batch_size': options.batch_size,
        'threads': options.threads, 'cores': os.cpu_count(), 'rounds': options.rounds, 'torch': torch.__version__,
    }
    page = report(rows, setting)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f'predict_{options.device.partition(":")[0]}'
    target.with_suffix('.md').write_text(page, encoding='utf-8')
    content = json.dumps({**setting, 'goal': GOAL, 'rows': rows}, indent=2)
    target.with_suffix('.json').write_text(f'{content}\n', encoding='utf-8')
    print(page, end='')
    print(f'written: {target}.md, .json')


if __name__ == '__main__':
    main()

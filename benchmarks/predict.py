"""Throughput of `vishub predict … --output results.jsonl` against the bare model on batches that are ready.

    python benchmarks/predict.py                                    # favit_b0, 96 JPEGs of 500 x 375, batch 16
    python benchmarks/predict.py --model favit_b2 --images 512 --batch-size 32 --threads 2 --rounds 5 --json

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
from typing import Callable, Dict, List

import numpy as np
import timm
import torch
from PIL import Image
from timing import ratios, take_turns

import vishub
from vishub.tasks.base import Pipeline
from vishub.tasks.table import predict_table

GOAL = 0.9


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='favit_b0')
    parser.add_argument('--images', type=int, default=96)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--workers', type=int, default=None, help='as in vishub predict')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of the model')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', action='store_true', help='print a JSON object')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = vishub.pipeline(model=timm.create_model(options.model), device=options.device)
    cpu: Dict[str, List[float]] = {'bare': [], 'predict': []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / 'pictures'
        pictures.mkdir()
        write_pictures(pictures, options.images)
        wall = take_turns(contenders(pipe, pictures, options, cpu), options.rounds)
    cpu = {name: values[1:] for name, values in cpu.items()}  # without the round that warms up
    result = {
        'model': options.model, 'device': options.device, 'batch_size': options.batch_size, 'images': options.images,
        'threads': options.threads, 'rounds': options.rounds,
        'images_per_second': {name: options.images / statistics.median(values) for name, values in wall.items()},
        'ratio_wall': statistics.median(ratios(wall['bare'], wall['predict'])),
        'ratio_cpu': statistics.median(ratios(cpu['bare'], cpu['predict'])),
        'goal': GOAL, 'cores': os.cpu_count(), 'load': [load, os.getloadavg()[0]],
    }
    if options.json:
        print(json.dumps(result))
        return
    rates = result['images_per_second']
    print(f'{options.model}, {options.device}, batch {options.batch_size}, {options.images} images, '
          f'{options.rounds} rounds, {options.threads} thread(s) of {os.cpu_count()} cores')
    print(f'bare model {rates["bare"]:.1f}, predict {rates["predict"]:.1f} images/s by the wall clock')
    print(f'predict / bare: {result["ratio_wall"]:.3f} wall, {result["ratio_cpu"]:.3f} CPU of the process that runs '
          f'the model (goal {GOAL})')
    print(f'load of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after')


if __name__ == '__main__':
    main()

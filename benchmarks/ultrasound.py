"""Frames a second of ASTR on a video: each frame through the backbone once (`stream`), or T times (a clip a frame).

    python benchmarks/ultrasound.py                                       # tiny at 64 px and 352 px, one CPU thread
    python benchmarks/ultrasound.py --models astr_pvt_v2_b2 --frames 6 --rounds 3
    python benchmarks/ultrasound.py --models astr_res2net50 --device cuda --chunks 1 8 --frames 64 --rounds 20

All contenders take turns; a row has the median over the rounds, and the time of the form that does not cache over the
row's, paired round by round. Both give the same logits. Weights are random, which costs the same as trained ones.
"""
import argparse
import statistics
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch
from page import add_options, begin, write
from timing import ratios, take_turns, timer

import vishub  # noqa: F401  registers the models
from vishub.models.astr import clip_indices


def contenders(
        model: Any, frames: torch.Tensor, chunks: Sequence[int]) -> Dict[str, Callable[[], torch.Tensor]]:
    """By name, a call that segments all frames (n, 3, H, W) of a video."""

    def clip_by_clip() -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([
                model(frames[clip_indices(place, model.clip_size, len(frames))][None]) for place in range(len(frames))])

    def streaming(chunk: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with torch.inference_mode():
                return torch.cat(list(model.stream(frames.split(chunk))))
        return call

    return {'a clip a frame': clip_by_clip, **{f'stream, {n} at once': streaming(n) for n in chunks}}


def measure(
        name: str, side: int, clip_size: int, num_frames: int, chunks: Sequence[int], rounds: int, device: str,
        threads: int) -> List[Dict[str, Any]]:
    """A row for each way."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, clip_size=clip_size).to(device).eval()
    frames = torch.randn(num_frames, 3, side, side, device=device)
    calls = contenders(model, frames, chunks)
    outputs = {way: call() for way, call in calls.items()}
    plain = outputs['a clip a frame']
    seconds = take_turns({way: timer(call, device, threads) for way, call in calls.items()}, rounds)
    rows = []
    for way in calls:
        faster = ratios(seconds['a clip a frame'], seconds[way])
        rows.append({
            'model': name, 'side': side, 'clip_size': clip_size, 'way': way,
            'frames_per_second': num_frames / statistics.median(seconds[way]),
            'to_plain': statistics.median(faster), 'to_plain_range': [min(faster), max(faster)],
            'difference': float((outputs[way] - plain).abs().max() / plain.abs().max()),
        })
    return rows


def report(rows: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f'# Ultrasound clips, {setting["device"]}',
        '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.',
        '',
        'Frames a second of a video, medians over the rounds, in which all took turns. *To a clip a frame*: its time '
        'over the row\'s, above 1 is faster; median and range over the rounds. *Difference*: of the logits, relative '
        'to the largest. Made by `python benchmarks/ultrasound.py`.',
        '',
        '| model | pixels | T | way | frames/s | to a clip a frame | difference |',
        '|---|---:|---:|---|---:|---:|---:|',
    ]
    for row in rows:
        low, high = row['to_plain_range']
        lines.append(
            f'| {row["model"]} | {row["side"]} | {row["clip_size"]} | {row["way"]} | {row["frames_per_second"]:.2f} '
            f'| {row["to_plain"]:.2f} ({low:.2f} to {high:.2f}) | {row["difference"]:.0e} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['astr_tiny', 'astr_tiny:352'], metavar='NAME[:SIDE]')
    parser.add_argument('--clip-size', type=int, default=3, help='frames T of a clip')
    parser.add_argument('--frames', type=int, default=12, help='frames of the video')
    parser.add_argument('--chunks', nargs='+', type=int, default=[1, 4], metavar='N')
    add_options(parser)
    options = parser.parse_args()
    setting = begin(options)
    rows: List[Dict[str, Any]] = []
    for word in options.models:
        name, _, side = word.partition(':')
        pixels = int(side) if side else timm.get_pretrained_cfg(name).input_size[-1]
        rows += measure(
            name, pixels, options.clip_size, options.frames, options.chunks, options.rounds, options.device,
            options.threads)
    told = {**setting(), 'frames': options.frames}
    write(options, 'ultrasound', report(rows, told), {**told, 'rows': rows})


if __name__ == '__main__':
    main()

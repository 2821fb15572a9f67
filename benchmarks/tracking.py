"""Speed of the tracking networks for 1 to 8 templates, with the template cache and without it.

    python benchmarks/tracking.py                                       # bactrack_tiny, one CPU thread
    python benchmarks/tracking.py --models bactrack_resnet18 bactrack_resnet50 --device cuda --rounds 50

A frame is one search crop, batch 1: backbone, transformer, heads and discriminator; cutting crops is not in it. With
the cache, templates are encoded once and the search alone runs; without it, both run for every frame. *Update* is what
a change of the collection costs: the new template's backbone, and the keys and values of all. The peer is timm's own
ResNet-50 features at the same stride and size. All contenders take turns. Weights are random, which costs the same.
"""
import argparse
import statistics
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch
from page import add_options, begin, write
from timing import ratios, take_turns, timer

import vishub  # noqa: F401  registers the models

PEER = 'resnet50 features'


def contenders(model: Any, counts: Sequence[int], device: str) -> Dict[str, Callable[[], object]]:
    """What is measured, by name: 'cached 4', 'joint 4', 'update 4', and the peer."""
    height, width = model.img_size
    search = torch.rand(1, 3, height, width, device=device)
    new = torch.rand(1, 3, *model.template_size, device=device)
    peer = timm.create_model(
        'resnet50', features_only=True, output_stride=8, out_indices=(3,)).to(device).eval()
    calls: Dict[str, Callable[[], object]] = {PEER: lambda: peer(search)}
    for count in counts:
        templates = torch.rand(1, count, 3, *model.template_size, device=device)
        with torch.inference_mode():
            projected = model.project(templates[0])[None]
            cache = model.encode_templates(projected)

        def update(projected: torch.Tensor = projected) -> object:
            tokens = model.project(new)
            return model.encode_templates(torch.cat([projected[:, :-1], tokens[None]], dim=1))

        calls[f'cached {count}'] = lambda cache=cache: model.track(search, cache)  # type: ignore[misc]
        calls[f'joint {count}'] = lambda templates=templates: model(templates, search)  # type: ignore[misc]
        calls[f'update {count}'] = update
    return {name: inference(call) for name, call in calls.items()}


def inference(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return call()
    return run


def measure(name: str, counts: Sequence[int], rounds: int, device: str, threads: int) -> List[Dict[str, Any]]:
    """A row for each number of templates."""
    model: Any = timm.create_model(name).to(device).eval()
    calls = contenders(model, counts, device)
    seconds = take_turns({key: timer(call, device, threads) for key, call in calls.items()}, rounds)
    rows = []
    for count in counts:
        cached, joint, update = (seconds[f'{kind} {count}'] for kind in ('cached', 'joint', 'update'))
        rows.append({
            'model': name, 'templates': count, 'num_params': sum(p.numel() for p in model.parameters()),
            'fps_cached': 1 / statistics.median(cached), 'fps_joint': 1 / statistics.median(joint),
            'update_ms': 1000 * statistics.median(update),
            'cache_gain': statistics.median(ratios(joint, cached)),
            'to_one_template': statistics.median(ratios(cached, seconds[f'cached {counts[0]}'])),
            'to_peer': statistics.median(ratios(seconds[PEER], cached)),
        })
    return rows


def report(rows: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f'# Tracking, {setting["device"]}',
        '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.',
        '',
        'Frames a second of the network at batch 1, medians over the rounds, in which all took turns. *Gain*: time '
        'without the template cache over time with it. *Cost*: time with so many templates over time with one, both '
        'cached. *To the peer*: time of ResNet-50\'s features (stride 8, the same crop) over the cached time, above 1 '
        'is faster. *Update*: milliseconds of a change of the collection. BACTrack-style networks, random weights. '
        'Made by `python benchmarks/tracking.py`.',
        '',
        '| model | parameters | templates | fps, cached | fps, no cache | gain | cost | update, ms | to the peer |',
        '|---|' + '---:|' * 8,
    ]
    lines += [
        f'| {row["model"]} | {row["num_params"] / 1e6:.2f} M | {row["templates"]} | {row["fps_cached"]:.1f} '
        f'| {row["fps_joint"]:.1f} | {row["cache_gain"]:.2f} | {row["to_one_template"]:.2f} | {row["update_ms"]:.1f} '
        f'| {row["to_peer"]:.2f} |'
        for row in rows]
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['bactrack_tiny'])
    parser.add_argument('--templates', nargs='+', type=int, default=[1, 2, 4, 8], metavar='K')
    add_options(parser, rounds=7)
    options = parser.parse_args()
    setting = begin(options)
    rows: List[Dict[str, Any]] = []
    for name in options.models:
        rows += measure(name, sorted(options.templates), options.rounds, options.device, options.threads)
    told = setting()
    write(options, 'tracking', report(rows, told), {**told, 'rows': rows})


if __name__ == '__main__':
    main()

"""How much faster a model is once its branches are merged: `timm.utils.reparameterize_model` against the training form.

    python benchmarks/reparameterization.py                      # table, FMViT's five sizes, batch 1 and 8
    python benchmarks/reparameterization.py --models fmvit_base --batch 1 --channels-last --json

Both forms run in eval mode on the CPU, in turns, so that whatever else the machine does slows both alike. The figure is
the median of the rounds' ratios (training form / deployed form); each ratio is of two runs that follow one another.
"""
import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Dict

import timm
import torch
from timing import clock_name, ratios, take_turns, timer
from timm.utils import reparameterize_model
from torch import nn

import vishub  # noqa: F401  (registers the models)
from vishub.files import atomic_path

MODELS = ('fmvit_tiny', 'fmvit_small', 'fmvit_medium', 'fmvit_base', 'fmvit_large')


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fill_statistics(model: nn.Module) -> None:
    """Statistics as a trained model has: zero means and unit variances would be nothing to merge."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.8, 1.2)


@torch.inference_mode()
def compare(name: str, batch: int, size: int, rounds: int, threads: int, channels_last: bool) -> Dict[str, Any]:
    """Time both forms of one model in turns.

    Returns:
        Parameter counts, median milliseconds of either form, the median, lowest and highest ratio, and the largest
        difference of the logits relative to the largest logit.
    """
    torch.manual_seed(0)
    training_form = timm.create_model(name).eval()
    fill_statistics(training_form)
    deployed = reparameterize_model(training_form)
    if num_params(deployed) == num_params(training_form):
        raise SystemExit(f'{name} has nothing to merge')
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 3, size, size).to(memory_format=memory_format)
    training_form, deployed = (m.to(memory_format=memory_format) for m in (training_form, deployed))

    expected = training_form(x)
    difference = (deployed(x) - expected).abs().max() / expected.abs().max()
    forms = {'training': training_form, 'deployed': deployed}
    seconds = take_turns(
        {form: timer(lambda model=model: model(x), threads=threads) for form, model in forms.items()}, rounds)
    gain = ratios(seconds['training'], seconds['deployed'])
    return {
        'model': name,
        'batch': batch,
        'size': size,
        'params_training': num_params(training_form),
        'params_deployed': num_params(deployed),
        'ms_training': round(1000 * statistics.median(seconds['training']), 2),
        'ms_deployed': round(1000 * statistics.median(seconds['deployed']), 2),
        'ratio': round(statistics.median(gain), 3),
        'ratio_lowest': round(min(gain), 3),
        'ratio_highest': round(max(gain), 3),
        'relative_difference': float(f'{difference.item():.1e}'),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME')
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--size', type=int, default=224, help='side of the square input in pixels')
    parser.add_argument('--rounds', type=int, default=15, help='timed runs of either form')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--output', type=Path, help='folder for reparameterization_cpu.md and .json')
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1 or min(args.batch) < 1:
        parser.error('--rounds, --threads and --batch must be at least 1')
    torch.set_num_threads(args.threads)

    rows = []
    for name in args.models:
        for batch in args.batch:
            rows.append(compare(name, batch, args.size, args.rounds, args.threads, args.channels_last))
            print(f'{name}, batch {batch}: done', file=sys.stderr)
    setting = {
        'device': 'cpu',
        'threads': args.threads,
        'clock': clock_name(threads=args.threads),
        'rounds': args.rounds,
        'channels_last': args.channels_last,
        'torch': torch.__version__,
        'timm': timm.__version__,
    }
    if args.json:
        print(json.dumps({'setting': setting, 'results': rows}, indent=2))
        return
    lines = [
        '# Merged branches: FMViT as trained against as deployed', '',
        ', '.join(f'{key} {value}' for key, value in setting.items()) + '.', '',
        f'Made by `python benchmarks/reparameterization.py {shlex.join(sys.argv[1:])}`.', '',
        '| model | batch | params (M) training -> deployed | ms training | ms deployed | ratio (lowest..highest) |',
        '|---|---|---|---|---|---|']
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['batch']} "
            f"| {row['params_training'] / 1e6:.2f} -> {row['params_deployed'] / 1e6:.2f} "
            f"| {row['ms_training']:.1f} | {row['ms_deployed']:.1f} "
            f"| {row['ratio']:.2f} ({row['ratio_lowest']:.2f}..{row['ratio_highest']:.2f}) |")
    text = '\n'.join(lines) + '\n'
    print(text, end='')
    if args.output:
        for suffix, content in (('md', text), ('json', json.dumps({'setting': setting, 'results': rows}, indent=2))):
            with atomic_path(args.output / f'reparameterization_cpu.{suffix}') as path:
                path.write_text(content, encoding='utf-8')


if __name__ == '__main__':
    main()

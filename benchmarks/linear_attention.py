"""LiT's linear attention against DiT's softmax attention: time and peak memory as the tokens grow.

    python benchmarks/linear_attention.py                             # 256 to 16,384 tokens, attention and network
    python benchmarks/linear_attention.py --tokens 256 1024 --no-network --rounds 3
    python benchmarks/linear_attention.py --sampling lit_small28.fashion_mnist dit_small28.fashion_mnist

Three attention modules of the same width, with their projections: softmax as torch fuses it (which keeps no matrix of
N x N), softmax as it is written, and LiT's. The network is DiT-S/2 and LiT-S/2, built for the grid. Contenders take
turns; the figure is the median. Memory is the peak of what torch allocates in one forward pass, above inputs and
weights. Writes linear_attention_DEVICE.{json,md,png}; --sampling prints how long four pictures take in 25 steps.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch
from memory import peak_bytes
from timing import clock_name, take_turns, timer
from torch import nn

import vishub  # noqa: F401  (registers the models)
from vishub.models.dit import SoftmaxAttention
from vishub.models.lit import LinearAttention

TOKENS = (256, 576, 1024, 2304, 4096, 9216, 16384)
FUSED, PLAIN, LINEAR = 'softmax, fused', 'softmax, plain', 'linear (LiT)'
RESULTS = Path(__file__).parent / 'results'


class PlainAttention(SoftmaxAttention):
    """Softmax attention step by step, with the matrix of all pairs of tokens in memory."""

    def forward(self, x: torch.Tensor, grid_size: Any = None) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3, B, heads, N, d
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def measure(calls: Dict[str, Callable[[], object]], rounds: int, device: str, threads: int) -> Dict[str, Any]:
    """Median seconds and peak bytes of each call; looking at the memory warms up."""
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    timers = {name: timer(call, device, threads) for name, call in calls.items()}
    if rounds == 1:
        seconds = {name: [measure_it()] for name, measure_it in timers.items()}
    else:
        seconds = take_turns(timers, rounds)
    return {name: {'seconds': statistics.median(seconds[name]), 'bytes': peaks[name]} for name in calls}


def grid_of(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise SystemExit(f'{tokens} tokens are no square grid: give 256, 576, 1024, …')
    return side


@torch.inference_mode()
def measure_attention(tokens: int, width: int, heads: int, linear_heads: int, **options: Any) -> Dict[str, Any]:
    side, device = grid_of(tokens), options['device']
    torch.manual_seed(0)
    modules: Dict[str, nn.Module] = {
        FUSED: SoftmaxAttention(width, heads), LINEAR: LinearAttention(width, linear_heads)}
    if heads * tokens ** 2 * 4 * 3 < options.pop('plain_limit'):
        modules[PLAIN] = PlainAttention(width, heads)
    x = torch.randn(1, tokens, width, device=device)
    modules = {name: module.eval().to(device) for name, module in modules.items()}
    return measure({name: lambda m=m: m(x, (side, side)) for name, m in modules.items()}, **options)


@torch.inference_mode()
def measure_network(tokens: int, **options: Any) -> Dict[str, Any]:
    side, device = grid_of(tokens), options['device']
    torch.manual_seed(0)
    networks = {
        name: timm.create_model(architecture, img_size=2 * side).eval().to(device)
        for name, architecture in ((FUSED, 'dit_s_2'), (LINEAR, 'lit_s_2'))}
    x = torch.randn(1, 4, 2 * side, 2 * side, device=device)
    t, y = torch.tensor([500], device=device), torch.tensor([0], device=device)
    return measure({name: lambda m=m: m(x, t, y) for name, m in networks.items()}, **options)


def table(rows: List[Dict[str, Any]]) -> str:
    """One of the two measurements as Markdown."""
    names = [name for name in (FUSED, PLAIN, LINEAR) if any(name in row['figures'] for row in rows)]
    lines = [
        '| tokens | ' + ' | '.join(f'{name}: ms' for name in names) + ' | linear is faster by | '
        + ' | '.join(f'{name}: MiB' for name in names) + ' |', '|---' * (2 * len(names) + 2) + '|']
    for row in rows:
        figures = row['figures']
        gain = figures[FUSED]['seconds'] / figures[LINEAR]['seconds']

        def cell(name: str, key: str, scale: float, figures: Dict[str, Any] = figures) -> str:
            return f'{figures[name][key] * scale:,.1f}' if name in figures else '–'

        lines.append(
            f'| {row["tokens"]:,} | ' + ' | '.join(cell(name, 'seconds', 1000) for name in names)
            + f' | {gain:.2f} x | ' + ' | '.join(cell(name, 'bytes', 2 ** -20) for name in names) + ' |')
    return '\n'.join(lines) + '\n'


def draw(report: Dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in ('attention', 'network') if report[part]]
    figure = Figure(figsize=(5.2 * len(parts), 7.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(parts), squeeze=False)
    for column, part in enumerate(parts):
        for row, (key, scale, label) in enumerate((('seconds', 1000, 'ms'), ('bytes', 2 ** -20, 'peak MiB'))):
            axis = axes[row][column]
            for name in (FUSED, PLAIN, LINEAR):
                points = [
                    (entry['tokens'], entry['figures'][name][key] * scale)
                    for entry in report[part] if name in entry['figures']]
                if points:
                    axis.plot(*zip(*points), marker='o', label=name)
            axis.set(xscale='log', yscale='log', xlabel='tokens', ylabel=label, title=report['titles'][part])
            axis.grid(alpha=0.3, which='both')
            axis.legend()
    figure.savefig(path, dpi=120)


def time_sampling(models: List[str], rounds: int, device: str) -> Dict[str, Any]:
    """Seconds that four pictures take in 25 steps, loading not counted."""
    from vishub.tasks.generation.pipeline import GenerationPipeline

    pipes = {model: GenerationPipeline(model, device) for model in models}
    seconds = take_turns({
        model: timer(lambda pipe=pipe: pipe(0, num_images=4, num_inference_steps=25), device, torch.get_num_threads())
        for model, pipe in pipes.items()}, rounds)
    return {model: {'median': statistics.median(times), 'all': times} for model, times in seconds.items()}


def write(report: Dict[str, Any], folder: Path, name: str) -> str:
    """Write JSON, Markdown and the plot; returns the Markdown."""
    facts = ', '.join(f'{key} {value}' for key, value in report['setting'].items())
    text = f'# Softmax and linear attention\n\n{facts}.\n' + ''.join(
        f'\n## {report["titles"][part]}\n\n{table(report[part])}' for part in ('attention', 'network') if report[part])
    (folder / f'linear_attention_{name}.json').write_text(json.dumps(report, indent=2) + '\n')
    (folder / f'linear_attention_{name}.md').write_text(text)
    draw(report, folder / f'linear_attention_{name}.png')
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', nargs='+', type=int, default=TOKENS, help='square numbers')
    parser.add_argument('--width', type=int, default=384, help='channels of the attention alone')
    parser.add_argument('--heads', type=int, default=6, help='heads of the softmax attention alone')
    parser.add_argument('--linear-heads', type=int, default=2, help='heads of the linear attention alone')
    parser.add_argument(
        '--network', action=argparse.BooleanOptionalAction, default=True, help='measure DiT-S/2 and LiT-S/2')
    parser.add_argument('--rounds', type=int, default=7, help='timed rounds; above 4,096 tokens one third of them')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--plain-limit', type=float, default=4e9, help='bytes that the matrix of all pairs may take')
    parser.add_argument('--output', type=Path, default=RESULTS)
    parser.add_argument('--sampling', nargs='+', metavar='MODEL', help='time sampling with these models, nothing else')
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error('--rounds and --threads must be at least 1')
    torch.set_num_threads(args.threads)
    setting = {
        'device': torch.cuda.get_device_name() if args.device.startswith('cuda') else 'cpu', 'threads': args.threads,
        'clock': clock_name(args.device, args.threads), 'rounds': args.rounds, 'dtype': 'float32', 'batch': 1,
        'torch': torch.__version__}
    if args.sampling:
        print(json.dumps({'setting': setting, 'seconds': time_sampling(args.sampling, args.rounds, args.device)}))
        return

    report: Dict[str, Any] = {
        'setting': setting, 'attention': [], 'network': [],
        'titles': {
            'attention': f'attention alone, width {args.width}, {args.heads} and {args.linear_heads} heads',
            'network': 'whole network, DiT-S/2 and LiT-S/2'}}
    name = 'cuda' if args.device.startswith('cuda') else 'cpu'
    args.output.mkdir(parents=True, exist_ok=True)
    for tokens in args.tokens:
        options = dict(
            rounds=args.rounds if tokens <= 4096 else max(1, args.rounds // 3), device=args.device,
            threads=args.threads)
        report['attention'].append({'tokens': tokens, 'figures': measure_attention(
            tokens, args.width, args.heads, args.linear_heads, plain_limit=args.plain_limit, **options)})
        if args.network:
            report['network'].append({'tokens': tokens, 'figures': measure_network(tokens, **options)})
        print(f'{tokens} tokens: done', file=sys.stderr, flush=True)
        text = write(report, args.output, name)  # after each size: the last ones take long
    print(text)


if __name__ == '__main__':
    main()

"""What the classification models cost to run, beside timm's models of similar size.

    python benchmarks/models.py                                      # all models at 224 px, fp32, CPU
    python benchmarks/models.py --models favit_b2 swin_tiny_patch4_window7_224 --rounds 3 --batch-size 1
    python benchmarks/models.py --device cuda --batch-size 64        # also fp16 and bf16, channels last, compiled

Throughput at --batch-size, latency at batch 1, peak memory, parameters and multiply-accumulates (MACs), all of the form
one deploys: `timm.utils.reparameterize_model` has merged what can be merged, in the peers too. Weights are random,
which costs the same as trained ones. Models take turns; a figure is the median of the rounds, a ratio the median of the
rounds' ratios to resnet50. Writes models_<device>.md, .json and .png.
"""
import argparse
import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timing import clock_name, ratios, take_turns, timer
from torch import nn

import vishub  # noqa: F401  (registers the models)
from vishub import catalog
from vishub.files import atomic_path
from vishub.models.cost import module_macs

REFERENCE = 'resnet50'  # what every ratio is to
PEERS = (
    REFERENCE, 'resnet101', 'deit_small_patch16_224', 'swin_tiny_patch4_window7_224', 'pvt_v2_b2', 'efficientformer_l1',
    'efficientformer_l3', 'nextvit_small',
)
RESULTS = Path(__file__).parent / 'results'


@dataclass(frozen=True)
class Mode:
    """One way to run a model."""
    name: str
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    compile: bool = False


CPU_MODES = (Mode('fp32'),)
CUDA_MODES = (
    Mode('fp32'),
    Mode('fp16', torch.float16, torch.channels_last, True),
    Mode('bf16', torch.bfloat16, torch.channels_last, True),
)


def default_models() -> Tuple[str, ...]:
    """The catalogue's classification models for 224 px pictures, then the peers."""
    rows = catalog.architectures('classification')
    return tuple(row.name for row in rows if row.input == (3, 224, 224)) + PEERS


def deployed(name: str) -> nn.Module:
    """The model as one would run it: eval mode, branches merged, random weights."""
    torch.manual_seed(0)
    # In place: the memory that is measured must not hold the training form beside it.
    return timm.utils.reparameterize_model(timm.create_model(name).eval().requires_grad_(False), inplace=True)


def example(model: nn.Module, batch: int, device: str, mode: Mode) -> torch.Tensor:
    """Random pictures of the model's default size: batch, 3, height, width."""
    shape = (batch, *model.pretrained_cfg['input_size'])
    return torch.randn(shape, device=device, dtype=mode.dtype).contiguous(memory_format=mode.memory_format)


@torch.inference_mode()
def memory_growth(name: str, batch: int, threads: int) -> Optional[int]:
    """Bytes by which this process grows at its peak from before the model is built until after one batch.

    None where the system does not tell (anything but Linux).
    """
    def status(field: str) -> int:
        for line in Path('/proc/self/status').read_text(encoding='ascii').splitlines():
            if line.startswith(f'{field}:'):
                return 1024 * int(line.split()[1])
        raise KeyError(field)

    if not Path('/proc/self/status').exists():
        return None
    torch.set_num_threads(threads)
    # The libraries' own first-use memory is nothing of the model's.
    nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Linear(30, 8))(torch.randn(1, 3, 32, 32))
    before = status('VmRSS')
    model = deployed(name)
    model(example(model, batch, 'cpu', CPU_MODES[0]))
    return status('VmHWM') - before


def peak_memory_cpu(name: str, batch: int, threads: int) -> Optional[int]:
    """`memory_growth` in a process of its own, forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'vishub.models'])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory_growth, name, batch, threads).result()


def peak_memory_cuda(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes on the device at the peak of a forward: weights, input, activations."""
    model(x)  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    held = sum(t.numel() * t.element_size() for t in (x, *model.parameters(), *model.buffers()))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x)
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def family_of(name: str) -> str:
    """Name of one of our families, or `peer`."""
    try:
        row = catalog.find(name)
    except catalog.UnknownNameError:
        return 'peer'
    return row.family if isinstance(row, catalog.Architecture) else catalog.find(row.architecture).family


def key(name: str, mode: str, batch: int) -> str:
    return f'{name} {mode} {batch}'


@torch.inference_mode()
def measure(names: Sequence[str], device: str, batch: int, rounds: int, threads: int) -> List[Dict[str, Any]]:
    """Run all models in turns; one row a model (see `result_rows`)."""
    modes = CUDA_MODES if device.startswith('cuda') else CPU_MODES
    facts: Dict[str, Dict[str, Any]] = {}
    contenders = {}
    columns = TextColumn('{task.description:45}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), \
        TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        building = bars.add_task('memory, sizes', total=len(names))
        for name in names:
            bars.update(building, description=f'memory, sizes: {name}')
            memory = {} if device.startswith('cuda') else {'fp32': peak_memory_cpu(name, batch, threads)}
            facts[name] = dict(memory=memory)
            for mode in modes:
                model = deployed(name).to(device, mode.dtype, memory_format=mode.memory_format)
                if mode == modes[0]:
                    facts[name].update(
                        params=sum(p.numel() for p in model.parameters()),
                        macs=module_macs(model, example(model, 1, device, mode)),
                        input=list(model.pretrained_cfg['input_size']))
                inputs = {size: example(model, size, device, mode) for size in dict.fromkeys((batch, 1))}
                # Without dynamic=False the second batch size would be compiled for any size.
                run = torch.compile(model, dynamic=False) if mode.compile else model
                if device.startswith('cuda'):
                    memory[mode.name] = peak_memory_cuda(run, inputs[batch])
                for size, x in inputs.items():
                    contenders[key(name, mode.name, size)] = timer(lambda run=run, x=x: run(x), device, threads)
            bars.advance(building)
        running = bars.add_task('speed', total=(rounds + 1) * len(contenders))

        def on_turn(which: str) -> None:
            bars.update(running, advance=1, description=f'speed: {which.partition(" ")[0]}')

        seconds = take_turns(contenders, rounds, on_turn)
    return result_rows(facts, seconds, [mode.name for mode in modes], batch)


def result_rows(
        facts: Dict[str, Dict[str, Any]],
        seconds: Dict[str, List[float]],
        modes: Iterable[str],
        batch: int,
) -> List[Dict[str, Any]]:
    """One row a model, by rising MACs.

    Args:
        facts: By model: `params`, `macs`, `input`, and `memory` in bytes by mode.
        seconds: By `key`: one forward in every round. The reference must be among the models.
        modes: Names of the ways to run.
        batch: Batch size of the throughput.

    Returns:
        `model`, `family`, `input`, `params`, `macs` and `modes`: by mode `throughput` (images a second),
        `throughput_ratio` and `latency_ratio` (to the reference in the same mode; above 1 is more images and more
        time), `latency_ms` (batch 1) and `memory` (bytes or None).
    """
    rows = []
    for name, known in sorted(facts.items(), key=lambda item: item[1]['macs']):
        by_mode = {}
        for mode in modes:
            many, one = seconds[key(name, mode, batch)], seconds[key(name, mode, 1)]
            of_many, of_one = seconds[key(REFERENCE, mode, batch)], seconds[key(REFERENCE, mode, 1)]
            by_mode[mode] = dict(
                throughput=round(batch / statistics.median(many), 3),
                throughput_ratio=round(statistics.median(ratios(of_many, many)), 3),
                latency_ms=round(1000 * statistics.median(one), 3),
                latency_ratio=round(statistics.median(ratios(one, of_one)), 3),
                memory=known['memory'].get(mode))
        rows.append(dict(
            model=name, family=family_of(name), input=known['input'], params=known['params'], macs=known['macs'],
            modes=by_mode))
    return rows


def table(rows: List[Dict[str, Any]], batch: int) -> str:
    """The rows as Markdown; ours are bold."""
    modes = list(rows[0]['modes'])
    head = ['model', 'params (M)', 'MACs (G)']
    for mode in modes:
        prefix = f'{mode} ' if len(modes) > 1 else ''
        head += [f'{prefix}images/s, batch {batch}', f'speed / {REFERENCE}', f'{prefix}ms, batch 1',
                 f'time / {REFERENCE}', f'{prefix}peak MiB']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' + '|---:' * (len(head) - 1) + '|']
    for row in rows:
        name = row['model'] if row['family'] == 'peer' else f'**{row["model"]}**'
        cells = [name, f'{row["params"] / 1e6:.1f}', f'{row["macs"] / 1e9:.2f}']
        for figures in row['modes'].values():
            memory = '–' if figures['memory'] is None else f'{figures["memory"] / 2**20:.0f}'
            cells += [f'{figures["throughput"]:.1f}', f'{figures["throughput_ratio"]:.2f}',
                      f'{figures["latency_ms"]:.1f}', f'{figures["latency_ratio"]:.2f}', memory]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def plot(rows: List[Dict[str, Any]], mode: str, batch: int, path: Path) -> None:
    """Throughput against MACs, both axes logarithmic: families in colour, peers grey, every point labelled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = ('#2b6cb0', '#c05621', '#2f855a', '#6b46c1', '#b83280', '#975a16')
    names = [family.name for family in catalog.families() if any(row['family'] == family.name for row in rows)]
    colour = {**{name: colours[i % len(colours)] for i, name in enumerate(names)}, 'peer': '#8a8a8a'}
    figure = Figure(figsize=(10, 7), layout='constrained')
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    points = [(row['macs'] / 1e9, row['modes'][mode]['throughput']) for row in rows]
    for group in [*names, 'peer']:
        xy = [point for point, row in zip(points, rows) if row['family'] == group]
        if xy:
            label = 'timm peers' if group == 'peer' else group
            axis.scatter(*zip(*xy), s=42, color=colour[group], zorder=3, label=label)
    axis.set(xscale='log', yscale='log', xlabel='multiply-accumulates of one image (G)',
             ylabel=f'images a second, batch {batch}, {mode}')
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter('{x:g}')
        which.set_minor_formatter('{x:g}')
        which.set_tick_params(which='both', labelsize='small')
    axis.margins(0.12)
    axis.grid(True, which='both', color='#ececec', linewidth=0.6)
    axis.legend(frameon=False)
    place_labels(axis, points, [row['model'] for row in rows], [colour[row['family']] for row in rows])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def place_labels(
        axis: Any,
        points: Sequence[Tuple[float, float]],
        labels: Sequence[str],
        colours: Sequence[str],
) -> None:
    """Write a label beside each point where it covers no other label, no point and not the legend.

    A label that is not right beside its point gets a thin line to it.
    """
    from matplotlib.transforms import Bbox

    figure = axis.figure
    figure.draw_without_rendering()  # fixes the layout, in which the distances are measured
    figure.set_layout_engine('none')
    pixels = axis.transData.transform(points)
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in pixels]
    taken.append(axis.get_legend().get_window_extent())
    frame = axis.get_window_extent()
    scale = 72 / figure.dpi  # points (the unit of the offsets) a pixel
    for (x, y), point, label, colour in zip(pixels, points, labels, colours):
        text = axis.annotate(
            label, point, xytext=(0, 0), textcoords='offset points', fontsize=8, va='bottom', color=colour)
        extent = text.get_window_extent()
        width, height = extent.width, extent.height
        for distance, angle in ((d, a) for d in range(10, 300, 8) for a in (0, 180, 90, 270, 35, 325, 145, 215)):
            # The label's nearest edge lies `distance` pixels from the point in the direction of the angle.
            dx, dy = (round(f(math.radians(angle)), 6) for f in (math.cos, math.sin))
            left = x + distance * dx + width * (dx - 1) / 2
            bottom = y + distance * dy + height * (dy - 1) / 2
            box = Bbox.from_bounds(left - 2, bottom - 1, width + 4, height + 2)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text.set_position(((left - x) * scale, (bottom - y) * scale))
        if distance > 10:
            edge = min(max(x, left), left + width), min(max(y, bottom), bottom + height)
            axis.annotate('', axis.transData.inverted().transform(edge), xytext=point,
                          arrowprops=dict(arrowstyle='-', color=colour, linewidth=0.6))


def setting_of(device: str, batch: int, rounds: int, threads: int) -> Dict[str, Any]:
    """What the figures depend on."""
    on_cuda = device.startswith('cuda')
    return {
        'device': torch.cuda.get_device_name(device) if on_cuda else f'CPU {platform.machine()}',
        'threads': threads,
        'clock': clock_name(device, threads),
        'batch_size': batch,
        'rounds': rounds,
        'memory': 'torch.cuda.max_memory_allocated' if on_cuda else 'growth of the peak resident size of a process',
        'torch': torch.__version__,
        'timm': timm.__version__,
    }


def save(rows: List[Dict[str, Any]], setting: Dict[str, Any], kind: str, folder: Path) -> None:
    """Write models_<kind>.json, .md and .png."""
    batch, mode = setting['batch_size'], list(rows[0]['modes'])[-1]
    with atomic_path(folder / f'models_{kind}.json') as path:
        path.write_text(json.dumps({'setting': setting, 'results': rows}, indent=2) + '\n', encoding='utf-8')
    plot(rows, mode, batch, folder / f'models_{kind}.png')
    lines = [
        f'# Classification models, {kind}', '',
        ', '.join(f'{name.replace("_", " ")} {value}' for name, value in setting.items()) + '.', '',
        'Deployed form (branches merged), random weights, models in turns, median of the rounds; memory at the batch '
        f'size of the throughput. Ours are bold. Made by `python benchmarks/models.py {shlex.join(sys.argv[1:])}`.', '',
        table(rows, batch),
        f'![Throughput against multiply-accumulates](models_{kind}.png)', '',
    ]
    with atomic_path(folder / f'models_{kind}.md') as path:
        path.write_text('\n'.join(lines), encoding='utf-8')


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=default_models(), metavar='NAME',
                        help=f'any models of vishub and timm; {REFERENCE} always runs too')
    parser.add_argument('--rounds', type=int, default=5, help='timed turns of every model')
    parser.add_argument('--batch-size', type=int, default=8, help='of the throughput and the memory')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:1')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--output', type=Path, default=RESULTS, metavar='DIR', help='folder of the table and the plot')
    options = parser.parse_args(arguments)
    if min(options.rounds, options.batch_size, options.threads) < 1:
        parser.error('--rounds, --batch-size and --threads must be at least 1')
    names = tuple(dict.fromkeys((REFERENCE, *options.models)))
    for name in names:
        if not timm.is_model(name):
            parser.error(f"neither vishub nor timm has a model '{name}'")
    if not (options.device == 'cpu' or options.device.startswith('cuda')):
        parser.error('--device must be cpu, cuda or cuda:N')
    if options.device.startswith('cuda'):
        if not torch.cuda.is_available():
            parser.error('no CUDA device here')
        # Variants of one family share their forward's code; each is compiled for itself all the same.
        torch._dynamo.config.cache_size_limit = 4 * len(names)
    torch.set_num_threads(options.threads)

    torch.set_flush_denormal(True)  # random weights can make numbers that no trained model computes, and slowly
    try:
        rows = measure(names, options.device, options.batch_size, options.rounds, options.threads)
    finally:
        torch.set_flush_denormal(False)
    setting = setting_of(options.device, options.batch_size, options.rounds, options.threads)
    kind = options.device.partition(':')[0]
    save(rows, setting, kind, options.output)
    print(table(rows, options.batch_size), end='')
    print(f'written: {options.output / f"models_{kind}"}.md, .json, .png')


if __name__ == '__main__':
    main()

"""How near token reduction comes to its limit: the same model with the same tokens sliced away for free.

    python benchmarks/tokens.py                       # deit_small, batch 1 and 8, 65 % and 50 % of the MACs, fp32, CPU
    python benchmarks/tokens.py --methods tome --batch 8 --rounds 9
    python benchmarks/tokens.py --device cuda --dtype float16 --batch 64

Weights are random, which costs the same as trained ones. All contenders of a batch size run in turns, each going first
equally often, so that whatever else the machine does slows all alike; a figure is the median of the rounds' ratios. On
the CPU with one thread the clock is CPU time, on CUDA the device's own. Writes tokens_<device>.md, .json and .png.
"""
import argparse
import copy
import ctypes
import importlib
import json
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import timm
import torch
from timing import clock_name, ratios, take_turns, timer
from torch import nn

from vishub import tokens
from vishub.files import atomic_path
from vishub.tokens.method import find_method

# Goals of the project at batch 8 on the CPU, as shares of the oracle's throughput (pyra: of our tome's).
GOALS = dict(tome=0.95, zero_tprune=0.94, token_transforming=0.97, pyra=0.98)
SPEED_GOAL = ('token_transforming', 0.6, 1.5)  # method, share of the MACs, times the baseline
METHODS = ('tome', 'pyra', 'zero_tprune', 'token_transforming', 'class_attention', 'random', 'uniform')
# Beside the targets: the budget of SPEED_GOAL, and few big steps where the default has many small ones.
EXTRAS = (('token_transforming', 0.6, None), ('token_transforming', 0.6, (3, 6, 9)),
          ('token_transforming', 0.65, (3, 6, 9)), ('zero_tprune', 0.65, (3, 6, 9)))
RESULTS = Path(__file__).parent / 'results'


class _Oracle(tokens.Method):
    """Decides nothing and moves nothing: the first `count` tokens are the ones that stay."""

    def reduce(self, x: torch.Tensor, state: tokens.State, seen: tokens.Seen) -> Tuple[torch.Tensor, tokens.State]:
        return x[:, :seen.count], state


class _OracleMid(_Oracle):
    place = 'mid'


tokens.register_method('oracle_end', _Oracle)
tokens.register_method('oracle_mid', _OracleMid)


@dataclass
class Contender:
    """A model that takes part.

    Attributes:
        name: E.g. `tome 65 %`.
        macs, overhead: Share of the baseline's multiply-accumulates; what deciding adds.
        method, target, layers: How it was made; None for the baseline and the oracles.
        tokens_after: Behind every block.
        oracle: Name of the one with the same counts.
        peer: What the goal is a share of: its oracle, or tome for pyra.
    """
    name: str
    model: nn.Module = field(repr=False)
    macs: float = 1.
    overhead: float = 0.
    method: Optional[str] = None
    target: Optional[float] = None
    layers: Optional[Tuple[int, ...]] = None
    tokens_after: Tuple[int, ...] = ()
    oracle: Optional[str] = None
    peer: Optional[str] = None


def contenders(name: str, methods: Sequence[str], targets: Sequence[float], device: str, dtype: str) -> List[Contender]:
    """The baseline, the loop with reduction off, every method at every target, and their oracles."""
    base = timm.create_model(name).eval().to(device, getattr(torch, dtype)).requires_grad_(False)
    weights = list(base.parameters())

    def fresh() -> nn.Module:
        return copy.deepcopy(base, {id(weight): weight for weight in weights})  # all share one set of weights

    full = tokens.macs(base).total
    found = [Contender('baseline', base), Contender('loop, reduction off', tokens.apply(fresh(), 'tome', r=0))]
    oracles: Dict[Tuple[str, Tuple[int, ...]], str] = {}
    wanted = [(method, target, None) for target in targets for method in methods]
    wanted += [extra for extra in EXTRAS if extra[0] in methods and max(extra[2] or (0,)) < len(base.blocks)]
    for method, target, layers in wanted:
        folded = dict(lora=0) if method == 'pyra' else {}  # as one runs it after training: merge_lora
        where = {} if layers is None else dict(layers=layers)
        model = tokens.apply(fresh(), method, macs=target, **where, **folded)
        count = tokens.macs(model)
        suffix = f' {target:.0%}'.replace('%', ' %') + (f' in blocks {", ".join(map(str, layers))}' if layers else '')
        row = Contender(method + suffix, model, count.total / full, count.overhead / full, method, target, layers,
                        tuple(count.tokens_end))
        found.append(row)
        place = find_method(method).place
        if (place, row.tokens_after) not in oracles:
            oracles[place, row.tokens_after] = f'oracle of {row.name}'
            found.append(Contender(
                f'oracle of {row.name}', tokens.apply(fresh(), f'oracle_{place}',
                                                      tokens_after=dict(enumerate(row.tokens_after))), row.macs))
        row.oracle = oracles[place, row.tokens_after]
        row.peer = f'tome{suffix}' if method == 'pyra' and 'tome' in methods else row.oracle
    return found


def example(model: nn.Module, batch: int, device: str, dtype: str) -> torch.Tensor:
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, device=device, dtype=getattr(torch, dtype))


def measure(found: Sequence[Contender], batch: int, options: argparse.Namespace) -> Dict[str, List[float]]:
    """Seconds a forward of every model in every round; one more round comes first and is not counted."""
    x = example(found[0].model, batch, options.device, options.dtype)
    with torch.inference_mode():
        return take_turns(
            {row.name: timer(lambda model=row.model: model(x), options.device, options.threads) for row in found},
            options.rounds)


def report(found: Sequence[Contender], seconds: Dict[str, List[float]], batch: int) -> List[Dict[str, Any]]:
    """One row a contender."""
    rows = []
    for contender in found:
        values = seconds[contender.name]
        row = {key: value for key, value in vars(contender).items() if key != 'model'}
        row.update(batch=batch, milliseconds=1000 * statistics.median(values),
                   speedup=statistics.median(ratios(seconds['baseline'], values)))
        if contender.oracle:
            shares = ratios(seconds[contender.oracle], values)
            row['of_oracle'] = statistics.median(shares)
            row['of_oracle_quartiles'] = quartiles(shares)
            row['of_peer'] = statistics.median(ratios(seconds[contender.peer], values))
            row['goal'] = GOALS.get(contender.method)
        rows.append(row)
    return rows


def quartiles(values: Sequence[float]) -> List[float]:
    return list(values) * 2 if len(values) == 1 else statistics.quantiles(values, n=4, method='inclusive')[::2]


# Functions that a method calls, by the module in which it calls them: where its time goes.
_PARTS = {
    'tome': ('sum_heads', 'bipartite_matching', 'merge'),
    'pyra': ('fold',),
    'zero_tprune': ('page_rank', 'filter_heads', 'take_rows', 'similarity'),
    'token_transforming': ('sum_heads', 'take_rows', 'similarity', 'transform_matrix', 'spread'),
    'backbones': ('attend',),
}


def time_spent(model: nn.Module, x: torch.Tensor, rounds: int) -> Dict[str, float]:
    """CPU milliseconds a forward in attention, in the method's `reduce`, and in the parts of that (median)."""
    spent: Dict[str, float] = defaultdict(float)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = call(*args, **kwargs)
            spent[name] += 1000 * (time.process_time() - start)
            return result
        return run

    every: List[Dict[str, float]] = []
    method = model._token_reduction.method
    with ExitStack() as stack, torch.inference_mode():
        for module, names in _PARTS.items():
            holder = importlib.import_module(f'vishub.tokens.{module}')
            for name in names:
                stack.enter_context(mock.patch.object(holder, name, timed(name, getattr(holder, name))))
        stack.enter_context(mock.patch.object(method, 'reduce', timed('reduce', method.reduce)))
        for _ in range(rounds + 1):
            spent.clear()
            model(x)
            every.append(dict(spent))
    return {name: statistics.median(round_[name] for round_ in every[1:]) for name in every[-1]}


def where_time_goes(found: Sequence[Contender], batch: int, options: argparse.Namespace) -> List[Dict[str, Any]]:
    """For the methods with a goal, at the first target: the parts of their time, and the oracle's attention."""
    x = example(found[0].model, batch, options.device, options.dtype)
    models = {row.name: row.model for row in found}
    rows = []
    for row in found:
        if row.method in GOALS and row.target == options.targets[0]:
            spent = time_spent(row.model, x, 3)
            attention = spent.pop('attend') - time_spent(models[row.oracle], x, 3)['attend']
            rows.append(dict(contender=row.name, attention_more=attention, reduce=spent.pop('reduce'), parts=spent))
    return rows


def hold_memory() -> bool:
    """Keep freed memory in the process, where the C library can be told to; says whether it was.

    By default glibc hands large buffers back to the kernel and gets them anew, page fault by page fault. That takes a
    tenth of the time of a batch of 8 here, and who pays depends on who ran before.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(key, value) for key, value in (
        (mmap_threshold, 32 << 20), (trim_threshold, 1 << 30), (top_pad, 256 << 20)))


def table(rows: Sequence[Dict[str, Any]], batch: int) -> str:
    """Markdown. The oracles have no line of their own: their speed is that of a method over its share."""
    lines = ['| contender | MACs % | deciding % | ms | times baseline | share of the oracle (quartiles) | goal |',
             '|---|---:|---:|---:|---:|---|---|']
    for row in rows:
        if row['batch'] != batch or row['name'].startswith('oracle'):
            continue
        share = goal = ''
        if 'of_oracle' in row:
            low, high = row['of_oracle_quartiles']
            share = f'{row["of_oracle"]:.3f} ({low:.3f}–{high:.3f})'
        if batch == 8 and row.get('goal'):
            reached = 'reached' if row['of_peer'] >= row['goal'] else 'missed'
            what = f'{row["of_peer"]:.3f} of ToMe, ' if row['peer'] != row['oracle'] else ''
            goal = f'{what}{row["goal"]:.2f}: {reached}'
            if (row['method'], row['target']) == SPEED_GOAL[:2]:
                fast = 'reached' if row['speedup'] >= SPEED_GOAL[2] else 'missed'
                goal += f'; {SPEED_GOAL[2]} times baseline: {fast}'
        lines.append(f'| {row["name"]} | {100 * row["macs"]:.1f} | {100 * row["overhead"]:.2f} | '
                     f'{row["milliseconds"]:.1f} | {row["speedup"]:.2f} | {share} | {goal} |')
    return '\n'.join(lines) + '\n'


def parts_table(rows: Sequence[Dict[str, Any]]) -> str:
    lines = ['| contender | attention, more than the oracle, ms | deciding and moving, ms | of which |',
             '|---|---:|---:|---|']
    for row in rows:
        parts = ', '.join(f'{name} {value:.1f}' for name, value in sorted(row['parts'].items(), key=lambda p: -p[1]))
        lines.append(f'| {row["contender"]} | {row["attention_more"]:.1f} | {row["reduce"]:.1f} | {parts} |')
    return '\n'.join(lines) + '\n'


def plot(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Speed-up over the baseline, a bar a contender, with a mark at what its oracle reaches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({row['batch'] for row in rows})
    shown = [row for row in rows if row['method'] and row['batch'] == batches[0]]
    speed = {(row['name'], row['batch']): row['speedup'] for row in rows}
    figure = Figure(figsize=(5.5 * len(batches) + 1.5, 0.34 * len(shown) + 1.4), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches):
        places = range(len(shown))
        axis.barh(places, [speed[row['name'], batch] for row in shown], height=0.7, color='#2b6cb0', label='measured')
        axis.scatter([speed[row['oracle'], batch] for row in shown], places, marker='|', s=160, linewidths=2,
                     color='#c05621', zorder=3, label='same tokens dropped for free')
        axis.axvline(1, color='#555555', linewidth=0.8)
        axis.set(xlabel='times the throughput of the full model', title=f'batch {batch}')
        axis.set_yticks(places, [row['name'] for row in shown])
        axis.grid(True, axis='x', color='#ececec', linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save(rows: List[Dict[str, Any]], parts: List[Dict[str, Any]], setting: Dict[str, Any], folder: Path) -> Path:
    """Write tokens_<device>.json, .md and .png; returns the .md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f'tokens_{setting["device"].partition(":")[0]}'
    content = {'setting': setting, 'results': rows, 'parts': parts}
    with atomic_path(folder / f'{stem}.json') as path:
        path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    plot(rows, folder / f'{stem}.png')
    lines = [
        f'# Token reduction, {setting["device"]}', '',
        ', '.join(f'{name.replace("_", " ")} {value}' for name, value in setting.items()) + '.', '',
        'Random weights; contenders in turns; a ratio is the median of the rounds\' ratios. The oracle is the same '
        'model with the same number of tokens sliced away for free at the same places. Made by '
        f'`{shlex.join(["python", "benchmarks/tokens.py", *sys.argv[1:]])}`.', '',
    ]
    for batch in sorted({row['batch'] for row in rows}):
        lines += [f'## Batch {batch}', '', table(rows, batch)]
    if parts:
        told = f'Milliseconds of a forward of {setting["parts_batch"]} images, each the median of three on its own.'
        lines += ['## Where the time goes', '', told, '', parts_table(parts)]
    lines += [f'![Speed beside the oracle\'s]({stem}.png)', '']
    with atomic_path(folder / f'{stem}.md') as path:
        path.write_text('\n'.join(lines), encoding='utf-8')
    return folder / f'{stem}.md'


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='deit_small_patch16_224')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=tokens.methods())
    parser.add_argument('--targets', nargs='+', type=float, default=[0.65, 0.5], help='shares of the full MACs')
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'float16', 'bfloat16'])
    parser.add_argument('--output', type=Path, default=RESULTS, help='folder of the results')
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    on_cpu = options.device == 'cpu'
    held = on_cpu and hold_memory()
    found = contenders(options.model, options.methods, options.targets, options.device, options.dtype)
    rows = [row for batch in options.batch for row in report(found, measure(found, batch, options), batch)]
    # Part by part, only the CPU's clock is true: on CUDA a call returns before its work is done.
    parts = where_time_goes(found, max(options.batch), options) if on_cpu else []
    setting = dict(
        model=options.model, device=options.device, dtype=options.dtype, threads=options.threads,
        rounds=options.rounds, clock=clock_name(options.device, options.threads),
        hardware=platform.machine() if on_cpu else torch.cuda.get_device_name(options.device),
        memory='kept in the process' if held else 'as the C library does', parts_batch=max(options.batch),
        torch=torch.__version__, timm=timm.__version__)
    print(save(rows, parts, setting, options.output).read_text(encoding='utf-8'))


if __name__ == '__main__':
    main()

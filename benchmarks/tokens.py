"""How near token reduction comes to its limit: the same model with the same tokens sliced away for free.

    python benchmarks/tokens.py                                # table: deit_small, batch 1 and 8, 65 % and 50 % MACs
    python benchmarks/tokens.py --methods tome --batch 8 --rounds 9 --json
    python benchmarks/tokens.py --device cuda --dtype float16 --batch 64

Weights are random, which costs the same as trained ones. All contenders of a batch size run in turns, each going first
equally often, so that whatever else the machine does slows all alike; a figure is the median of the rounds' ratios. On
the CPU with one thread the clock is CPU time, on CUDA the device's own.
"""
import argparse
import copy
import json
import statistics
from typing import Any, Dict, List, Tuple

import timm
import torch
from timing import ratios, take_turns, timer
from torch import nn

from vishub import tokens
from vishub.tokens.method import find_method

# Goals of the project at batch 8 on the CPU, as shares of the oracle's throughput (pyra: of our tome's).
GOALS = dict(tome=0.95, zero_tprune=0.94, token_transforming=0.97, pyra=0.98)
METHODS = ('tome', 'pyra', 'zero_tprune', 'token_transforming', 'class_attention', 'random', 'uniform')


class _Oracle(tokens.Method):
    """Decides nothing and moves nothing: the first `count` tokens are the ones that stay."""

    def reduce(self, x: torch.Tensor, state: tokens.State, seen: tokens.Seen) -> Tuple[torch.Tensor, tokens.State]:
        return x[:, :seen.count], state


class _OracleMid(_Oracle):
    place = 'mid'


tokens.register_method('oracle_end', _Oracle)
tokens.register_method('oracle_mid', _OracleMid)


def contenders(name: str, methods: List[str], targets: List[float], options: argparse.Namespace,
               ) -> Tuple[Dict[str, nn.Module], Dict[str, Dict[str, Any]]]:
    """Models by name (`baseline`, `tome 0.65`, `oracle of tome 0.65`, ...) and what is known of each before it runs."""
    base = timm.create_model(name).eval().to(options.device, getattr(torch, options.dtype)).requires_grad_(False)
    weights = list(base.parameters())

    def fresh() -> nn.Module:
        return copy.deepcopy(base, {id(weight): weight for weight in weights})  # all share one set of weights

    models: Dict[str, nn.Module] = {'baseline': base}
    full = tokens.macs(base).total
    known: Dict[str, Dict[str, Any]] = {'baseline': dict(macs=1.)}
    models['loop'] = tokens.apply(fresh(), 'tome', r=0)
    known['loop'] = dict(macs=1.)
    for target in targets:
        for method in methods:
            folded = dict(lora=0) if method == 'pyra' else {}  # as one runs it after training: merge_lora
            model = tokens.apply(fresh(), method, macs=target, **folded)
            count = tokens.macs(model)
            key = f'{method} {target}'
            models[key] = model
            known[key] = dict(macs=count.total / full, overhead=count.overhead / full, tokens_after=count.tokens_end)
            behind = dict(enumerate(count.tokens_end))
            oracle = f'oracle_{find_method(method).place}'
            models[f'oracle of {key}'] = tokens.apply(fresh(), oracle, tokens_after=behind)
            known[f'oracle of {key}'] = dict(macs=count.total / full)
    return models, known


def measure(models: Dict[str, nn.Module], batch: int, options: argparse.Namespace) -> Dict[str, List[float]]:
    """Seconds a forward of every model in every round; one more round comes first and is not counted."""
    size = models['baseline'].patch_embed.img_size
    x = torch.randn(batch, 3, *size, device=options.device, dtype=getattr(torch, options.dtype))
    with torch.inference_mode():
        return take_turns(
            {key: timer(lambda model=model: model(x), options.device, options.threads)
             for key, model in models.items()}, options.rounds)


def ratio(slow: List[float], fast: List[float]) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(ratios(slow, fast))


def report(seconds: Dict[str, List[float]], known: Dict[str, Dict[str, Any]], batch: int) -> List[Dict[str, Any]]:
    """One row a contender."""
    rows = []
    for key, values in seconds.items():
        row = dict(contender=key, batch=batch, milliseconds=1000 * statistics.median(values),
                   speedup=ratio(seconds['baseline'], values), **known[key])
        if f'oracle of {key}' in seconds:
            row['of_oracle'] = ratio(seconds[f'oracle of {key}'], values)
        method, _, target = key.partition(' ')
        if method == 'pyra' and f'tome {target}' in seconds:
            row['of_tome'] = ratio(seconds[f'tome {target}'], values)
        if method in GOALS:
            row['goal'] = GOALS[method]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='deit_small_patch16_224')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=tokens.methods())
    parser.add_argument('--targets', nargs='+', type=float, default=[0.65, 0.5], help='shares of the full MACs')
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'float16', 'bfloat16'])
    parser.add_argument('--json', action='store_true', help='print a JSON list')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models, known = contenders(options.model, options.methods, options.targets, options)
    rows = [row for batch in options.batch
            for row in report(measure(models, batch, options), known, batch)]
    if options.json:
        print(json.dumps(rows))
        return
    print(f'{options.model}, {options.device}, {options.dtype}, {options.threads} thread(s), {options.rounds} rounds')
    print(f'{"contender":34} {"batch":>5} {"ms":>9} {"MACs":>6} {"speed":>6} {"of oracle":>9} {"goal":>5}')
    for row in rows:
        share = row.get('of_tome', row.get('of_oracle'))
        print(f'{row["contender"]:34} {row["batch"]:5} {row["milliseconds"]:9.1f} {row["macs"]:6.3f} '
              f'{row["speedup"]:6.2f} {"" if share is None else f"{share:.3f}":>9} {row.get("goal", ""):>5}')


if __name__ == '__main__':
    main()

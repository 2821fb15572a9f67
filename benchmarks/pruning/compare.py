"""One trained ViT made smaller in several ways to the same multiply-accumulates, with the same budget to recover.

    python benchmarks/pruning/compare.py                       # Fashion-MNIST, 50 % and 30 %: 10 to 15 minutes, 1 core
    python benchmarks/pruning/compare.py --targets 0.5 --methods nvit uniform scratch --images 60000 --steps 5000

Every method takes the same number of optimizer steps on batches of the same images, with the same loss (labels and the
unpruned model's answers). Pruning by steps (nvit, magnitude, random) spends a part of them while it prunes; the others
spend all of them afterwards. All contenders end as the same class, `vishub.models.nvit.NViT`, so that their times
compare sizes and not code. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""
import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import torch
from torch import nn

from vishub.files import atomic_path
from vishub.models.nvit import NViT
from vishub.pruning import Schedule, as_nvit, count_macs, count_params, prune
from vishub.pruning.distillation import head_logits, label_loss, mean_logits, soft_kl
from vishub.pruning.structure import Key, Structure, nvit_args
from vishub.tasks.classification.data import ImageSet, load_data
from vishub.tasks.classification.metrics import wilson_interval
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.classification.training import describe_hardware, to_input

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURE, KL_WEIGHT = 20., 100.  # as `DistilledRecipe` has them

# name -> how it stands in table and plot
METHODS = {
    'nvit': 'NViT (Hessian-aware)',
    'magnitude': 'our engine, magnitude',
    'random': 'our engine, random',
    'torch_pruning': 'torch-pruning, group magnitude',
    'uniform': 'uniform width, weights inherited',
    'scratch': 'uniform width, from scratch',
}


class Images:
    """Normalised images in memory; iterating gives shuffled batches, another order at every pass.

    Args:
        images: (N, C, H, W) float32.
        labels: (N,).
        batch_size: Images a batch; a last one that is smaller is left out.
        seed: Decides all orders.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int) -> None:
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.passes = 0

    def orders(self) -> Iterator[torch.Tensor]:
        """Indices of one batch after the other, of one pass."""
        order = np.random.default_rng([self.seed, self.passes]).permutation(len(self.labels))
        self.passes += 1
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            yield torch.from_numpy(order[start:start + self.batch_size])

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for chosen in self.orders():
            yield self.images[chosen], self.labels[chosen]


def tensors(images: ImageSet, count: int, pipe: ClassificationPipeline) -> Tuple[torch.Tensor, torch.Tensor]:
    """`count` evenly spread images as the model's input, and their labels."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    pixels = torch.from_numpy(np.stack([images[i] for i in chosen])).permute(0, 3, 1, 2)  # N, H, W, C -> N, C, H, W
    normalise = pipe.transform.transforms[-1]
    x = to_input(pixels, pipe.input_size[-1], normalise.mean.tolist(), normalise.std.tolist())
    return x.contiguous(), torch.from_numpy(images.labels[chosen])


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    return torch.cat([model.eval()(part) for part in images.split(batch_size)])


def fine_tune(model: NViT, images: Images, answers: torch.Tensor, steps: int, lr: float) -> None:
    """Train in place: AdamW, 5 % warm-up, cosine to zero."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warmup = max(1, steps // 20)
    done = 0
    while done < steps:
        for chosen in images.orders():
            rise, fall = (done + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.param_groups[0]['lr'] = lr * min(rise, fall)
            logits = head_logits(model, images.images[chosen])
            loss = label_loss(logits, images.labels[chosen])
            loss = loss + KL_WEIGHT * soft_kl(mean_logits(logits), answers[chosen], TEMPERATURE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            done += 1
            if done == steps:
                break
    model.eval()


# -- the ways to a smaller model: each gives it and the optimizer steps that it took --------------------------------

Made = Tuple[NViT, int]


def by_engine(saliency: Any) -> Callable[..., Made]:
    def make(original: NViT, images: Images, target: float, options: argparse.Namespace) -> Made:
        schedule = Schedule(options.interval, options.groups_per_step, max_epochs=10 ** 6)
        pruned, report = prune(
            original, images, target_flops=target, schedule=schedule, lr=options.prune_lr, saliency=saliency,
            latency_weight=options.latency_weight,
            eval_loader=[(images.images[:2], images.labels[:2])])  # measured here, on the test images
        return pruned, report.batches
    return make


def magnitude(structure: Structure) -> Dict[Key, torch.Tensor]:
    """Squared weights of each unit, relative to the mean over its (kind, block), for the kinds differ in scale."""
    for parameter in structure.model.parameters():
        parameter.grad = parameter.detach().clone()  # weight * "gradient" is then the square of the weight
    return {key: value.sqrt() / value.sqrt().mean().clamp_min(1e-12) for key, value in structure.saliency().items()}


class RandomSaliency:
    """A value for every unit, drawn once."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.values: Dict[Key, torch.Tensor] = {}

    def __call__(self, structure: Structure) -> Dict[Key, torch.Tensor]:
        for key, alive in structure.alive.items():
            if key not in self.values:
                self.values[key] = torch.rand(len(alive), generator=self.generator).to(alive.device)
        return self.values


def uniform_sizes(original: NViT, target: float) -> Dict[str, Any]:
    """The widest model within the target whose embedding, heads' sizes and MLPs are all cut by the same share."""
    full, whole = original.dims, count_macs(original)
    steps = full['QK'][0]

    def sizes(kept: int) -> Dict[str, Any]:
        share = kept / steps
        return dict(
            EMB=max(1, round(full['EMB'] * share)), head=list(full['head']),
            **{kind: [max(1, round(size * share)) for size in full[kind]] for kind in ('QK', 'V', 'MLP')})

    fitting = [kept for kept in range(1, steps) if count_macs(original, sizes(kept)) <= target * whole]
    if not fitting:
        raise SystemExit(f'{target} of the multiply-accumulates is below what uniform scaling reaches')
    return sizes(fitting[-1])


def uniform(original: NViT, images: Images, target: float, options: argparse.Namespace) -> Made:
    """Evenly spread units keep their weights."""
    structure = Structure(copy.deepcopy(original))
    sizes = uniform_sizes(original, target)
    for (kind, block), alive in structure.alive.items():
        size = sizes['EMB'] if kind == 'EMB' else sizes[kind][block]
        alive[:] = False
        alive[torch.linspace(0, len(alive) - 1, size).round().long()] = True
    return structure.dense(), 0


def scratch(original: NViT, images: Images, target: float, options: argparse.Namespace) -> Made:
    return NViT(**dict(nvit_args(original), dims=uniform_sizes(original, target))), 0


def torch_pruning(original: NViT, images: Images, target: float, options: argparse.Namespace) -> Made:
    """The library's group magnitude (DepGraph, arXiv 2301.12900): one share for every layer, the largest that fits."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        raise SystemExit('torch-pruning is not installed: pip install torch-pruning, or leave it out') from error
    source = ClassificationPipeline(options.model, 'cpu').model
    example, whole = images.images[:1], count_macs(original)

    def pruned(ratio: float) -> NViT:
        model = copy.deepcopy(source)
        heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
        for block in model.blocks:
            block.attn.fused_attn = False  # the tracer follows plain products
        pruner = tp.pruner.BasePruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=ratio,
            ignored_layers=[model.head], num_heads=heads, prune_head_dims=True)
        pruner.step()
        model.embed_dim = model.patch_embed.proj.out_channels
        for block in model.blocks:
            block.attn.attn_dim = block.attn.proj.in_features
            block.attn.head_dim = block.attn.attn_dim // block.attn.num_heads
        smaller = as_nvit(model)
        torch.testing.assert_close(smaller(example), model(example), rtol=0, atol=1e-4)
        return smaller

    low, high = 0., 0.95  # of channels; the multiply-accumulates fall as it rises
    best = None
    for _ in range(9):
        middle = (low + high) / 2
        candidate = pruned(middle)
        if count_macs(candidate) <= target * whole:
            best, high = candidate, middle
        else:
            low = middle
    if best is None:
        raise SystemExit(f'torch-pruning does not reach {target} of the multiply-accumulates')
    return best, 0


def maker(method: str, seed: int) -> Callable[..., Made]:
    return {
        'nvit': by_engine(None), 'magnitude': by_engine(magnitude), 'random': by_engine(RandomSaliency(seed)),
        'torch_pruning': torch_pruning, 'uniform': uniform, 'scratch': scratch,
    }[method]


# -- measuring and telling -------------------------------------------------------------------------------------------

def measure_times(models: Dict[str, nn.Module], example: torch.Tensor, rounds: int) -> Dict[str, float]:
    """Median milliseconds of CPU time of a forward pass, all models in turns, each going first equally often."""
    seconds: Dict[str, List[float]] = {key: [] for key in models}
    order = list(models)
    with torch.inference_mode():
        for number in range(rounds + 2):
            start = number % len(order)
            for key in order[start:] + order[:start]:
                begin = time.process_time()
                models[key](example)
                if number >= 2:
                    seconds[key].append(time.process_time() - begin)
    return {key: 1000 * statistics.median(values) for key, values in seconds.items()}


def row_of(model: NViT, original: NViT, logits: torch.Tensor, labels: torch.Tensor) -> Dict[str, Any]:
    correct = int((logits.argmax(dim=1) == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    return dict(
        top1=round(100 * correct / len(labels), 2), top1_ci95=[round(100 * low, 2), round(100 * high, 2)],
        macs=count_macs(model), macs_share=round(count_macs(model) / count_macs(original), 4),
        params=count_params(model), dims=model.dims)


def table(rows: List[Dict[str, Any]], batches: List[int]) -> str:
    """Markdown."""
    speed = [f'ms, batch {batch}' for batch in batches]
    header = ['method', 'target', 'MACs', 'parameters', *speed, 'speed-up', 'top-1 pruned', 'top-1', '95 % interval',
              'steps pruning + tuning', 'seconds']
    lines = ['| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|']
    for row in rows:
        low, high = row['top1_ci95']
        cells = [
            METHODS.get(row['method'], row['method']), '' if row['target'] is None else f'{row["target"]:.2f}',
            f'{row["macs"] / 1e6:.1f} M ({row["macs_share"]:.3f})', f'{row["params"]:,}',
            *(f'{row["milliseconds"][str(batch)]:.2f}' for batch in batches), f'{row["speedup"]:.2f}',
            '' if row['top1_before_tuning'] is None else f'{row["top1_before_tuning"]:.2f}', f'{row["top1"]:.2f}',
            f'{low:.2f} to {high:.2f}', f'{row["pruning_steps"]} + {row["tuning_steps"]}', f'{row["wall_s"]:.0f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def plot(rows: List[Dict[str, Any]], batch: int, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axis = figure.subplots()
    for method in dict.fromkeys(row['method'] for row in rows):
        own = sorted((row for row in rows if row['method'] == method), key=lambda row: row['macs'])
        x, y = [row['milliseconds'][str(batch)] for row in own], [row['top1'] for row in own]
        error = np.abs(np.array([row['top1_ci95'] for row in own]).T - np.array(y))
        style = dict(color='black', marker='*', markersize=12) if method == 'unpruned' else dict(marker='o')
        axis.errorbar(x, y, yerr=error, capsize=3, label=METHODS.get(method, method), **style)
    axis.set_xlabel(f'CPU milliseconds a batch of {batch}')
    axis.set_ylabel('top-1 (%), with its 95 % interval')
    axis.set_title(title, fontsize='medium')
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vit_mini_patch2_28.fashion_mnist', help='trained ViT: name or local-dir:')
    parser.add_argument('--data', default='/usr/share/datasets/fashion-mnist')
    parser.add_argument('--targets', nargs='+', type=float, default=[0.5, 0.3], help='shares of the MACs')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=METHODS)
    parser.add_argument('--images', type=int, default=9600, help='training images')
    parser.add_argument('--test-images', type=int, default=2000)
    parser.add_argument('--steps', type=int, default=150, help='optimizer steps of every method')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--interval', type=int, default=2, help='batches between two pruning steps')
    parser.add_argument('--groups-per-step', type=int, default=12)
    parser.add_argument('--latency-weight', type=float, default=2e-5, help='reward of a saved cost, see prune')
    parser.add_argument('--prune-lr', type=float, default=1e-4)
    parser.add_argument('--lr', type=float, default=5e-4)
    parser.add_argument('--latency-batch', nargs='+', type=int, default=[1, 16])
    parser.add_argument('--rounds', type=int, default=30, help='timed forward passes')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks' / 'results' / 'pruning')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = ClassificationPipeline(options.model, 'cpu')
    original = as_nvit(pipe.model).requires_grad_(False).eval()
    data = load_data(options.data, pipe.input_size[0])
    if list(pipe.label_names or data.classes) != list(data.classes):
        raise SystemExit('the model has another order of classes than the data')
    x, y = tensors(data.train, options.images, pipe)
    test_x, test_y = tensors(data.test, options.test_images, pipe)
    answers = logits_of(original, x)
    models: Dict[str, nn.Module] = {'unpruned': original}
    nothing = dict(target=None, top1_before_tuning=None, pruning_steps=0, tuning_steps=0, wall_s=0.)
    rows = [dict(method='unpruned', **nothing, **row_of(original, original, logits_of(original, test_x), test_y))]
    for target in options.targets:
        for method in options.methods:
            torch.manual_seed(options.seed)
            start = time.perf_counter()
            images = Images(x, y, options.batch, options.seed)
            model, used = maker(method, options.seed)(original, images, target, options)
            if used > options.steps:
                raise SystemExit(f'{method} took {used} steps to prune; give more --steps or --groups-per-step')
            before = row_of(model, original, logits_of(model, test_x), test_y)['top1']
            fine_tune(model, images, answers, options.steps - used, options.lr)
            wall = time.perf_counter() - start
            rows.append(dict(
                method=method, target=target, top1_before_tuning=before, pruning_steps=used,
                tuning_steps=options.steps - used, wall_s=round(wall, 1),
                **row_of(model, original, logits_of(model, test_x), test_y)))
            models[f'{method} {target}'] = model
            top1 = rows[-1]['top1']
            print(f'{method} at {target}: {before:.2f} % pruned, {top1:.2f} % tuned, {wall:.0f} s', flush=True)
    for batch in options.latency_batch:
        times = measure_times(models, test_x[:batch], options.rounds)
        for row, milliseconds in zip(rows, times.values()):
            row.setdefault('milliseconds', {})[str(batch)] = round(milliseconds, 3)
    largest = max(options.latency_batch)
    for row in rows:
        row['speedup'] = round(rows[0]['milliseconds'][str(largest)] / row['milliseconds'][str(largest)], 3)

    name = Path(options.model.removeprefix('local-dir:')).name
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    conditions = dict(
        model=name, data=data.name, images=len(y), test_images=len(test_y),
        hardware=describe_hardware(torch.device('cpu')), options={**setting, 'model': name, 'output': None})
    summary = (
        f'{name} on {data.name}: {options.steps} steps of {options.batch} on {len(y):,} images for every method, '
        f'{len(test_y):,} test images; {conditions["hardware"]}.')
    text = table(rows, options.latency_batch)
    for suffix, content in (
            ('.json', json.dumps(dict(conditions=conditions, rows=rows), indent=2) + '\n'),
            ('.md', f'{summary}\n\n{text}')):
        with atomic_path(options.output.with_name(options.output.name + suffix)) as path:
            path.write_text(content, encoding='utf-8')
    plot(rows, largest, options.output.with_name(options.output.name + '.png'), f'{name}, {options.steps} steps each')
    print(f'\n{summary}\n\n{text}')


if __name__ == '__main__':
    main()

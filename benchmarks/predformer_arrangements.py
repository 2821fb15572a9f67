"""PredFormer's nine arrangements at the same number of blocks, and a SimVP-like peer, trained on Moving MNIST alike.

    python benchmarks/predformer_arrangements.py --data path/to/mnist --output runs/arrangements --epochs 8

Same data, order, recipe and steps for all: the tiny form with 12 blocks (layers of one, two, three and four units
divide that), one cycle of the learning rate as in the card of predformer_tiny. The peer has about as many parameters as
predformer_tiny itself, which has 6 blocks; `--blocks 6` compares at that size (quads then have 4). Each run resumes
from its own folder, so the same command goes on where it was stopped, and a finished run is not repeated. The table, in
`--output`, is written anew after every run and says which are missing. `--card weights/predformer_tiny.moving_mnist`
then puts the finished ones, with their epochs, beside the trained model into its card.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from simvp import PEERS, SimvpLike
from torch import nn

from vishub.models.predformer import ARRANGEMENTS
from vishub.tasks.video_prediction.metrics import evaluate, update_card
from vishub.tasks.video_prediction.training import VideoPredictionRecipe
from vishub.training import TrainConfig, train
from vishub.training.loop import TrainResult

PEER = 'simvp_like'


class MeasuredRecipe(VideoPredictionRecipe):
    """Writes figures, not weights, when it is done."""

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        report = evaluate([model], self.data, device=str(next(model.parameters()).device))
        file = Path(config.output) / 'evaluation.json'
        file.write_text(json.dumps({**report, 'wall_s': result.wall_s, 'steps': result.step}, indent=2) + '\n', 'utf-8')
        return file


class PeerRecipe(MeasuredRecipe):
    """The same with the convolutional peer."""

    def create(self, arguments: Mapping[str, Any]) -> SimvpLike:
        return SimvpLike(**{**PEERS['tiny'], **arguments})

    def describe(self) -> Dict[str, Any]:
        return {'model': PEER, 'model_args': PEERS['tiny'], 'data': self.data.name}


def recipe(name: str, options: argparse.Namespace) -> MeasuredRecipe:
    made = dict(num_digits=options.num_digits, num_clips=options.num_clips, seed=options.seed)
    if name == PEER:
        return PeerRecipe(PEER, options.data, **made)
    arguments = {'arrangement': name, 'n_layers': options.blocks // len(ARRANGEMENTS[name].axes)}
    return MeasuredRecipe('predformer_tiny', options.data, model_args=arguments, **made)


def table(output: Path, names: List[str]) -> str:
    """The figures of the runs that are finished, as Markdown, best first."""
    rows, missing = [], []
    for name in names:
        file = output / name / 'evaluation.json'
        if file.is_file():
            rows.append((name, json.loads(file.read_text(encoding='utf-8'))))
        else:
            missing.append(name)
    rows.sort(key=lambda row: row[1]['metrics']['mse'])
    lines = ['| model | parameters | steps | minutes | MSE | MAE | SSIM | PSNR |', '|---|' + '---:|' * 7]
    for name, report in rows:
        figures = report['metrics']
        lines.append(
            f'| {name} | {report["num_params"]:,} | {report["steps"]:,} | {report["wall_s"] / 60:.0f} '
            f'| {figures["mse"]:.2f} | {figures["mae"]:.1f} | {figures["ssim"]:.3f} | {figures["psnr"]:.2f} |')
    if rows:
        lines += ['', f'{rows[0][1]["data"]}; {rows[0][1]["split"]}, {rows[0][1]["num_test"]} clips. MSE and MAE: '
                  'sums over a frame. SSIM with data range 2, as in the field.']
    if missing:
        lines += ['', f'Not run yet: {", ".join(missing)}.']
    return '\n'.join(lines) + '\n'


def into_card(folder: Path, options: argparse.Namespace) -> None:
    """Measure the model of a weights folder again, and add the finished runs to the peers in its card."""
    report = evaluate([str(folder)], options.data, device=None if options.device == 'auto' else options.device)
    for name in options.models:
        file = options.output / name / 'evaluation.json'
        if file.is_file():
            run = json.loads(file.read_text(encoding='utf-8'))
            report['peers'].append({
                'name': name if name == PEER else f'predformer_{name}, {options.blocks} blocks', 'num_params':
                run['num_params'], 'metrics': run['metrics'], 'horizon': run['report']['horizon'],
                'epochs': options.epochs, 'wall_s': run['wall_s']})
    update_card(folder, report)


def main(words: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='folder of MNIST, see vishub train video_prediction')
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--models', nargs='+', default=[*ARRANGEMENTS, PEER], choices=[*ARRANGEMENTS, PEER])
    parser.add_argument('--blocks', type=int, default=12, help='gated transformer blocks of each arrangement')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--num-clips', type=int, default=10_000, help='clips an epoch; 10,000 are 625 steps')
    parser.add_argument('--lr', type=float, default=3e-3, help='the peak')
    parser.add_argument('--num-digits', type=int, default=2)
    parser.add_argument('--amp', default='no', help='no or bf16')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--time-limit', type=float, default=0., help='minutes a run; the same command goes on')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--card', type=Path, help='folder of trained weights of predformer_tiny')
    options = parser.parse_args(words)
    for name in options.models:
        if (options.output / name / 'evaluation.json').is_file():
            continue
        train(recipe(name, options), TrainConfig(
            output=options.output / name, resolution=((32, options.epochs),), batch_size=16, lr=options.lr,
            min_lr=options.lr / 25e4, warmup=0.3, weight_decay=0.01, ema_decay=0., schedule='onecycle',
            amp=options.amp, compile=options.compile, seed=options.seed, device=options.device,
            time_limit=options.time_limit, checkpoint_every=500))
        (options.output / 'arrangements.md').write_text(table(options.output, options.models), encoding='utf-8')
    print(table(options.output, options.models), end='')
    if options.card is not None:
        into_card(options.card, options)


if __name__ == '__main__':
    main()

"""Speed of PredFormer's nine arrangements beside a SimVP-like convolutional peer of the same number of parameters.

    python benchmarks/video.py                                     # TaxiBJ's sizes, batch 1 and 16, one CPU thread
    python benchmarks/video.py --data mmnist --batch-sizes 1 --rounds 3
    python benchmarks/video.py --data taxibj mmnist --device cuda --rounds 50

All contenders take turns; a row has the median over the rounds, and the peer's time over the model's, paired round by
round. As in the paper a clip counts once, not its frames. Weights are random, which costs the same as trained ones.
"""
import argparse
import statistics
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch
from page import add_options, begin, write
from simvp import PEERS, SimvpLike
from timing import ratios, take_turns, timer

import vishub  # noqa: F401  registers the models
from vishub.models.cost import module_macs
from vishub.models.predformer import ARRANGEMENTS

PEER = 'simvp_like'


def build(data: str) -> Dict[str, torch.nn.Module]:
    """The peer and the nine arrangements in the sizes of a data set (`tiny`, `taxibj`, `mmnist`), by name."""
    models: Dict[str, torch.nn.Module] = {PEER: SimvpLike(**PEERS[data])}
    for arrangement in ARRANGEMENTS:
        if data == 'tiny':
            models[f'predformer_tiny {arrangement}'] = timm.create_model(
                'predformer_tiny', arrangement=arrangement, n_layers=layers(arrangement, 6))
        else:
            name = f'predformer_{arrangement}_{data}'
            models[name] = timm.create_model(name)
    return models


def layers(arrangement: str, blocks: int) -> int:
    """`n_layers` with which an arrangement has so many blocks in all, or as many fewer as do not divide."""
    return blocks // len(ARRANGEMENTS[arrangement].axes)


def measure(data: str, batch_sizes: Sequence[int], rounds: int, device: str, threads: int) -> List[Dict[str, Any]]:
    """A row for each model and batch size."""
    models = {name: model.to(device).eval() for name, model in build(data).items()}
    settings = PEERS[data]
    rows = []
    for batch_size in batch_sizes:
        clips = torch.rand(
            batch_size, settings['num_frames'], settings['in_chans'], *settings['img_size'], device=device)

        def run(model: torch.nn.Module, clips: torch.Tensor = clips) -> Callable[[], object]:
            def call() -> torch.Tensor:
                with torch.inference_mode():
                    return model(clips)
            return call

        seconds = take_turns({name: timer(run(model), device, threads) for name, model in models.items()}, rounds)
        for name, model in models.items():
            faster = ratios(seconds[PEER], seconds[name])
            rows.append({
                'data': data, 'model': name, 'batch_size': batch_size,
                'num_params': sum(parameter.numel() for parameter in model.parameters()),
                'macs': module_macs(model, clips[:1]),
                'clips_per_second': batch_size / statistics.median(seconds[name]),
                'to_peer': statistics.median(faster), 'to_peer_range': [min(faster), max(faster)],
            })
    return rows


def report(rows: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f'# Video prediction, {setting["device"]}',
        '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.',
        '',
        'Clips a second (a clip counts once, whatever its frames), medians over the rounds, in which all took turns. '
        '*To the peer*: its time over the model\'s, above 1 is faster than the SimVP-like peer (benchmarks/simvp.py); '
        'median and range over the rounds. GMACs are those of one clip. Made by `python benchmarks/video.py`.',
    ]
    for data in dict.fromkeys(row['data'] for row in rows):
        header = '| model | parameters | GMACs | batch | clips/s | to the peer |'
        lines += ['', f'## {data}', '', header, '|---|' + '---:|' * 5]
        for row in rows:
            if row['data'] == data:
                low, high = row['to_peer_range']
                lines.append(
                    f'| {row["model"]} | {row["num_params"] / 1e6:.2f} M | {row["macs"] / 1e9:.2f} '
                    f'| {row["batch_size"]} | {row["clips_per_second"]:.2f} '
                    f'| {row["to_peer"]:.2f} ({low:.2f} to {high:.2f}) |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', nargs='+', default=['taxibj'], choices=list(PEERS))
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 16], metavar='N')
    add_options(parser)
    options = parser.parse_args()
    setting = begin(options)
    rows: List[Dict[str, Any]] = []
    for data in options.data:
        rows += measure(data, options.batch_sizes, options.rounds, options.device, options.threads)
    told = setting()
    write(options, 'video_prediction', report(rows, told), {**told, 'rows': rows})


if __name__ == '__main__':
    main()

"""Speed of MambaClinix beside a plain U-Net of as many multiply-accumulates, and of the selective scan it stands on.

    python benchmarks/medical.py                             # 64 cubed, one CPU thread
    python benchmarks/medical.py --sides 64 96 --rounds 3
    python benchmarks/medical.py --sides 64 96 128 160 --device cuda --rounds 20

All contenders take turns; a row has the median over the rounds, and ratios paired round by round. Memory is what
tensors take at most in a pass, above what is held before it. Weights are random, which costs the same as trained ones.
"""
import argparse
import functools
import statistics
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch
from memory import peak_bytes
from page import add_options, begin, write
from timing import ratios, take_turns, timer
from unet3d import FEATURES, PlainUNet

import vishub  # noqa: F401  registers the models
from vishub.models.cost import module_macs
from vishub.models.layers.selective_scan import selective_scan

NAME, PEER = 'mambaclinix_tiny', 'plain U-Net'


def build() -> Dict[str, torch.nn.Module]:
    """Both networks, by name."""
    return {PEER: PlainUNet(FEATURES[NAME], num_classes=3), NAME: timm.create_model(NAME)}


def measure_networks(sides: Sequence[int], rounds: int, device: str, threads: int) -> List[Dict[str, Any]]:
    """A row for each network and side of a cube."""
    models = {name: model.to(device).eval() for name, model in build().items()}
    rows = []
    for side in sides:
        x = torch.randn(1, 1, side, side, side, device=device)

        def run(model: torch.nn.Module, x: torch.Tensor = x) -> Callable[[], object]:
            def call() -> torch.Tensor:
                with torch.inference_mode():
                    return model(x)
            return call

        seconds = take_turns({name: timer(run(model), device, threads) for name, model in models.items()}, rounds)
        for name, model in models.items():
            share = ratios(seconds[name], seconds[PEER])
            rows.append({
                'model': name, 'side': side, 'num_params': sum(p.numel() for p in model.parameters()),
                'macs': module_macs(model, x), 'seconds': statistics.median(seconds[name]),
                'to_peer': statistics.median(share), 'to_peer_range': [min(share), max(share)],
                'peak_bytes': peak_bytes(run(model), device),
            })
    return rows


def sequential_scan(
        u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The recurrence position by position, as the definition has it: u, delta (B, E, L), A (E, N), B, C (B, N, L)."""
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    out = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = (step * A).exp() * h + step * u[:, :, t, None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(out, -1)


def measure_scan(lengths: Sequence[int], rounds: int, device: str, threads: int) -> List[Dict[str, Any]]:
    """A row for each length: 128 channels of 16 states, the forward pass and the largest difference."""
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        u, delta = torch.randn(1, 128, length, device=device), torch.rand(1, 128, length, device=device)
        A, B, C = -torch.rand(128, 16, device=device), *torch.randn(2, 1, 16, length, device=device)
        arguments = u, delta, A, B, C
        with torch.inference_mode():
            difference = (sequential_scan(*arguments) - selective_scan(*arguments)).abs().max()
            calls = {
                'sequential': functools.partial(sequential_scan, *arguments),
                'ours': functools.partial(selective_scan, *arguments)}
            if device == 'cpu':
                calls['cpp'] = functools.partial(selective_scan, *arguments, backend='cpp')
            seconds = take_turns({name: timer(call, device, threads) for name, call in calls.items()}, rounds)
        faster = ratios(seconds['sequential'], seconds['ours'])
        rows.append({
            'length': length, 'sequential': statistics.median(seconds['sequential']),
            'ours': statistics.median(seconds['ours']), 'faster': statistics.median(faster),
            'faster_range': [min(faster), max(faster)], 'difference': float(difference)})
        if 'cpp' in seconds:
            rows[-1].update(cpp=statistics.median(seconds['cpp']),
                            cpp_faster=statistics.median(ratios(seconds['ours'], seconds['cpp'])))
    return rows


def report(networks: Sequence[Dict[str, Any]], scans: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f'# Volume segmentation, {setting["device"]}', '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.', '',
        'One volume a pass, medians over the rounds, in which all took turns; *to the peer* is the time over the plain '
        "U-Net's (benchmarks/unet3d.py), below 1 is faster: median and range over the rounds. Memory is the peak of a "
        'pass above what was held before. Made by `python benchmarks/medical.py`.', '',
        '| model | parameters | side | GMACs | seconds | to the peer | memory |', '|---|' + '---:|' * 6]
    for row in networks:
        low, high = row['to_peer_range']
        lines.append(
            f'| {row["model"]} | {row["num_params"] / 1e6:.2f} M | {row["side"]} | {row["macs"] / 1e9:.2f} '
            f'| {row["seconds"]:.3f} | {row["to_peer"]:.2f} ({low:.2f} to {high:.2f}) '
            f'| {row["peak_bytes"] / 2 ** 20:,.0f} MiB |')
    lines += ['', '## Selective scan', '', '128 channels of 16 states, forward.', '',
              '| length | position by position | ours | faster | largest difference | in C++, faster than ours |',
              '|---:|' + '---:|' * 5]
    for row in scans:
        low, high = row['faster_range']
        lines.append(
            f'| {row["length"]:,} | {row["sequential"]:.4f} s | {row["ours"]:.4f} s '
            f'| {row["faster"]:.1f} ({low:.1f} to {high:.1f}) | {row["difference"]:.1e} '
            + (f'| {row["cpp"]:.4f} s, {row["cpp_faster"]:.1f} |' if 'cpp' in row else '| – |'))
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sides', nargs='+', type=int, default=[64], metavar='N', help='sides of the cubes, in voxels')
    parser.add_argument('--lengths', nargs='+', type=int, default=[512, 4096], metavar='L')
    add_options(parser)
    options = parser.parse_args()
    setting = begin(options)
    networks = measure_networks(options.sides, options.rounds, options.device, options.threads)
    scans = measure_scan(options.lengths, options.rounds, options.device, options.threads)
    told = setting()
    write(options, 'volume_segmentation', report(networks, scans, told), {**told, 'networks': networks, 'scans': scans})


if __name__ == '__main__':
    main()

"""What deblurring costs: seconds and memory a megapixel, beside two peers.

* the same model with its selective scans position by position (chunks of one sequence), and in C++;
* NAFNet-like convolution of the same MACs: a U-Net of `NafBlock`s as wide as that takes.

Contenders take turns (timing.py). Memory is the peak of tensors that PyTorch's profiler saw, on the CPU, or of the
device's allocator on CUDA. Results: benchmarks/results/deblur.{json,md}.
"""
import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Callable, Dict
from unittest import mock

import timm
import torch
from memory import peak_bytes
from timing import clock_name, take_turns, timer
from torch import nn

import vishub  # noqa: F401  registers the models
from vishub.files import atomic_path
from vishub.models.cost import module_macs
from vishub.models.deeprftv2 import NafBlock, downsample
from vishub.models.layers import selective_scan
from vishub.tasks.classification.training import describe_hardware

RESULTS = Path(__file__).parent / 'results'


class NafUnet(nn.Module):
    """U-Net of NAF blocks on three levels, as NAFNet: the peer of the same MACs."""

    def __init__(self, dim: int, depths: tuple = (2, 4, 8)) -> None:
        super().__init__()
        dims = [dim, 2 * dim, 4 * dim]
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.encoder = nn.ModuleList([
            nn.Sequential(*[NafBlock(width) for _ in range(depth)]) for width, depth in zip(dims, depths)])
        self.down = nn.ModuleList([downsample(dims[i], dims[i + 1]) for i in range(2)])
        self.up = nn.ModuleList([
            nn.Sequential(nn.Conv2d(dims[i + 1], 4 * dims[i], 1, bias=False), nn.PixelShuffle(2)) for i in range(2)])
        self.decoder = nn.ModuleList([
            nn.Sequential(*[NafBlock(width) for _ in range(depth)]) for width, depth in zip(dims[:2], depths[:2])])
        self.head = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.encoder[0](self.stem(image.contiguous(memory_format=torch.channels_last)))
        middle = self.encoder[1](self.down[0](x))
        middle = self.decoder[1](middle + self.up[1](self.encoder[2](self.down[1](middle))))
        return self.head(self.decoder[0](x + self.up[0](middle))) + image


def peer_of(macs: int, size: int) -> NafUnet:
    """The width whose MACs on a picture of that size are nearest to `macs`."""
    def cost(dim: int) -> int:
        with torch.device('meta'):
            return module_macs(NafUnet(dim), torch.empty(1, 3, size, size))
    low = 4
    while cost(2 * low) < macs:
        low *= 2
    return NafUnet(min(range(low, 2 * low + 1), key=lambda dim: abs(cost(dim) - macs)))


def sequential(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with every scan going through its whole sequence position by position."""
    def run() -> object:
        with mock.patch.object(selective_scan, 'chunk_length', lambda length: length):
            return call()
    return run


def in_cpp(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with every scan in C++."""
    def run() -> object:
        with mock.patch.dict(os.environ, VISHUB_SCAN='cpp'):
            return call()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', nargs='+', default=['deeprftv2_tiny', 'deeprftv2_s'])
    parser.add_argument('--size', type=int, default=128, help='side of the picture in pixels, a multiple of 8')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=RESULTS / 'deblur.json')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    megapixels, rows = args.size ** 2 / 1e6, []
    x = torch.rand(1, 3, args.size, args.size, device=args.device)
    for name in args.model:
        model = timm.create_model(name).eval().to(args.device)
        macs = module_macs(model, x)
        peer = peer_of(macs, args.size).eval().to(args.device)
        calls: Dict[str, Callable[[], object]] = {name: lambda model=model: model(x)}
        if args.device == 'cpu':  # elsewhere the scan has kernels of its own
            calls[f'{name}, scan position by position'] = sequential(calls[name])
            calls[f'{name}, scan in C++'] = in_cpp(calls[name])
        calls[f'NAF U-Net, width {peer.stem.out_channels}'] = lambda peer=peer: peer(x)
        with torch.inference_mode():
            seconds = take_turns(
                {key: timer(call, args.device, args.threads) for key, call in calls.items()}, args.rounds)
            for key, call in calls.items():
                module = peer if 'NAF' in key else model
                rows.append({
                    'name': key, 'parameters': sum(p.numel() for p in module.parameters()),
                    'gmacs_a_megapixel': round(module_macs(module, x) / 1e9 / megapixels, 2),
                    'seconds_a_megapixel': round(statistics.median(seconds[key]) / megapixels, 3),
                    'megabytes_a_megapixel': round(peak_bytes(call, args.device) / 1e6 / megapixels, 1)})
                print(rows[-1], flush=True)
    report = {
        'size': args.size, 'rounds': args.rounds, 'clock': clock_name(args.device, args.threads),
        'hardware': describe_hardware(torch.device(args.device)), 'rows': rows}
    args.output.parent.mkdir(exist_ok=True)
    with atomic_path(args.output) as path:
        path.write_text(json.dumps(report, indent=2) + '\n')
    with atomic_path(args.output.with_suffix('.md')) as path:
        path.write_text(table(report))
    print(f'{args.output} and {args.output.with_suffix(".md").name}')


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f'Pictures of {report["size"]} x {report["size"]}, one at a time; {report["clock"]}, median of '
        f'{report["rounds"]} rounds, contenders in turn; {report["hardware"]}. '
        'Made by `python benchmarks/deblur.py`.', '',
        '| Model | Parameters | GMACs / MP | Seconds / MP | MB / MP |', '| --- | ---: | ---: | ---: | ---: |']
    for row in report['rows']:
        lines.append(
            f'| {row["name"]} | {row["parameters"]:,} | {row["gmacs_a_megapixel"]:,.0f} | '
            f'{row["seconds_a_megapixel"]:.1f} | {row["megabytes_a_megapixel"]:,.0f} |')
    assert all(math.isfinite(row['seconds_a_megapixel']) for row in report['rows'])
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()

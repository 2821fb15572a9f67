"""Memory and time of segmenting a whole scan, from the NIfTI file to the label volume: 512 x 512 x 600 voxels.

    python benchmarks/volume_memory.py                       # 512 x 512 x 600, about a minute on one CPU thread
    python benchmarks/volume_memory.py --shape 128 128 150

The network is a stand-in that compares a voxel with a threshold, with three classes and patches of 128 cubed, because
what is measured is everything around the network: reading, resampling, the sliding window's sums, the labels. The
memory of a real network is that of one patch (benchmarks/medical.py) on top. Memory is the process's resident size,
looked at every 20 ms, above what it was before the call.
"""
import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, Sequence

import nibabel
import numpy as np
import torch
from torch import nn

from vishub.files import atomic_path
from vishub.tasks.volume_segmentation.pipeline import VolumeSegmentationPipeline

RESULTS = Path(__file__).resolve().parent / 'results'


class Threshold(nn.Module):
    """Background, organ (brighter than 1 after normalisation), and a class that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.num_classes, self.num_features = (128, 128, 128), 1, 3, 3
        self.scale = nn.Parameter(torch.tensor(10.))
        self.pretrained_cfg = {'architecture': 'threshold', 'label_names': ('background', 'organ', 'nothing')}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level = self.scale * (x - 1)
        return torch.cat([-level, level, -level.abs() - 1], dim=1)


class PeakWatch:
    """`with PeakWatch() as watch: ...`: `watch.growth`, bytes of resident memory above those at the start."""

    def __enter__(self) -> 'PeakWatch':
        self._start = self._peak = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, self._resident())

    @staticmethod
    def _resident() -> int:
        for line in Path('/proc/self/status').read_text(encoding='ascii').splitlines():
            if line.startswith('VmRSS:'):
                return 1024 * int(line.split()[1])
        raise SystemExit('the memory of a process is read from /proc/self/status, which is Linux only')

    @property
    def growth(self) -> int:
        return self._peak - self._start


def measure(shape: Sequence[int]) -> Dict[str, Any]:
    """Segment a made scan of that shape, a bright box in darkness."""
    values = np.zeros(shape, np.int16, order='F')
    inside = tuple(slice(extent // 5, 2 * extent // 5) for extent in shape)
    values[inside] = 1000
    pipe = VolumeSegmentationPipeline(Threshold())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'scan.nii'
        nibabel.save(nibabel.Nifti1Image(values, np.diag([0.8, 0.8, 1., 1.])), file)
        expected = 0.64e-3 * int((values > 0).sum())
        del values
        start = time.process_time()
        with PeakWatch() as watch:
            result = pipe(str(file), batch_size=1)
        seconds = time.process_time() - start
    found = result.volumes_ml['organ']
    if abs(found - expected) > 0.01 * expected:
        raise SystemExit(f'the box has {expected:.1f} ml, found were {found:.1f}: the measurement is of no use')
    voxels = float(np.prod(shape))
    return {
        'shape': list(shape), 'scan_bytes_float32': int(4 * voxels), 'peak_bytes': watch.growth,
        'cpu_seconds': round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', nargs=3, type=int, default=[512, 512, 600], metavar='N')
    parser.add_argument('--output', type=Path, default=RESULTS / 'volume_memory.json')
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(options.shape)
    row['torch'] = torch.__version__
    with atomic_path(options.output) as path:
        path.write_text(json.dumps(row, indent=2) + '\n', encoding='utf-8')
    print(
        f'{" x ".join(map(str, options.shape))}: {row["peak_bytes"] / 2 ** 30:.2f} GiB above the start '
        f'({row["peak_bytes"] / row["scan_bytes_float32"]:.1f} times the scan in float32), '
        f'{row["cpu_seconds"]:.0f} CPU-seconds; written: {options.output}')


if __name__ == '__main__':
    main()

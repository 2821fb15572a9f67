"""The Triton kernels against the PyTorch form: under Triton's interpreter on the CPU, and on CUDA if there is one."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.layers.compare_scans import compare

pytest.importorskip('triton', reason='there is no Triton for this operating system')


def test_under_the_interpreter():
    tests = Path(__file__).with_name('interpreted_scan.py')
    outcome = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', str(tests)],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    assert re.search(r'^\.{4}', outcome.stdout, flags=re.MULTILINE), outcome.stdout  # all four ran, none was skipped


@pytest.mark.gpu
@pytest.mark.parametrize('shape', [(2, 96, 8, 2112, 1), (1, 768, 16, 300, 3)])
def test_on_cuda(shape):
    from vishub.models.layers.selective_scan_triton import scan
    compare(scan, shape, 'cuda')

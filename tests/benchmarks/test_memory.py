"""benchmarks/memory.py: what is counted."""
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def peak_bytes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module('memory').peak_bytes
    del sys.modules['memory']


def test_peak_is_of_what_lives_at_one_time(peak_bytes):
    def call():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # and 4 more
        del first
        return second * 2  # the first one's place is free again

    assert peak_bytes(call, 'cpu') == pytest.approx(8e6, rel=0.01)


def test_what_was_there_before_does_not_count(peak_bytes):
    big = torch.ones(4, 1000, 1000)
    assert peak_bytes(lambda: big[0] + 1, 'cpu') == pytest.approx(4e6, rel=0.01)

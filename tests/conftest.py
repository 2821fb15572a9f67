"""What every test shares: one thread a process, no network, and the `gpu` and `browser` marks."""
import os

# As `make test` has it: how sums are split over threads decides their last digits, and workers share the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Nothing in the suite may reach out: a test that needs a Hub starts its own on loopback and says so.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('gpu'):  # not item.keywords, which also hold parameter ids
            item.add_marker(pytest.mark.skip(reason='no CUDA device (gpu)'))


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)

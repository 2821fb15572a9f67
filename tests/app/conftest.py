"""What the demo's tests share: the demo package, weights that it can serve, bad uploads, and a browser."""
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Dict

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vishub  # noqa: F401 registers the models
from vishub.hub import save_folder

CLASSES = ('blue', 'red')


def _coloured(label: int, generator: torch.Generator, count: int) -> torch.Tensor:
    """Noisy pictures whose blue (label 0) or red (label 1) is strong; count, 3, 64, 64 in 0..1."""
    pictures = 0.25 * torch.rand(count, 3, 64, 64, generator=generator)
    pictures[:, 2 - 2 * label] += 0.7 * torch.rand(count, 1, 1, generator=generator) + 0.05
    return pictures


@pytest.fixture(scope='session')
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for VISHUB_WEIGHTS with a favit_small64 that really learnt to tell red pictures from blue ones."""
    root = tmp_path_factory.mktemp('weights')
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('favit_small64', num_classes=2, drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.tensor([0, 1] * 4)
    model.train()
    for _ in range(30):
        pictures = torch.cat([_coloured(int(label), generator, 1) for label in labels])
        loss = torch.nn.functional.cross_entropy(model((pictures - 0.5) / 0.5), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3, 'the tiny model did not learn; the tests below would test nothing'
    config = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, label_names=CLASSES, num_classes=2)
    save_folder(model, root / 'favit_small64.colours', metrics={}, card={}, pretrained_cfg=config)
    return root


@pytest.fixture
def served_weights(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(tiny_weights))
    return tiny_weights


@pytest.fixture(scope='session')
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained ViT of six blocks for grey pictures and three classes."""
    root = tmp_path_factory.mktemp('vit')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('vit_mini_patch2_28', depth=6, in_chans=1, num_classes=3)
        torch.nn.init.normal_(model.head.weight, std=0.3)  # scores that differ
    names = ('boot', 'bag', '<i>hat</i>')
    config = dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,), label_names=names, num_classes=3)
    save_folder(model, root / 'vit_mini_patch2_28.shapes', metrics={}, card={}, pretrained_cfg=config)
    return root


def _png_of_zeros(side: int) -> bytes:
    """A valid grey PNG of side x side black pixels, made without the memory that it would need."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    row = bytes(1 + side)
    pixels = b''.join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


@pytest.fixture(scope='session')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """Files to upload, good, odd and bad, by name."""
    folder = tmp_path_factory.mktemp('pictures')
    red = np.zeros((90, 120, 3), np.uint8)
    red[..., 0] = 190
    Image.fromarray(red).save(folder / 'red.png')
    Image.fromarray(red[..., ::-1].copy()).save(folder / 'blue.png')
    Image.fromarray(red).convert('CMYK').save(folder / 'cmyk.jpg')
    Image.fromarray(np.full((70, 80), 40000, np.uint16)).save(folder / 'sixteen.png')
    frames = [Image.fromarray(np.roll(red, n, axis=2)) for n in range(3)]
    frames[0].save(folder / 'animated.gif', save_all=True, append_images=frames[1:])
    (folder / 'text.png').write_text('I am not a picture.')
    (folder / 'empty.png').touch()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / 'whole.jpg')
    (folder / 'truncated.jpg').write_bytes((folder / 'whole.jpg').read_bytes()[:9000])
    (folder / 'huge.png').write_bytes(_png_of_zeros(30_000))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope='session')
def chromium() -> str:
    """Path of the system's Chromium, or of the one in the environment variable CHROMIUM."""
    names = [os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable']
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip('no Chromium on this machine: apt-get install chromium')
    return found

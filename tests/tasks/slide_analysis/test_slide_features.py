"""Encoders, features of a slide, and the cache that keeps them."""
import h5py
import numpy as np
import pytest
import torch
from torch import nn

from vishub import InputError
from vishub.tasks.slide_analysis import features as module
from vishub.tasks.slide_analysis.encoders import Encoder, load_encoder
from vishub.tasks.slide_analysis.features import FeatureCache, extract, read_features
from vishub.tasks.slide_analysis.slides import open_slide
from vishub.tasks.slide_analysis.tissue import Tiling, find_tissue, make_regions

TILING = Tiling(patch_size=16)


class Mean(nn.Module):
    """Mean colour, three features; counts the pictures it sees."""
    num_features = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.scale * x.mean((2, 3))


@pytest.fixture
def opened(slide_path):
    with open_slide(slide_path) as slide:
        yield slide, make_regions(slide, find_tissue(slide, TILING), TILING)


def test_features_are_those_of_the_pixels(opened, drawn):
    slide, regions = opened
    encoder = Encoder(Mean(), 'mean', 16)
    found = extract(slide, regions, encoder)
    assert found.patch.shape == (len(regions), 8, 8, 3) and found.region.shape == (len(regions), 3)
    pixels = torch.from_numpy(drawn[0]).float() / 255
    for number, (x, y) in enumerate(regions.coords):
        square = pixels[y:y + 128, x:x + 128]
        assert torch.allclose(found.region[number], square.mean((0, 1)), atol=3e-3)
        means = square.reshape(8, 16, 8, 16, 3).mean((1, 3))
        tissue = torch.from_numpy(regions.patch_tissue[number] > 0)
        assert torch.allclose(found.patch[number][tissue], means[tissue], atol=2e-3)
        assert (found.patch[number][~tissue] == 1).all()  # white
    # glass was encoded once
    tissue = int((regions.patch_tissue > 0).sum())
    assert encoder.model.seen == 1 + tissue + len(regions)


def test_cache_gives_the_same_and_knows_what_differs(opened, tmp_path):
    slide, regions = opened
    cache, encoder = FeatureCache(tmp_path), load_encoder('texture_bank', 16)
    made = cache.get(slide, encoder, TILING)
    kept = cache.get(slide, encoder, TILING)
    assert torch.equal(made.patch, kept.patch) and torch.equal(made.region, kept.region)
    assert made.coords.tolist() == kept.coords.tolist() == regions.coords.tolist() and kept.size == 128
    assert made.seconds and not kept.seconds
    names = {cache.path(slide, *how).name for how in (
        (encoder, TILING), (load_encoder('texture_bank:1', 16), TILING), (load_encoder('texture_bank', 24), TILING),
        (encoder, Tiling(patch_size=16, max_regions=2)))}
    assert len(names) == 4
    assert torch.equal(extract(slide, regions, encoder).patch, kept.patch)


def test_a_broken_off_call_goes_on(opened, tmp_path, monkeypatch):
    slide, regions = opened
    monkeypatch.setattr(module, '_PART', 2)
    cache, encoder = FeatureCache(tmp_path), Encoder(Mean(), 'mean', 16)

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        cache.get(slide, encoder, TILING, kill)
    path = cache.path(slide, encoder, TILING)
    parts = sorted(path.with_suffix('.parts').iterdir())
    assert len(parts) == 2 and not path.exists()
    parts[0].write_bytes(b'damaged')
    encoder.model.seen = 0
    calls = []
    found = cache.get(slide, encoder, TILING, lambda done, total: calls.append(done))
    fresh = extract(slide, regions, encoder)
    assert torch.equal(found.patch, fresh.patch) and torch.equal(found.region, fresh.region)
    assert not path.with_suffix('.parts').exists() and path.exists()
    assert 4 in calls and 3 not in calls  # the second part came from disk, the damaged first was made anew


def test_unwritable_cache(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        FeatureCache(tmp_path / 'file' / 'cache')


def test_official_file(tmp_path):
    patch, region = np.random.rand(3, 8, 8, 5).astype('f4'), np.random.rand(3, 5).astype('f4')  # noqa: NPY002
    with h5py.File(tmp_path / 'slide.h5', 'w') as file:
        file['features'], file['features2'], file['coords'] = patch, region, np.arange(6).reshape(3, 2)
    found = read_features(tmp_path / 'slide.h5')
    assert np.array_equal(found.patch, patch) and np.array_equal(found.region, region) and found.size == 0
    with h5py.File(tmp_path / 'wrong.h5', 'w') as file:
        file['features'], file['features2'], file['coords'] = patch, region[:2], np.zeros((3, 2))
    with pytest.raises(InputError, match=r'\(N, g, g, C\) and \(N, C\) are needed'):
        read_features(tmp_path / 'wrong.h5')
    (tmp_path / 'text.safetensors').write_text('none')
    with pytest.raises(InputError, match='holds no features'):
        read_features(tmp_path / 'text.safetensors')


# -- encoders ---------------------------------------------------------------------------------------------------------

def test_texture_bank_is_a_function_of_its_seed():
    pictures = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    first, again, other = (
        load_encoder(name)(pictures) for name in ('texture_bank', 'texture_bank:0', 'texture_bank:1'))
    assert first.shape == (4, 128) and torch.equal(first, again) and not torch.allclose(first, other)
    assert not any(p.requires_grad for p in load_encoder('texture_bank').model.parameters())
    white = load_encoder('texture_bank')(np.full((1, 32, 32, 3), 255, np.uint8))
    assert white.isfinite().all()


def test_encoder_of_timm(tmp_path):
    import timm

    from vishub.hub import save_folder
    model = timm.create_model('resnet10t', num_classes=3)
    save_folder(model, tmp_path / 'resnet10t.small', metrics={}, card={}, dtype=torch.float32,
                pretrained_cfg={'mean': (0.5,) * 3, 'std': (0.25,) * 3})
    encoder = load_encoder(f'local-dir:{tmp_path / "resnet10t.small"}', 64)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    model.reset_classifier(0)
    with torch.no_grad():
        assert torch.allclose(encoder(pictures), model.eval()(x), atol=1e-5)
    assert encoder.width == 512
    half = load_encoder(f'local-dir:{tmp_path / "resnet10t.small"}', 64, amp=True)
    assert half.digest != encoder.digest and torch.allclose(half(pictures), encoder(pictures), atol=0.1)


@pytest.mark.parametrize('name, size, sentence', [
    ('texture_bank:x', None, 'its seed is no number'),
    ('texture_bank', 4, 'give 8 or more'),
])
def test_bad_encoders(name, size, sentence):
    with pytest.raises(InputError, match=sentence):
        load_encoder(name, size)

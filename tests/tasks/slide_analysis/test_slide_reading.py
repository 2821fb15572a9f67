"""Opening slides, reading any rectangle of them, and finding and cutting their tissue."""
import shutil
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from vishub import InputError, MissingExtraError
from vishub.tasks.slide_analysis import procedural, slides
from vishub.tasks.slide_analysis.procedural import CELL, ORGANS, draw_slide, make_slides, write_pyramid
from vishub.tasks.slide_analysis.slides import open_slide
from vishub.tasks.slide_analysis.tissue import Tiling, find_tissue, make_regions

TILING = Tiling(patch_size=16)


def test_pyramid_and_its_header(slide_path, drawn, tmp_path):
    with open_slide(slide_path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.vendor) == (768, 768, 0.5, 'aperio')
        assert slide.downsamples == [1, 2, 4, 8] and slide.warnings == ()
        assert np.array_equal(slide.read(0, 0, 768, 768, (768, 768)), drawn[0])
    with open_slide(write_pyramid(tmp_path / 'generic.tif', drawn[0])) as slide:
        assert (slide.vendor, slide.mpp) == ('generic-tiff', 0.5)
    with open_slide(slide_path, mpp=0.25) as slide:
        assert slide.mpp == 0.25


def test_reading_at_any_scale(slide_path, drawn):
    pixels = drawn[0].astype(float)
    with open_slide(slide_path) as slide:
        coarse = slide.read(128, 256, 256, 128, (32, 16))  # from the level that is 8 times smaller
        means = pixels[256:384, 128:384].reshape(16, 8, 32, 8, 3).mean((1, 3))
        assert np.abs(coarse - means).max() < 3
        odd = slide.read(100, 100, 300, 300, (100, 100))  # a third: level 2, then averaged
        means = pixels[100:400, 100:400].reshape(100, 3, 100, 3, 3).mean((1, 3))
        assert np.abs(odd - means).mean() < 4
        beyond = slide.read(700, 700, 136, 136, (136, 136))
        assert np.array_equal(beyond[:68, :68], drawn[0][700:, 700:]) and (beyond[68:] == 255).all()


def test_large_views_are_read_in_strips(slide_path, monkeypatch):
    with open_slide(slide_path) as slide:
        whole = slide.read(0, 0, 768, 768, (384, 384))
        largest = []
        region = slide._handle.read_region
        monkeypatch.setattr(slides, '_STRIP_PIXELS', 50_000)
        monkeypatch.setattr(
            slide._handle, 'read_region', lambda where, level, size: largest.append(size) or region(where, level, size))
        strips = slide.read(0, 0, 768, 768, (384, 384))
        assert len(largest) > 2 and max(wide * high for wide, high in largest) <= 50_000
        assert np.abs(strips.astype(int) - whole).mean() < 1


def _plain(path):
    Image.new('RGB', (64, 64), 'pink').save(path)


def _text(path):
    path.write_text('I am not a slide.')


def _no_resolution(path):
    write_pyramid(path, np.full((300, 300, 3), 200, np.uint8), mpp=None)


def _truncated(path):
    pixels = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    write_pyramid(path, pixels)
    path.write_bytes(path.read_bytes()[:200_000])


@pytest.mark.parametrize('name, make, sentence', [
    ('none.svs', None, 'does not exist'),
    ('plain.png', _plain, 'not a whole-slide image; pass allow_image=True'),
    ('text.svs', _text, 'not a whole-slide image'),
    ('resolution.tif', _no_resolution, 'says no resolution .* pass mpp='),
    ('cut.tif', _truncated, 'damaged or truncated|not a whole-slide image'),
])
def test_bad_files_get_one_sentence(tmp_path, name, make, sentence):
    path = tmp_path / name
    if make is not None:
        make(path)
    with pytest.raises(InputError, match=sentence) as caught, open_slide(path) as slide:
        slide.thumbnail(1)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_tile_that_cannot_be_decoded(slide_path, tmp_path):
    broken = tmp_path / 'broken.svs'
    shutil.copyfile(slide_path, broken)
    with tifffile.TiffFile(broken) as tiff:
        start = tiff.pages[0].dataoffsets[4]
    with open(broken, 'r+b') as file:
        file.seek(start)
        file.write(b'\0' * 64)
    with open_slide(broken) as slide, pytest.raises(InputError, match='damaged or truncated'):
        slide.read(0, 0, 768, 768, (768, 768))


def test_folder_and_wrong_resolution(tmp_path, slide_path):
    with pytest.raises(InputError, match='is a folder'):
        open_slide(tmp_path)
    for mpp in (0, -1, float('nan')):
        with pytest.raises(InputError, match='give micrometres'):
            open_slide(slide_path, mpp=mpp)


def test_missing_levels(tmp_path, drawn, monkeypatch):
    flat = write_pyramid(tmp_path / 'flat.tif', drawn[0], levels=1)
    with open_slide(flat) as slide:
        assert 'no pyramid levels' in slide.warnings[0]
    monkeypatch.setattr(slides, '_MOST_PIXELS_OF_ONE_LEVEL', 500_000)
    with pytest.raises(InputError, match='has no pyramid levels but one of 768 x 768 pixels.*convert it'):
        open_slide(flat)


def test_plain_picture_if_allowed(tmp_path, drawn):
    Image.fromarray(drawn[0]).save(tmp_path / 'plain.png')
    with pytest.raises(InputError, match='pass mpp='):
        open_slide(tmp_path / 'plain.png', allow_image=True)
    with open_slide(tmp_path / 'plain.png', mpp=0.5, allow_image=True) as slide:
        assert slide.vendor == 'picture'
        assert len(make_regions(slide, find_tissue(slide, TILING), TILING)) > 3


def test_missing_reader_is_named(slide_path, monkeypatch):
    for module in ('openslide', 'tiffslide'):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'vishub\[slides\].*openslide-python openslide-bin.*tiffslide'):
        open_slide(slide_path)


# -- tissue -----------------------------------------------------------------------------------------------------------

def test_tissue_is_where_it_was_drawn(slide_path, drawn):
    with open_slide(slide_path) as slide:
        tissue = find_tissue(slide, TILING)
    step = round(tissue.downsample)
    truth = (drawn[0].min(2) < 225)[::step, ::step]
    agree = (tissue.mask == truth[:tissue.mask.shape[0], :tissue.mask.shape[1]]).mean()
    assert agree > 0.97 and tissue.pen == 0


@pytest.mark.parametrize('ink', [(10, 120, 60), (20, 60, 160), (25, 25, 25)])
def test_pen_is_no_tissue(drawn, tmp_path, ink):
    pixels = drawn[0].copy()
    pixels[20:60, 20:700] = ink
    with open_slide(write_pyramid(tmp_path / 'pen.tif', pixels)) as slide:
        tissue = find_tissue(slide, TILING)
        rows = make_regions(slide, tissue, TILING).coords[:, 1]
    assert tissue.pen > 0.04 and tissue.mask[:30].sum() == 0 and (rows > 0).all()


def test_glass_alone_has_no_tissue(tmp_path):
    with open_slide(write_pyramid(tmp_path / 'glass.tif', np.full((512, 512, 3), 243, np.uint8))) as slide, \
            pytest.raises(InputError, match='has no tissue'):
        make_regions(slide, find_tissue(slide, TILING), TILING)


def test_regions_are_a_grid_of_tissue(slide_path, drawn):
    with open_slide(slide_path) as slide:
        tissue = find_tissue(slide, TILING)
        regions = make_regions(slide, tissue, TILING)
        few = make_regions(slide, tissue, Tiling(patch_size=16, max_regions=3))
        fine = make_regions(slide, tissue, Tiling(patch_size=16, mpp=0.25))
    assert regions.size == 128 and regions.patch_tissue.shape == (len(regions), 8, 8)
    assert (regions.coords % 128 == 0).all()
    assert [tuple(c) for c in regions.coords[:, ::-1]] == sorted(tuple(c) for c in regions.coords[:, ::-1])
    stained = drawn[0].min(2) < 225
    for (x, y), cover in zip(regions.coords, regions.patch_tissue):
        truth = stained[y:y + 128, x:x + 128].reshape(8, 16, 8, 16).mean((1, 3))
        assert np.abs(cover - truth).mean() < 0.08
    assert len(few) == 3 and {tuple(c) for c in few.coords} <= {tuple(c) for c in regions.coords}
    assert few.patch_tissue.mean() > regions.patch_tissue.mean()
    assert fine.size == 64 and len(fine) > 2 * len(regions)


def test_a_slide_smaller_than_a_region_is_one(slide_path):
    with open_slide(slide_path) as slide:
        tiling = Tiling(patch_size=512)
        regions = make_regions(slide, find_tissue(slide, tiling), tiling)
        assert len(regions) == 1 and regions.coords.tolist() == [[0, 0]] and regions.size == 4096
        assert (regions.patch_tissue[0, 2:] == 0).all()


def test_bad_tilings():
    for options, sentence in (
            ({'patch_size': 0}, 'patch_size is 0'), ({'mpp': -1}, 'mpp is -1'),
            ({'min_tissue': 2}, 'it is a share'), ({'max_regions': 0}, 'give 1 or more')):
        with pytest.raises(InputError, match=sentence):
            Tiling(**options)


# -- procedural slides ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [512, 800])
def test_sides_that_no_slide_can_have(side):
    with pytest.raises(InputError, match=f'of {side} pixels cannot be drawn: its side is a multiple of 128, from 768'):
        draw_slide('organ_a', 'rings', side=side)


def test_slides_are_functions_of_their_numbers(drawn):
    again, lesions = draw_slide('organ_a', 'rings', 0, 'test', side=768)
    assert np.array_equal(again, drawn[0]) and lesions == drawn[1]
    assert not np.array_equal(draw_slide('organ_a', 'rings', 1, 'test', side=768)[0], again)
    assert 2 <= len(lesions) <= 5
    for x, y, width, height in lesions:  # inside one cell each
        assert x // CELL == (x + width - 1) // CELL and y // CELL == (y + height - 1) // CELL


def test_set_of_slides_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(procedural, 'ORGANS', {'organ_d': ORGANS['organ_d']})
    calls = []
    folders = make_slides(tmp_path, train=1, test=0, progress=lambda done, total: calls.append((done, total)))
    assert [folder.name for folder in folders] == ['organ_d'] and calls[-1] == (2, 2)
    first, second = (tmp_path / f'organ_d/train/{label}/000.tif' for label in ('spindles', 'pale'))
    before = first.stat().st_mtime_ns
    assert first.with_suffix('.geojson').is_file()
    second.unlink()
    make_slides(tmp_path, train=1, test=0)
    assert first.stat().st_mtime_ns == before and second.is_file()

"""The Volume tab: what the listener says to good and bad scans, and the page in a browser."""
import os
import socket
from pathlib import Path

import nibabel
import numpy as np
import pytest
import timm
import torch

from app import volume as tab
from app.main import launch
from tests.tasks.volume_segmentation.scans import SECRET, write_series
from vishub.hub import save_folder


@pytest.fixture(scope='module')
def segmenter(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained MambaClinix of two foreground classes."""
    root = tmp_path_factory.mktemp('segmenter')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('mambaclinix_tiny', features=(4, 8, 16), patch_size=(32, 32, 32))
    save_folder(model, root / 'mambaclinix_tiny.untrained', metrics={}, card={}, pretrained_cfg={
        'label_names': ('background', 'organ', 'tubes')})
    return root


@pytest.fixture
def served(segmenter, monkeypatch) -> str:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(segmenter))
    return 'mambaclinix_tiny.untrained'


def last(path, model, channel=None, mirror=False):
    """The last thing that the listener says of a file, and the files it offers, by the end of their names."""
    said, files = None, {}
    for said in tab.segment({'path': str(path), 'orig_name': Path(path).name}, model, channel, mirror):
        offered = said[3]
        if getattr(offered, 'value', None):
            files = {Path(file['path']).name: Path(file['path']).read_bytes() for file in offered.value}
    return said, files


def test_example(served):
    (planes, volumes, facts, _, status, stop), files = last(tab.EXAMPLE, served)
    assert planes.count('<input type="range"') == 4 and 'axial, ' in planes and 'sagittal, ' in planes
    assert planes.count('vh-mask') >= 3 * tab._MOST_PLANES and len(planes) < 4e6
    assert 'organ' in volumes and 'tubes' in volumes and volumes.count(' ml</td>') == 2
    assert stop.interactive is False
    assert 'For research only' in status and served in facts and '64 × 64 × 64' in facts and '1 × 1 × 1 mm' in facts
    assert sorted(files) == ['organ-and-tubes.mask.glb', 'organ-and-tubes.mask.nii.gz', 'organ-and-tubes.mask.png']
    assert files['organ-and-tubes.mask.glb'].startswith(b'glTF')
    assert tab.EXAMPLE.stat().st_size < 300_000


def test_viewer_takes_the_mesh_among_the_files(tmp_path):
    mesh, mask = tmp_path / 'a.mask.glb', tmp_path / 'a.mask.nii.gz'
    mesh.write_bytes(b'glTF')
    shown = tab.surfaces([str(mask), str(mesh)])
    assert shown.visible is True and Path(shown.value['path']).name == 'a.mask.glb'
    for files in ([str(mask)], [], None):
        hidden = tab.surfaces(files)
        assert hidden.visible == 'hidden' and hidden.value is None


def test_a_zip_of_dicom(served, tmp_path):
    import zipfile
    values = np.random.default_rng(0).integers(0, 1000, (20, 18, 8)).astype(np.int16)
    with zipfile.ZipFile(tmp_path / 'scan.zip', 'w') as archive:
        for file in write_series(tmp_path / 'scan', values):
            archive.write(file, file.name)
    said, files = last(tmp_path / 'scan.zip', served)
    assert '20 × 18 × 8' in said[2] and 'scan.mask.nii.gz' in files
    assert not any(SECRET in str(part) for part in said) and not any(SECRET.encode() in part for part in files.values())


@pytest.mark.parametrize('name, values, sentence', [
    ('flat.nii', np.zeros((8, 8)), 'two-dimensional'),
    ('four.nii', np.random.default_rng(0).normal(size=(8, 8, 8, 3)), 'choose one, as in channel=0'),
    ('empty.nii', np.zeros((8, 8, 8)), 'is 0 everywhere'),
    ('notes.txt', None, 'is no volume'),
    ('bad.zip', None, 'is no zip'),
])
def test_bad_scans_get_one_sentence(served, tmp_path, name, values, sentence):
    path = tmp_path / name
    if values is None:
        path.write_text('none')
    else:
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
    said, files = last(path, served)
    assert sentence in said[4] and 'vh-error' in said[4]
    assert str(tmp_path) not in said[4] and not files and said[0] == said[1] == ''


def test_nothing_chosen_and_unknown_model(served):
    assert 'Choose a scan' in list(tab.segment(None, served, None, False))[0][4]
    said, _ = last(tab.EXAMPLE, 'none')
    assert 'choose one from the list' in said[4]


@pytest.mark.browser
@pytest.mark.xdist_group('browser')
def test_page(served, chromium, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    page_of_app = launch(port=port, block=False)
    shots = Path(os.environ.get('VISHUB_SCREENSHOTS', tmp_path))
    asked = []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium,  # the mesh needs WebGL, in software here
                args=['--headless', '--no-sandbox', '--use-angle=swiftshader', '--enable-unsafe-swiftshader'])
            page = browser.new_page(viewport={'width': 1280, 'height': 1300})
            page.set_default_timeout(180_000)
            page.on('request', lambda request: asked.append(request.url))
            page.goto(f'http://127.0.0.1:{port}/')
            page.get_by_role('tab', name='Volume').click()
            page.locator('#vh-volume-example').click()
            expect(page.locator('#vh-volume-status')).to_contain_text('organ-and-tubes.nii.gz: ', timeout=180_000)
            slider = page.get_by_label('axial plane')
            expect(slider).to_be_visible()
            slider.fill('3')
            expect(page.locator('.vh-plane').first.locator('figcaption:visible')).to_contain_text('axial, ')
            shown = page.locator('.vh-plane').first.locator('figure:visible')
            assert shown.count() == 1
            page.get_by_label('Opacity of the mask').fill('80')
            assert page.locator('.vh-volume').evaluate("e => e.style.getPropertyValue('--vh-mask')") == '0.8'
            expect(page.locator('#vh-volume-mesh canvas')).to_be_visible()  # it stayed empty once
            page.wait_for_timeout(4000)
            page.screenshot(path=shots / 'volume.png', full_page=True)
            browser.close()
    finally:
        page_of_app.close()
    assert [url for url in asked if not url.startswith((f'http://127.0.0.1:{port}/', 'data:', 'blob:'))] == []

"""`pretrained=True`: weights/, then the Hub cache, then the Hub; verified or refused."""
import http.server
import shutil
import threading

import pytest
import timm
import torch
from sample_weights import NAME

import vishub
from vishub.hub import find, weights_folders

COMMIT = '0123456789abcdef0123456789abcdef01234567'


def put_in_cache(cache, file):
    """Lay a file into a Hub cache the way huggingface_hub does."""
    repository = cache / f'models--vishub--{NAME}'
    snapshot = repository / 'snapshots' / COMMIT
    snapshot.mkdir(parents=True)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text(COMMIT)
    return shutil.copy(file, snapshot / 'model.safetensors')


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def same(model, other):
    stored = {key: value.half().to(value.dtype) for key, value in other.state_dict().items()}
    return all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


@pytest.fixture
def local(saved, catalogued, monkeypatch, tmp_path):
    """The weights lie in a `weights/` folder of their own."""
    folder = shutil.copytree(saved[0], tmp_path / 'weights' / NAME)
    monkeypatch.setattr(find, '_roots', lambda: [tmp_path / 'weights'])
    return folder


@pytest.fixture
def hub(saved, monkeypatch):
    """A Hub on loopback that has the file; counts the requests. What is asked for: HEAD and GET of a resolve URL."""
    content = (saved[0] / 'model.safetensors').read_bytes()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.command, self.path))
            known = self.path == f'/vishub/{NAME}/resolve/main/model.safetensors'
            self.send_response(200 if known else 404)
            self.send_header('ETag', '"abc"')
            self.send_header('X-Repo-Commit', COMMIT)
            self.send_header('Content-Length', str(len(content) if known else 0))
            self.end_headers()
            return known

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    # The client reads its own switch at import, ours at each call.
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    yield requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('create, name', [
    (timm.create_model, NAME),
    (timm.create_model, 'favit_small64'),
    (timm.create_model, f'vishub/{NAME}'),
    (timm.create_model, 'vishub/favit_small64'),
    (vishub.create_model, NAME),
])
def test_every_name_loads_the_local_weights(saved, local, create, name):
    model = create(name, pretrained=True, **({} if '.' in name else {'num_classes': 10}))
    assert same(model, saved[1])
    assert model.pretrained_cfg['file'] == str(local / 'model.safetensors')


def test_timm_loads_the_folder_unchanged(saved):
    model = timm.create_model(f'local-dir:{saved[0]}', pretrained=True)
    assert same(model, saved[1])
    assert model.pretrained_cfg['label_names'][0] == 'airplane'


def test_another_head_or_input_adapts_as_in_timm(saved, local):
    model = timm.create_model(NAME, pretrained=True, num_classes=3, in_chans=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 3)
    features = timm.create_model(NAME, pretrained=True, features_only=True)
    assert len(features(torch.zeros(1, 3, 64, 64))) == 4


def test_damaged_local_file_is_refused_with_both_checksums(local, catalogued):
    damage(local / 'model.safetensors')
    with pytest.raises(vishub.WeightsNotFoundError) as caught:
        timm.create_model(NAME, pretrained=True)
    message = str(caught.value)
    assert str(local / 'model.safetensors') in message
    assert catalogued.sha256 in message
    assert find.sha256(local / 'model.safetensors') in message


def test_local_weights_that_the_catalogue_does_not_know_are_checked_by_their_own_note(saved, local, monkeypatch):
    monkeypatch.setattr(vishub.catalog, '_WEIGHTS', ())
    assert same(timm.create_model(NAME, pretrained=True), saved[1])
    (local / 'metrics.json').unlink()
    with pytest.raises(vishub.WeightsNotFoundError, match='cannot be verified'):
        timm.create_model(NAME, pretrained=True)


def test_local_comes_before_cache_and_hub(saved, local, hub, tmp_path):
    damage(put_in_cache(tmp_path / 'cache', local / 'model.safetensors'))
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'cache')
    assert same(model, saved[1])
    assert hub == []


def test_cache_comes_before_hub(saved, catalogued, hub, tmp_path):
    put_in_cache(tmp_path, saved[0] / 'model.safetensors')
    assert same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path), saved[1])
    assert hub == []


def test_cache_serves_when_offline(saved, catalogued, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    put_in_cache(tmp_path, saved[0] / 'model.safetensors')
    assert same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path), saved[1])


def test_damaged_cache_is_refused_when_offline(saved, catalogued, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    file = put_in_cache(tmp_path, saved[0] / 'model.safetensors')
    damage(file)
    with pytest.raises(vishub.WeightsNotFoundError, match=str(file)):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)


def test_hub_is_asked_last_and_its_file_is_cached(saved, catalogued, hub, tmp_path):
    assert same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path), saved[1])
    assert {command for command, _ in hub} == {'HEAD', 'GET'}
    hub.clear()
    assert same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path), saved[1])
    assert hub == []


def test_wrong_file_from_the_hub_is_refused(catalogued, hub, monkeypatch, tmp_path):
    row = vishub.catalog.Weight(NAME, 'CIFAR-10', 'top1', 1., 'f' * 64, 1, 'apache-2.0')
    monkeypatch.setattr(vishub.catalog, '_WEIGHTS', (row,))
    with pytest.raises(vishub.WeightsNotFoundError, match='f' * 64):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)


def test_hub_without_the_file_is_said_plainly(catalogued, hub, monkeypatch, tmp_path):
    row = vishub.catalog.Weight('favit_b2.cifar10', 'CIFAR-10', 'top1', 1., 'f' * 64, 1, 'apache-2.0')
    monkeypatch.setattr(vishub.catalog, '_WEIGHTS', (row,))
    with pytest.raises(vishub.WeightsNotFoundError, match='the Hub did not give it'):
        timm.create_model('favit_b2', pretrained=True, cache_dir=tmp_path)


def test_offline_without_the_file_says_so(catalogued, hub, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(vishub.WeightsNotFoundError, match='HF_HUB_OFFLINE'):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert hub == []


@pytest.mark.parametrize('name', ['favit_b0', 'vishub/favit_b0', 'favit_b2', 'favit_b2.cifar10'])
def test_models_without_weights_say_so_and_list_those_that_have(catalogued, name):
    with pytest.raises(vishub.WeightsNotFoundError) as caught:
        timm.create_model(name, pretrained=True)
    assert 'no pretrained weights' in str(caught.value)
    assert NAME in str(caught.value)


def test_unknown_tag_is_refused(catalogued):
    with pytest.raises(RuntimeError, match='cifar10'):
        timm.create_model('favit_small64.nonsense', pretrained=True)


def test_a_folder_called_weights_beside_an_installed_package_is_not_ours(monkeypatch, tmp_path):
    package = tmp_path / 'site-packages' / 'vishub'
    for folder in (package.parent / 'weights' / 'other.tag', package / '_weights' / 'favit_b0.tag'):
        folder.mkdir(parents=True)
        (folder / 'model.safetensors').write_bytes(b'')
    monkeypatch.setattr(find, '_PACKAGE', package)
    assert weights_folders() == {'favit_b0.tag': package / '_weights' / 'favit_b0.tag'}
    (package.parent / 'pyproject.toml').touch()  # now it is a checkout
    assert list(weights_folders()) == ['favit_b0.tag', 'other.tag']

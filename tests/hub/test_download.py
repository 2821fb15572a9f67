"""Loading from the Hub when it, the line or the file is at fault: the real client against tests/hub_server.py."""
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from sample_weights import NAME

import vishub
from vishub.files import sha256
from vishub.hub import find
from vishub.hub.download import download, fetch_repository, repository_info

REPO = f'tester/{NAME}'


@pytest.fixture
def published(hub, saved):
    """The sample weights lie at `tester/…`, put there without a client; nothing is local."""
    hub.put(REPO, {path.name: path.read_bytes() for path in saved[0].iterdir()})
    return hub


def cached(repository=REPO):
    """Every file of that repository in the cache, by name and content."""
    root = Path(constants.HF_HUB_CACHE) / f'models--{repository.replace("/", "--")}'
    return sorted(path.name for path in root.rglob('*') if path.is_file())


def load(name=f'hf-hub:{REPO}', **options):
    return timm.create_model(name, pretrained=True, **options)


def test_timm_and_pipeline_load_it_once(published, saved):
    model = load()
    stored = {key: value.half().to(value.dtype) for key, value in saved[1].state_dict().items()}
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    pipe = vishub.pipeline(model=f'hf-hub:{REPO}')
    assert pipe.label_names[0] == 'airplane'
    assert published.count('GET', '/resolve/main/model.safetensors') == 1
    assert published.count('GET', '/resolve/main/config.json') == 1


def test_new_head_and_other_cache_as_in_timm(published, tmp_path):
    model = load(num_classes=3, cache_dir=tmp_path / 'mine')
    assert model.num_classes == 3
    assert (tmp_path / 'mine' / f'models--tester--{NAME}').is_dir() and cached() == []


def test_broken_connection_is_resumed_where_it_broke(published, no_waiting, saved, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1000)  # what the client keeps comes in such pieces
    size = (saved[0] / 'model.safetensors').stat().st_size
    published.fail('break', 'model.safetensors', after=size // 2000 * 1000)
    file = fetch_repository(REPO)
    assert sha256(file) == sha256(saved[0] / 'model.safetensors')
    ranges = [headers.get('Range') for method, path, headers in published.requests
              if method == 'GET' and path.endswith('model.safetensors')]
    assert ranges == [None, f'bytes={size // 2000 * 1000}-']


def test_connection_that_breaks_again_and_again_is_one_sentence(published, no_waiting):
    published.fail('break', 'model.safetensors', times=20)
    with pytest.raises(vishub.InputError, match='the connection to .* failed') as caught:
        fetch_repository(REPO)
    assert '\n' not in str(caught.value)
    assert 'model.safetensors' not in cached()
    published.faults.clear()
    assert fetch_repository(REPO).is_file()


def test_hub_that_stalls(published, no_waiting):
    published.fail('stall', 'model.safetensors', times=20)
    with pytest.raises(vishub.InputError, match='does not answer in time'):
        fetch_repository(REPO)
    assert 'model.safetensors' not in cached()


@pytest.mark.parametrize('noted', [True, False])
def test_damaged_bytes_are_refused_and_leave_the_cache(published, saved, noted):
    if not noted:  # a repository that others made: the Hub's own checksum is all there is
        repository = published.repositories['model', REPO]
        del repository.commits[repository.branches['main']]['metrics.json']
    digest = sha256(saved[0] / 'model.safetensors')
    published.fail('corrupt', 'model.safetensors', times=3)
    for attempt in (load, lambda: fetch_repository(REPO), lambda: download(f'hf-hub:{REPO}')):
        with pytest.raises(vishub.WeightsNotFoundError, match=f'damaged.*{digest}'):
            attempt()
        assert not {'model.safetensors', digest} & set(cached())
    assert load().num_classes == 10  # the line is well again


def test_damaged_small_file_without_any_note(published, saved):
    published.lfs_from = None
    published.put('tester/plain', {'model.safetensors': (saved[0] / 'model.safetensors').read_bytes()})
    published.fail('corrupt', 'tester/plain')
    with pytest.raises(vishub.WeightsNotFoundError, match='damaged'):
        fetch_repository('tester/plain')
    assert 'model.safetensors' not in cached('tester/plain')
    assert not [name for name in cached('tester/plain') if len(name) == 40]  # no content either
    assert fetch_repository('tester/plain').is_file()


def test_file_that_is_not_what_its_metrics_say(published):
    metrics = {'sha256': 'f' * 64}
    published.put(REPO, {'metrics.json': json.dumps(metrics).encode()})
    with pytest.raises(vishub.WeightsNotFoundError, match='f' * 64):
        load()


def test_cache_damaged_on_disk_is_noticed(published):
    file = fetch_repository(REPO)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(vishub.WeightsNotFoundError, match='damaged'):
        load()
    assert load().num_classes == 10


def test_repository_with_a_pickle_only(published, saved):
    published.put('tester/old', {
        'config.json': (saved[0] / 'config.json').read_bytes(), 'pytorch_model.bin': b'\x80\x04.'})
    with pytest.raises(vishub.WeightsNotFoundError, match='a pickle could run code'):
        load('hf-hub:tester/old')
    assert published.count('GET', 'pytorch_model.bin') == 0


@pytest.mark.parametrize('act', [
    lambda name: vishub.pipeline(model=name), repository_info, download, fetch_repository,
])
def test_missing_repository_and_revision(published, act):
    with pytest.raises(vishub.InputError, match='no such repository') as caught:
        act('hf-hub:tester/missing')
    assert '\n' not in str(caught.value)
    with pytest.raises(vishub.InputError, match='no such branch, tag or commit'):
        act(f'hf-hub:{REPO}@nowhere')


@pytest.mark.parametrize('act', [
    lambda name: vishub.pipeline(model=name), repository_info, download, fetch_repository,
])
def test_wrong_token(published, monkeypatch, act):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(vishub.InputError, match='does not know the token'):
        act(f'hf-hub:{REPO}')


def test_tag_pins_the_weights(published, saved):
    HfApi(endpoint=published.url).create_tag(REPO, tag='v1')
    content = bytearray((saved[0] / 'model.safetensors').read_bytes())
    content[-1] ^= 1
    published.put(REPO, {'model.safetensors': bytes(content), 'metrics.json': b'{}'})
    assert sha256(fetch_repository(f'{REPO}@v1')) == sha256(saved[0] / 'model.safetensors')
    assert sha256(fetch_repository(REPO)) != sha256(saved[0] / 'model.safetensors')
    assert repository_info(f'{REPO}@v1')['sha256'] and repository_info(REPO)['sha256'] is None


def test_offline_takes_the_cache_and_nothing_else(published, monkeypatch):
    load()
    published.requests.clear()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert load().num_classes == 10
    assert vishub.pipeline(model=f'hf-hub:{REPO}').label_names[0] == 'airplane'
    for act in (repository_info, download):
        with pytest.raises(vishub.InputError, match='HF_HUB_OFFLINE'):
            act('hf-hub:tester/never-seen')
    with pytest.raises(vishub.InputError, match='HF_HUB_OFFLINE'):
        vishub.pipeline(model='hf-hub:tester/never-seen')
    assert published.requests == []


def test_proxy_of_the_environment_is_used(published, monkeypatch):
    """What asks for a Hub elsewhere reaches our server as a proxy: the request line then has the whole address."""
    from huggingface_hub import close_session
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HTTP_PROXY', published.url)
    monkeypatch.setenv('http_proxy', published.url)
    monkeypatch.setenv('HF_ENDPOINT', 'http://hub.invalid')
    close_session()
    assert repository_info(REPO)['architecture'] == 'favit_small64'


def test_download_of_catalogued_weights(hub, saved, catalogued, monkeypatch, tmp_path):
    hub.put(f'vishub/{NAME}', {
        **{path.name: path.read_bytes() for path in saved[0].iterdir()}, 'training.log': b'long'})
    came = download(NAME, tmp_path / 'out')
    assert came == tmp_path / 'out' / NAME
    assert sorted(path.name for path in came.iterdir()) == sorted(path.name for path in saved[0].iterdir())
    assert not any(path.is_symlink() for path in came.iterdir())
    monkeypatch.setattr(find, '_roots', lambda: [tmp_path / 'out'])
    hub.requests.clear()
    assert download(f'vishub/{NAME}', tmp_path / 'copy').is_dir()  # now it is here
    assert download(NAME, tmp_path / 'copy') == tmp_path / 'copy' / NAME  # a second time is no fault
    assert hub.requests == []
    assert timm.create_model(f'local-dir:{tmp_path / "copy" / NAME}', pretrained=True).num_classes == 10


def test_download_of_what_has_no_weights(hub, tmp_path):
    with pytest.raises(vishub.InputError, match='is an architecture'):
        download('favit_b2')
    with pytest.raises(vishub.UnknownNameError):
        download('favit_b77')
    assert hub.requests == []


def test_download_into_a_file_is_refused(published, tmp_path):
    (tmp_path / NAME).write_text('mine')
    with pytest.raises(vishub.InputError, match='is a file'):
        download(f'hf-hub:{REPO}', tmp_path)
    assert (tmp_path / NAME).read_text() == 'mine'


def test_full_disk_leaves_nothing_half_written(published, tmp_path, monkeypatch):
    download(f'hf-hub:{REPO}')

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(shutil, 'copy', full)
    with pytest.raises(OSError, match='No space left'):
        download(f'hf-hub:{REPO}', tmp_path / 'out')
    assert list((tmp_path / 'out').iterdir()) == []

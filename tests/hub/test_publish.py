"""Publishing to the Hub: the real client, over HTTP, against the stand-in of tests/hub_server.py."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from sample_weights import METRICS, NAME

import vishub
from tests.hub_server import User
from vishub import cli
from vishub.files import sha256
from vishub.hub import find, save_folder
from vishub.hub.publish import SPACE_NAME, publish_all, space_files

REPO = f'tester/{NAME}'


@pytest.fixture(scope='session')
def big(tmp_path_factory):
    """Weights of more than 10 MB."""
    model = timm.create_model('favit_b0', num_classes=10)
    folder = save_folder(
        model, tmp_path_factory.mktemp('big') / 'favit_b0.mine', metrics={}, card={}, dtype=torch.float32)
    assert (folder / 'model.safetensors').stat().st_size > 10_000_000
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / 'weights' / NAME)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_publish_makes_a_complete_repository(hub, folder):
    (folder / 'robustness.png').write_bytes(b'plot')
    (folder / 'checkpoint.pth').write_bytes(b'not for others')
    (folder / '.env').write_text('HF_TOKEN=secret')
    result = vishub.publish(folder, REPO)
    files = hub.repositories['model', REPO].files()
    assert set(files) == {'model.safetensors', 'config.json', 'metrics.json', 'README.md', 'robustness.png'}
    assert set(result.uploaded) == set(files) and result.unchanged == ()
    assert result.commit == hub.repositories['model', REPO].branches['main']
    assert result.url == f'{hub.url}/{REPO}'
    for name in ('model.safetensors', 'config.json', 'metrics.json', 'robustness.png'):
        assert files[name] == (folder / name).read_bytes()
    assert list(hub.objects) == [sha256(folder / 'model.safetensors')]  # the large one came through LFS
    assert not hub.repositories['model', REPO].private


def test_card_on_the_hub(hub, folder):
    vishub.publish(folder, REPO)
    card = ModelCard(hub.repositories['model', REPO].files()['README.md'].decode())
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'apache-2.0', 'image-classification')
    assert {'timm', 'vishub'} <= set(data.tags)
    assert data.datasets == ['cifar10'] and 'accuracy' in data.metrics
    accuracy = next(result for result in data.eval_results if result.metric_type == 'accuracy')
    assert (accuracy.metric_value, accuracy.dataset_name) == (12.5, 'CIFAR-10 (JPEG)')
    assert yaml.safe_load(card.content.split('---')[1])['model-index'][0]['name'] == NAME


def test_snippet_on_the_hub_works_as_it_stands(hub, folder, saved, monkeypatch, tmp_path, capsys):
    vishub.publish(folder, REPO)
    card = hub.repositories['model', REPO].files()['README.md'].decode()
    snippet = re.search(r'```python\n(.*?)```', card, flags=re.DOTALL)[1]
    assert f"'hf-hub:{REPO}'" in snippet
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (90, 70), 'navy').save('picture.jpg')
    exec(snippet, {})
    label, probability = capsys.readouterr().out.split()
    assert label in saved[1].pretrained_cfg['label_names'] and 0.1 <= float(probability) <= 1
    assert hub.count('GET', f'{REPO}/resolve') >= 2


def test_more_than_ten_megabytes_there_and_back(hub, big, tmp_path):
    vishub.publish(big, 'tester/big')
    digest = sha256(big / 'model.safetensors')
    assert list(hub.objects) == [digest]
    assert hub.count('PUT', f'/lfs/{digest}') == 1 and hub.count('POST', '/lfs-verify') == 1
    from vishub.hub.download import download
    came = download('hf-hub:tester/big', tmp_path / 'out')
    assert came == tmp_path / 'out' / 'big'
    assert sha256(came / 'model.safetensors') == digest
    model = timm.create_model('hf-hub:tester/big', pretrained=True)
    other = timm.create_model(f'local-dir:{came}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_hub_without_xet_storage_and_the_client_as_it_comes(hub, folder, monkeypatch):
    """With Xet on, the client sends large files to Xet's storage only; this Hub has LFS alone."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    vishub.publish(folder, REPO)
    assert hub.count('GET', '/xet-write-token/') == 1 and hub.count('PUT', '/lfs/') == 1
    repository = hub.repositories['model', REPO]
    assert repository.files()['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert len(repository.messages) == 2  # the initial one, and ours


def test_hub_with_xet_storage(hub, folder, monkeypatch, tmp_path):
    """The default client stores the large file as Xet's chunks, here in a folder, and commits its SHA-256."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    hub.xet = tmp_path / 'xet'
    content = (folder / 'model.safetensors').read_bytes()
    hub.objects[sha256(folder / 'model.safetensors')] = content  # the stand-in cannot put chunks together
    vishub.publish(folder, REPO)
    assert hub.count('GET', '/xet-write-token/') >= 1 and hub.count('PUT', '/lfs/') == 0
    stored = sum(path.stat().st_size for path in hub.xet.rglob('*') if path.is_file())
    assert stored > 0.5 * len(content)  # it compresses
    assert hub.repositories['model', REPO].files()['model.safetensors'] == content
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert model.num_classes == 10


def test_second_time_nothing_is_sent(hub, folder):
    first = vishub.publish(folder, REPO)
    before = hub.uploads()
    second = vishub.publish(folder, REPO)
    assert hub.uploads() == before
    assert second.uploaded == () and set(second.unchanged) == set(first.uploaded)
    assert second.commit == first.commit and second.size == 0


def test_only_what_changed_is_sent(hub, folder):
    vishub.publish(folder, REPO)
    metrics = json.loads((folder / 'metrics.json').read_text())
    (folder / 'metrics.json').write_text(json.dumps({**metrics, 'note': 'measured again'}))
    result = vishub.publish(folder, REPO)
    assert result.uploaded == ('metrics.json',)
    assert hub.count('PUT', '/lfs/') == 1  # of the first time


def test_after_a_break_between_upload_and_commit_the_large_file_is_not_sent_again(hub, folder):
    hub.fail('status', '/commit/', method='POST', code=400)
    with pytest.raises(vishub.InputError, match='refused it'):
        vishub.publish(folder, REPO)
    assert hub.repositories['model', REPO].files() == {}
    vishub.publish(folder, REPO)
    assert hub.count('PUT', '/lfs/') == 1
    assert 'model.safetensors' in hub.repositories['model', REPO].files()


def test_killed_between_upload_and_commit(hub, folder, tmp_path):
    hub.fail('stall', '/commit/', method='POST')
    environment = {**os.environ, 'HF_HUB_DISABLE_XET': '1', 'HF_HOME': str(tmp_path / 'home')}
    process = subprocess.Popen(
        [sys.executable, '-m', 'vishub.cli', 'publish', str(folder), '--repo', REPO], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while hub.count('POST', '/commit/') == 0:
            assert process.poll() is None, 'it ended before it was killed'
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert hub.repositories['model', REPO].files() == {} and hub.count('PUT', '/lfs/') == 1
    vishub.publish(folder, REPO)
    assert 'model.safetensors' in hub.repositories['model', REPO].files() and hub.count('PUT', '/lfs/') == 1


def test_upload_that_fails_once_is_tried_again(hub, folder, no_waiting):
    hub.fail('status', '/lfs/', method='PUT', code=500)
    vishub.publish(folder, REPO)
    assert hub.count('PUT', '/lfs/') == 2
    assert 'model.safetensors' in hub.repositories['model', REPO].files()


def test_revision_is_a_branch_and_can_be_pinned(hub, folder, saved):
    vishub.publish(folder, REPO)
    metrics = json.loads((folder / 'metrics.json').read_text())
    (folder / 'metrics.json').write_text(json.dumps({**metrics, 'note': 'v2'}))
    result = vishub.publish(folder, REPO, revision='v2')
    repository = hub.repositories['model', REPO]
    assert b'v2' in repository.files('v2')['metrics.json'] and b'v2' not in repository.files('main')['metrics.json']
    assert f'hf-hub:{REPO}@v2' in repository.files('v2')['README.md'].decode()
    assert set(result.uploaded) == {'metrics.json', 'README.md'}
    for revision in ('v2', repository.branches['main']):
        model = timm.create_model(f'hf-hub:{REPO}@{revision}', pretrained=True)
        assert model.num_classes == saved[1].num_classes
    assert any(f'/resolve/{repository.branches["main"]}/' in path for _, path, _ in hub.requests)


def test_private_is_private(hub, folder):
    vishub.publish(folder, REPO, private=True)
    assert hub.repositories['model', REPO].private
    vishub.publish(folder, 'tester/open')
    before = hub.uploads()
    with pytest.raises(vishub.InputError, match='public'):
        vishub.publish(folder, 'tester/open', private=True)
    assert hub.uploads() == before


def test_dry_run_sends_nothing_and_needs_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    result = vishub.publish(folder, REPO, dry_run=True)
    assert 'model.safetensors' in result.uploaded and result.dry_run and result.compared and result.commit is None
    assert hub.repositories == {} and hub.uploads() == 0
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert not vishub.publish(folder, REPO, dry_run=True).compared


@pytest.mark.parametrize('missing', ['model.safetensors', 'config.json', 'metrics.json'])
def test_a_folder_that_is_none_is_refused_before_any_request(hub, folder, missing):
    (folder / missing).unlink()
    with pytest.raises(vishub.InputError, match=f'no weights folder: {missing} missing'):
        vishub.publish(folder, REPO)
    assert hub.requests == []


def test_wrong_checksum_is_refused_before_any_request(hub, folder):
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(content)
    with pytest.raises(vishub.InputError, match='damaged or another file'):
        vishub.publish(folder, REPO)
    assert hub.requests == []


def test_configuration_that_is_none_is_refused_before_any_request(hub, folder):
    (folder / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(vishub.InputError, match='names no architecture'):
        vishub.publish(folder, REPO)
    (folder / 'config.json').write_text('{')
    with pytest.raises(vishub.InputError, match='is not JSON'):
        vishub.publish(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize('name', ['no-owner', 'a/b/c', 'tester/with space', 'tester/x@', ''])
def test_names_that_are_none(hub, folder, name):
    with pytest.raises(vishub.InputError, match='no name of a Hub repository'):
        vishub.publish(folder, name)
    assert hub.requests == []


@pytest.mark.parametrize('token, sentence', [
    ('hf_wrong', 'does not know the token'),
    ('hf_reader', 'may not write there'),
    (None, 'asks who you are'),
])
def test_tokens_that_will_not_do(hub, folder, monkeypatch, token, sentence):
    if token is None:
        monkeypatch.delenv('HF_TOKEN')
    else:
        monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(vishub.InputError, match=sentence) as caught:
        vishub.publish(folder, REPO)
    assert '\n' not in str(caught.value)
    assert hub.repositories == {}


def test_hub_that_says_nothing(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '1')
    hub.fail('stall', '/api/whoami-v2')
    with pytest.raises(vishub.InputError, match='does not answer in time'):
        vishub.publish(folder, REPO)


def test_hub_that_goes_silent_before_the_commit(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '1')
    hub.fail('stall', '/commit/', method='POST')
    with pytest.raises(vishub.InputError, match='does not answer in time'):
        vishub.publish(folder, REPO)
    assert hub.repositories['model', REPO].files() == {}
    vishub.publish(folder, REPO)  # and then goes on
    assert hub.count('PUT', '/lfs/') == 1


def test_no_hub_there(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(vishub.InputError, match='the connection to http://127.0.0.1:9 failed'):
        vishub.publish(folder, REPO)


def test_offline_is_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(vishub.InputError, match='HF_HUB_OFFLINE'):
        vishub.publish(folder, REPO)
    assert hub.requests == []


@pytest.fixture
def small_checkout(folder, monkeypatch):
    """`weights/` has two folders."""
    shutil.copytree(folder, folder.parent / 'favit_small64.second')
    monkeypatch.setattr(find, '_roots', lambda: [folder.parent])
    return folder.parent


def test_all_publishes_every_folder_and_the_demo(hub, small_checkout):
    results = list(publish_all('org'))
    names = [f'org/{NAME}', 'org/favit_small64.second', f'org/{SPACE_NAME}']
    assert [result.repository for result in results] == names
    space = hub.repositories['space', f'org/{SPACE_NAME}']
    assert space.sdk == 'gradio'
    assert f'vishub/_weights/{NAME}/model.safetensors' in space.files()
    before = hub.uploads()
    assert all(result.uploaded == () for result in publish_all('org'))
    assert hub.uploads() == before


def test_all_goes_on_after_a_break(hub, small_checkout):
    hub.fail('status', '/api/models/org/favit_small64.second/commit/', method='POST', code=400)
    done = []
    with pytest.raises(vishub.InputError, match='favit_small64.second'):
        done.extend(publish_all('org'))
    results = list(publish_all('org'))
    assert [bool(result.uploaded) for result in results] == [False, True, True]
    assert hub.count('PUT', '/lfs/') == 1  # the same content in all three repositories


def test_all_checks_every_folder_before_it_sends_the_first(hub, small_checkout):
    (small_checkout / 'favit_small64.second' / 'config.json').write_text('[]')
    with pytest.raises(vishub.InputError, match='favit_small64.second'):
        list(publish_all('org'))
    assert hub.requests == []


def test_space_is_a_program_that_runs(small_checkout, tmp_path):
    files = space_files()
    place = tmp_path / 'space'
    for path, content in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    front = yaml.safe_load((place / 'README.md').read_text(encoding='utf-8').split('---')[1])
    assert front['sdk'] == 'gradio' and (place / front['app_file']).is_file()
    needed = (place / 'requirements.txt').read_text().split()
    assert any(line.startswith('torch>') for line in needed) and not any(line.startswith('gradio') for line in needed)
    assert not [path for path in files if '__pycache__' in path]
    compile((place / 'app.py').read_text(), 'app.py', 'exec')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, 'HF_HOME': str(tmp_path / 'home'), 'VISHUB_WEIGHTS': '', 'GRADIO_SERVER_PORT': str(port)}
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, front['app_file']], cwd=place, env=environment, stdout=log, stderr=log)
    try:
        page = ''
        while not page:
            assert process.poll() is None, (tmp_path / 'log').read_text()
            try:
                with urllib.request.urlopen(f'http://127.0.0.1:{port}/config', timeout=30) as answer:
                    page = answer.read().decode()
            except OSError:
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert 'favit_small64.second' in page  # weights that only the Space's own folder has


def test_command_with_the_default_client_and_its_own_environment(hub, folder, tmp_path):
    """A process of its own: HF_ENDPOINT, HF_TOKEN and HF_HOME as users set them, Xet on (its storage is not needed)."""
    hub.lfs_from = None
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'VISHUB_'))}
    environment.update(HF_ENDPOINT=hub.url, HF_TOKEN='hf_right', HF_HOME=str(tmp_path / 'home'))
    code = f"""
import vishub, timm
from huggingface_hub import constants
from vishub import cli
def run(*words):
    try:
        cli.main(words)
    except SystemExit as end:
        assert not end.code, end.code
print(constants.HF_HUB_DISABLE_XET)
run('publish', {str(folder)!r}, '--repo', {REPO!r})
run('info', 'hf-hub:{REPO}')
run('download', 'hf-hub:{REPO}', '--output', {str(tmp_path / 'out')!r})
model = timm.create_model('hf-hub:{REPO}', pretrained=True)
result = vishub.pipeline(model='hf-hub:{REPO}')({str(Path(__file__).parents[2] / 'app/examples/cat.jpg')!r})
print(model.num_classes, result.model, result.predictions[0].label in model.pretrained_cfg['label_names'])
"""
    ran = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == 'False'
    assert lines[1].startswith(f'{hub.url}/{REPO}: sent 4 files')
    assert 'favit_small64' in ran.stdout and '12.5' in ran.stdout
    assert lines[-2] == str(tmp_path / 'out' / NAME)
    assert lines[-1] == f'10 hf-hub:{REPO} True'
    assert sha256(tmp_path / 'out' / NAME / 'model.safetensors') == sha256(folder / 'model.safetensors')
    assert (tmp_path / 'home' / 'hub' / f'models--tester--{NAME}').is_dir()


def test_command_line(hub, folder, capsys):
    code, out, _ = run(capsys, 'publish', folder, '--repo', REPO, '--dry-run', '--json')
    assert code == 0 and json.loads(out)[0]['dry_run'] and hub.uploads() == 0
    code, out, _ = run(capsys, 'publish', folder, '--repo', REPO)
    assert code == 0 and out.startswith(f'{hub.url}/{REPO}: sent 4 files')
    code, out, _ = run(capsys, 'info', f'hf-hub:{REPO}', '--json')
    info = json.loads(out)
    assert info['revision'] == hub.repositories['model', REPO].branches['main']
    assert info['architecture'] == 'favit_small64' and info['metrics']['top1'] == METRICS['metrics']['top1']
    assert info['files']['model.safetensors'] == (folder / 'model.safetensors').stat().st_size
    for words in (['publish', folder], ['publish', '--all', folder], ['publish', '--all', '--repo', REPO]):
        code, _, err = run(capsys, *words)
        assert code == 2 and err.count('\n') == 1


def test_stand_in_keeps_strangers_out(hub, folder, monkeypatch):
    vishub.publish(folder, REPO, private=True)
    monkeypatch.delenv('HF_TOKEN')
    from vishub.hub.download import repository_info
    with pytest.raises(vishub.InputError, match='no such repository'):
        repository_info(REPO)
    hub.tokens['hf_other'] = User('other')
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    assert repository_info(REPO)['private'] is True

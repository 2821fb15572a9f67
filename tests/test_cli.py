"""`vishub list` and `vishub info`, and how the command fails."""
import json
import sys

import pytest

from vishub import catalog, cli, errors, listing
from vishub.hub import find


def run(capsys, *arguments):
    """Run the command; give (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_help_names_the_verbs(capsys):
    code, out, _ = run(capsys, '--help')
    assert code == 0
    for verb in ('list', 'info'):
        assert verb in out
    assert run(capsys)[1].strip() == out.strip()  # nothing given: the same help


def test_list_shows_every_architecture(capsys):
    code, out, _ = run(capsys, 'list')
    assert code == 0
    for row in catalog.architectures():
        assert row.name in out


def test_list_as_json(capsys):
    code, out, _ = run(capsys, 'list', '--json', '--task', 'classification')
    rows = json.loads(out)
    assert code == 0
    assert [row['name'] for row in rows] == [row.name for row in catalog.architectures('classification')]
    assert rows[0]['input'] == [3, 224, 224]


def test_list_pretrained_keeps_those_with_weights(capsys):
    rows = json.loads(run(capsys, 'list', '--json', '--pretrained')[1])
    assert {row['name'] for row in rows} == {weight.architecture for weight in catalog.weights()}


def test_list_markdown_is_readmes_table(capsys):
    code, out, _ = run(capsys, 'list', '--markdown')
    assert code == 0
    assert out.count('\n') == len(catalog.architectures()) + 2
    assert '| `favit_b2` | classification | 24.9 M | [favit](https://arxiv.org/abs/2312.08614) |' in out


def test_info_counts_what_the_paper_says(capsys):
    code, out, _ = run(capsys, 'info', 'vishub/favit_b2', '--json')
    info = json.loads(out)
    assert code == 0
    assert info['num_params'] == 24_919_896  # specification, exact
    # The specification has 4.480 G by fvcore, which also counts normalisation, for code that does more work.
    assert 4.3e9 < info['macs'] < 4.48e9
    assert info['arxiv'] == '2312.08614'


def test_info_to_read(capsys):
    code, out, _ = run(capsys, 'info', 'favit_small64')
    assert code == 0
    words = ' '.join(out.split())  # the terminal's width breaks lines
    for fact in ('1,569,318', '3x64x64', '2312.08614', 'q2479036243/FaViT', 'no licence file'):
        assert fact in words


def test_info_of_weights(capsys, monkeypatch):
    row = catalog.Weight('favit_small64.cifar10', 'CIFAR-10 (JPEG)', 'top1', 81.25, 'a' * 64, 3_200_000, 'apache-2.0')
    monkeypatch.setattr(catalog, '_WEIGHTS', (row,))
    monkeypatch.setattr(find, '_roots', lambda: [])
    info = json.loads(run(capsys, 'info', 'favit_small64.cifar10', '--json')[1])
    assert info['weights'][0]['hub_id'] == 'vishub/favit_small64.cifar10'
    code, out, _ = run(capsys, 'info', 'favit_small64')
    assert code == 0
    for fact in ('favit_small64.cifar10', 'top1 81.25', '3.2 MB', 'apache-2.0', 'Hub: vishub/favit_small64.cifar10'):
        assert fact in out
    assert '.cifar10 top1 81.25' in run(capsys, 'list', '--task', 'classification')[1]


@pytest.mark.parametrize('arguments, words', [
    (('info', 'favit_b9'), ("'favit_b9'", 'Nearest: favit_b')),
    (('list', '--task', 'clasification'), ('classification',)),
])
def test_users_errors_are_one_sentence_on_stderr(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, '')
    assert err.startswith('vishub: ') and err.count('\n') == 1
    for word in words:
        assert word in err


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv('VISHUB_DEBUG', '1')
    with pytest.raises(catalog.UnknownNameError):
        cli.main(['info', 'favit_b9'])


@pytest.mark.parametrize('error', [errors.InputError, errors.WeightsNotFoundError, errors.MissingExtraError])
def test_every_error_of_vishub_becomes_a_sentence(capsys, monkeypatch, error):
    def fail(*_):
        raise error('the picture is no picture')

    monkeypatch.setattr(listing, 'model_rows', fail)
    assert run(capsys, 'list') == (2, '', 'vishub: the picture is no picture\n')


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(listing, 'model_rows', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(['list'])


def test_wrong_options_are_usage_errors(capsys):
    code, _, err = run(capsys, 'list', '--nonsense')
    assert code == 2
    assert '--nonsense' in err


def test_arguments_come_from_the_process_by_default(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['vishub', 'list', '--json'])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)

"""Tables of many files: what is in them, and that a kill, several processes or bad files lose and repeat nothing."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vishub
from vishub import cli, errors
from vishub.tasks import table
from vishub.tasks.base import Pipeline
from vishub.tasks.batch import files_of
from vishub.tasks.table import predict_table

NAMES = ['cat', 'dog', 'house', 'tree']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A folder of weights of a small ViT with sharp opinions."""
    torch.manual_seed(1)
    model = timm.create_model('test_vit', num_classes=4)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    folder = tmp_path_factory.mktemp('weights')
    timm.models.save_for_hf(
        model, folder, model_config={'num_classes': 4, 'label_names': NAMES}, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def pipe(weights):
    return vishub.pipeline(model=weights, device='cpu')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """37 pictures in two folders; the 5th and 20th of the first are none, and the last is of another size and grey."""
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'sub').mkdir()
    rng = np.random.default_rng(0)
    for number in range(37):
        place = folder if number < 30 else folder / 'sub'
        path = place / f'{number:03}.png'
        if number in (5, 20):
            path.write_text('no picture')
        elif number == 36:
            Image.fromarray(rng.integers(0, 256, (50, 90), dtype=np.uint8)).save(path)
        else:
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    (folder / 'notes.txt').write_text('not asked for')
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments):
    return [sys.executable, '-m', 'vishub.cli', 'predict', *map(str, arguments), '--device', 'cpu']


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(['predict', *map(str, arguments), '--device', 'cpu'])
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.mark.parametrize('workers, batch_size, part_size', [(0, 4, 1024), (2, 3, 10), (1, 64, 7)])
def test_rows_are_the_pipeline_s_results_in_order(pipe, pictures, tmp_path, workers, batch_size, part_size):
    report = predict_table(
        pipe, [str(pictures)], tmp_path / 'r.jsonl', batch_size=batch_size, workers=workers, part_size=part_size,
        top_k=2)
    rows = rows_of(report.output)
    good = [pictures / ('sub' if n >= 30 else '') / f'{n:03}.png' for n in range(37) if n not in (5, 20)]
    assert [row['source'] for row in rows] == list(map(str, good))
    for row, result in zip(rows, pipe(list(map(str, good)), top_k=2)):
        expected = result.to_dict()
        assert {key: row[key] for key in ('source', 'model', 'width', 'height', 'warnings')} == {
            key: expected[key] for key in ('source', 'model', 'width', 'height', 'warnings')}
        for one, other in zip(row['predictions'], expected['predictions']):
            assert (one['label'], one['index']) == (other['label'], other['index'])
            assert one['probability'] == pytest.approx(other['probability'], abs=1e-5)
    skipped = rows_of(report.skipped)
    assert [row['source'] for row in skipped] == [str(pictures / '005.png'), str(pictures / '020.png')]
    assert all('not a picture' in row['error'] for row in skipped)
    assert (report.num_rows, report.num_skipped, report.num_resumed) == (35, 2, 0)
    assert sorted(os.listdir(tmp_path)) == ['r.jsonl', 'r.skipped.jsonl']


def test_the_command_tells_of_bad_files_and_how_fast_it_was(weights, pictures, tmp_path, capsys):
    output = tmp_path / 'r.jsonl'
    code, out, err = run(capsys, weights, pictures / '00*.png', '--output', output, '--workers', 0, '--top-k', 1)
    assert code == 1 and '9 pictures' in out and 'files/s' in out
    assert len(err.splitlines()) == 2 and '005.png' in err and 'r.skipped.jsonl' in err
    assert all(len(row['predictions']) == 1 for row in rows_of(output))
    code, out, err = run(capsys, weights, pictures / '005.png', '--output', tmp_path / 'none.jsonl')
    assert code == 2 and '0 pictures' in out and (tmp_path / 'none.jsonl').read_bytes() == b''


def test_kill_9_loses_and_repeats_nothing(weights, pictures, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    for number in range(200):
        os.link(pictures / f'{number % 30:03}.png', folder / f'{number:04}.png')
    output, parts = tmp_path / 'r.jsonl', tmp_path / 'r.jsonl.parts'
    options = [weights, folder, '--output', output, '--part-size', 4, '--batch-size', 2, '--workers', 1]
    process = subprocess.Popen(command(*options), start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(parts.glob('[0-9]*.jsonl'))) < 5 and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob('[0-9]*.jsonl')}
    assert 5 <= len(done) < 50 and not output.exists()
    kept = {name: (parts / name).read_bytes() for name in done}
    (folder / '9999.png').write_bytes((pictures / '000.png').read_bytes())  # came later: not of this run

    seen = {}
    finish = table._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, '_finish', lambda *arguments: seen.update(
            {name: (parts / name).stat().st_mtime_ns for name in done}) or finish(*arguments))
        code, out, _ = run(capsys, *options)
    assert code == 1 and f'{4 * len(done)} of them before' in out
    assert seen == done  # none was computed again
    sources = [row['source'] for row in rows_of(output)] + [
        row['source'] for row in rows_of(tmp_path / 'r.skipped.jsonl')]
    assert len(sources) == len(set(sources)) == 200
    assert set(sources) == {str(folder / f'{number:04}.png') for number in range(200)}
    lines = output.read_bytes()
    assert all(line in lines for content in kept.values() for line in content.splitlines() if b'"error"' not in line)
    assert not parts.exists()


NOTING_COMMAND = '''
"""The command; each process notes the parts that it computes."""
import os, sys
from vishub import cli
from vishub.tasks import table

rows = table._rows

def noted(pipe, batch, options):
    with open(os.path.join(os.environ['NOTES'], os.environ['RANK'] + '.log'), 'a') as log:
        log.write(f'{batch[0]} ')
    return rows(pipe, batch, options)

table._rows = noted
cli.main(sys.argv[1:])
'''


def free_port():
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        return str(listening.getsockname()[1])


@pytest.mark.parametrize('launcher', ['torchrun', 'accelerate'])
def test_processes_share_the_files(weights, pipe, pictures, tmp_path, launcher):
    launch = {
        'torchrun': ['torch.distributed.run', '--nproc-per-node', '2', '--master-port', free_port()],
        # The launcher of several GPUs is the one that starts processes; without GPUs they run on the CPU.
        'accelerate': ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
                       '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', free_port()],
    }[launcher]
    output = tmp_path / 'r.jsonl'
    script = tmp_path / 'script.py'
    script.write_text(NOTING_COMMAND)
    arguments = command(weights, pictures, '--output', output, '--part-size', 5, '--batch-size', 4, '--workers', 0)
    done = subprocess.run(
        [sys.executable, '-m', *launch, str(script), *arguments[3:]], capture_output=True, text=True, timeout=500,
        env={**os.environ, 'NOTES': str(tmp_path)})
    assert done.returncode == 0, done.stderr  # although two files are skipped: launchers restart what fails
    assert '35 pictures' in done.stdout and '2 skipped' in done.stderr
    assert done.stdout.count('pictures') == 1  # said once
    one, other = (set((tmp_path / f'{rank}.log').read_text().split()) for rank in (0, 1))
    assert one == {'0', '2', '4', '6'} and other == {'1', '3', '5', '7'}
    alone = predict_table(pipe, [str(pictures)], tmp_path / 'alone.jsonl', batch_size=4, workers=0, part_size=5)
    assert output.read_bytes() == alone.output.read_bytes()


def test_a_break_while_the_table_is_put_together_is_made_good(pipe, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(table, '_write_lines', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_table(pipe, [str(pictures)], tmp_path / 'r.jsonl', workers=0)
    assert not (tmp_path / 'r.jsonl').exists()
    monkeypatch.setattr(pipe, 'rows', None)  # nothing is left to compute
    report = predict_table(pipe, [str(pictures)], tmp_path / 'r.jsonl', workers=0)
    assert report.num_resumed == 37 and len(rows_of(report.output)) == 35


def test_parts_of_another_run_and_a_finished_table_are_left_alone(pipe, pictures, tmp_path, monkeypatch):
    output = tmp_path / 'r.jsonl'
    with monkeypatch.context() as patch:
        patch.setattr(table, '_finish', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_table(pipe, [str(pictures)], output, workers=0, top_k=1)
    with pytest.raises(vishub.InputError, match='another run .other options'):
        predict_table(pipe, [str(pictures)], output, workers=0, top_k=2)
    with pytest.raises(vishub.InputError, match='another run .other inputs'):
        predict_table(pipe, [str(pictures / 'sub')], output, workers=0, top_k=1)
    bias = pipe.model.head.bias.detach().clone()
    with torch.no_grad():
        pipe.model.head.bias.add_(1)
        with pytest.raises(vishub.InputError, match='another run .other weights'):
            predict_table(pipe, [str(pictures)], output, workers=0, top_k=1)
        pipe.model.head.bias.copy_(bias)
    predict_table(pipe, [str(pictures)], output, workers=0, top_k=1)
    before = output.read_bytes()
    with pytest.raises(vishub.InputError, match='is there already'):
        predict_table(pipe, [str(pictures)], output, workers=0, top_k=1)
    assert output.read_bytes() == before


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    class Thin(Pipeline):
        """Decodes nothing: what is left is the machinery."""
        task, default_model = 'classification', ''

        def __call__(self):
            raise NotImplementedError

        def preparer(self):
            return lambda path: (torch.zeros(1), path)

        def rows(self, batch, facts):
            return [{'source': path} for path in facts]

    thin = Thin(torch.nn.Identity())
    peaks = []
    for number in (2, 40):
        for folder in range(number):
            (tmp_path / f'{number}' / f'{folder:02}').mkdir(parents=True)
            for file in range(100):
                (tmp_path / f'{number}' / f'{folder:02}' / f'{file:03}.png').touch()
        tries = []
        for attempt in range(2):  # other tests' threads may allocate in this process, too: the lower peak counts
            tracemalloc.start()
            report = predict_table(
                thin, [str(tmp_path / f'{number}')], tmp_path / f'{number}-{attempt}.jsonl', workers=0, part_size=50)
            tries.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert report.num_rows == 100 * number
        peaks.append(min(tries))
    assert peaks[1] < 1.5 * peaks[0] + 50_000, peaks


@pytest.mark.parametrize('arguments, words', [
    (['{pictures}/none*.png', '--output', '{out}/r.jsonl'], 'matches no file'),
    (['{out}', '--output', '{out}/r.jsonl'], 'holds no pictures'),
    (['{pictures}', '--output', '{out}/r.jsonl', '--json'], '--json'),
    (['{pictures}', '--output', '{pictures}/000.png/r.jsonl'], 'cannot be written'),
])
def test_what_cannot_be_is_one_sentence(weights, pictures, tmp_path, capsys, arguments, words):
    code, out, err = run(capsys, weights, *(a.format(pictures=pictures, out=tmp_path) for a in arguments))
    assert (code, out) == (2, '') and words in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_several_processes_need_a_table(weights, pictures, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, _, err = run(capsys, weights, pictures)
    assert code == 2 and 'results.jsonl' in err
    for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run(capsys, weights, pictures, '--output', 'r.jsonl')
    assert code == 2 and 'torchrun' in err


def test_globs_folders_and_odd_names(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / '.hidden').mkdir()
    for name in ('1.png', 'a/2.JPG', 'a/b/3.webp', 'a/text.txt', '.hidden/4.png', '[5].png'):
        (tmp_path / name).touch()
    root = str(tmp_path)

    def found(pattern):
        return [os.path.relpath(path, root) for path in files_of([os.path.join(root, pattern)])]

    assert found('') == ['1.png', '[5].png', 'a/2.JPG', 'a/b/3.webp']
    assert found('*') == ['1.png', '[5].png', 'a/2.JPG', 'a/b/3.webp']  # a folder stands for its pictures
    assert found('**/*.webp') == ['a/b/3.webp']
    assert found('a/**') == ['a/2.JPG', 'a/b/3.webp', 'a/text.txt']  # asked for, so it is tried
    assert found('[5].png') == ['[5].png']  # a file of that very name
    assert found('none.png') == ['none.png']  # decoding says what is wrong
    assert [type(item) for item in files_of([f'{root}/*.gif'])] == [vishub.InputError]


def test_names_with_line_breaks_and_bytes_that_are_no_text(pipe, pictures, tmp_path):
    names = ['line\nbreak.png', os.fsdecode(b'caf\xe9.png')]
    for name in names:
        os.link(pictures / '000.png', tmp_path / name)
    report = predict_table(pipe, [str(tmp_path)], tmp_path / 'r.jsonl', workers=0)
    assert {row['source'] for row in rows_of(report.output)} == {str(tmp_path / name) for name in names}


def test_parquet_has_the_same_rows(pipe, pictures, tmp_path):
    from pyarrow import parquet
    lines = predict_table(pipe, [str(pictures)], tmp_path / 'r.jsonl', workers=0, part_size=10)
    report = predict_table(pipe, [str(pictures)], tmp_path / 'r.parquet', workers=0, part_size=10)
    rows = parquet.read_table(report.output).to_pylist()
    assert len(rows) == report.num_rows == 35 and parquet.ParquetFile(report.output).num_row_groups == 4
    for row, line in zip(rows, rows_of(lines.output)):
        for one, other in zip(row.pop('predictions'), line.pop('predictions')):
            assert one.pop('probability') == pytest.approx(other.pop('probability'), abs=1e-6)
            assert one == other
        assert row == line


def test_parquet_without_pyarrow_names_the_extra(pipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(errors.MissingExtraError, match=r'vishub\[parquet\]'):
        predict_table(pipe, [str(pictures)], tmp_path / 'r.parquet', workers=0)
    assert os.listdir(tmp_path) == []

"""The documentation says what is true: its commands parse, its Python names exist, and it builds without a warning."""
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md')) + [ROOT / 'README.md']


def blocks(page, language):
    """Fenced blocks of a page in one language."""
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(encoding='utf-8'), flags=re.M | re.S)


def commands(page):
    """Words behind `vishub` of every command in a page's shell blocks; variables before it are dropped.

    Launchers (`torchrun … -m vishub.cli`) count, too.
    """
    for block in blocks(page, 'sh'):
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
                del words[0]
            if words[:1] == ['vishub']:
                yield words[1:]
            elif 'vishub.cli' in words:
                yield words[words.index('vishub.cli') + 1:]


def parse(words):
    """Parse a command as `vishub` would, down to the last verb, and run nothing."""
    from vishub.cli import app
    command, context = typer.main.get_command(app), None
    while True:
        with command.make_context(words[0] if words else None, list(words), parent=context) as context:
            # the rest of a group's words belong to the verb
            words = [*getattr(context, '_protected_args', []), *context.args]
            if not hasattr(command, 'commands'):
                return
            name, command, words = command.resolve_command(context, words)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_commands_parse(page):
    for words in commands(page):
        try:
            parse(words)
        except Exception as error:  # typer's own, which has had several homes
            pytest.fail(f'{page.name}: vishub {shlex.join(words)}: {error}')


def test_the_check_of_commands_finds_what_is_wrong():
    for words, message in (
            (['trian', 'classification'], 'No such command'),
            (['info', 'favit_b2', '--no-such-option'], 'No such option'),
            (['publish', 'a', 'b', 'c'], 'unexpected extra argument'),
            (['train', 'classification', '--model', 'favit_b2'], 'data'),  # is required
            (['demo', '--port', 'x'], 'valid integer'),
    ):
        with pytest.raises(Exception, match=message):
            parse(words)
    assert list(commands(ROOT / 'docs' / 'fine-tune.md'))[-1] == ['demo']
    assert all(words[0] in ('train', 'predict') for words in commands(ROOT / 'docs' / 'distributed.md'))
    assert len(list(commands(ROOT / 'docs' / 'distributed.md'))) == 8


def parse_launch(words):
    """Parse the words behind `torchrun` or `accelerate launch` as these do, and start nothing."""
    if words[0] == 'torchrun':
        from torch.distributed import run
        return run.get_args_parser().parse_args(words[1:])
    from accelerate.commands import launch
    return launch.launch_command_parser().parse_args(words[2:])


def test_launchers_parse():
    lines = [
        shlex.split(line, comments=True) for block in blocks(ROOT / 'docs' / 'distributed.md', 'sh')
        for line in block.replace('\\\n', ' ').splitlines()]
    assert {line[0] for line in lines} == {'torchrun', 'accelerate'}
    for line in lines:
        parsed = parse_launch(line)
        assert parsed.module and parsed.training_script == 'vishub.cli', line
        assert parsed.training_script_args == line[line.index('vishub.cli') + 1:]
    with pytest.raises(SystemExit):
        parse_launch(['torchrun', '--no-such-option', '-m', 'vishub.cli'])


# Only `make test-interop` installs these, and runs what that page says.
NOT_INSTALLED = ('segmentation_models_pytorch', 'transformers')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_python_names_exist(page):
    for block in blocks(page, 'python'):
        modules = {}  # local name -> module of ours
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules.update({
                    alias.name: importlib.import_module(alias.name)
                    for alias in node.names if alias.name not in NOT_INSTALLED})
            elif isinstance(node, ast.ImportFrom) and node.module not in NOT_INSTALLED:
                module = importlib.import_module(node.module)
                modules.update({alias.name: getattr(module, alias.name) for alias in node.names})
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f'{page.name}: {ast.unparse(node)}'


@pytest.mark.parametrize('page, number', [('index', 0), ('index', 1), ('tokens', 1), ('tasks', 0)])
def test_python_runs(page, number, tmp_path, monkeypatch):
    # those blocks that need nothing but the checkout
    (tmp_path / 'app').symlink_to(ROOT / 'app')
    monkeypatch.chdir(tmp_path)
    exec(blocks(ROOT / 'docs' / f'{page}.md', 'python')[number], {})


def test_builds_without_warnings(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--strict', '--site-dir', tmp_path / 'site'], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / 'site' / 'reference' / 'tokens' / 'index.html').read_text(encoding='utf-8')
    assert 'id="vishub.tokens.reduced.apply"' in page

"""The `vishub` command and its groups of verbs; the verbs themselves are in the files beside this one."""
import typer

__all__ = ['LOOK', 'SHARE', 'TRAIN', 'app', 'tokens_app', 'train_app']

# Headings of `vishub --help`.
LOOK = 'Look at models and run them'
TRAIN = 'Train, measure, make smaller'
SHARE = 'Weights from and for others'

app = typer.Typer(
    name='vishub',
    help='A hub of vision models for PyTorch: look at them, run them, train and shrink them, share the weights.',
    epilog='Errors are one sentence; set VISHUB_DEBUG=1 for the traceback.',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode='rich',
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)
train_app = typer.Typer(no_args_is_help=True, help='Train a model on your data.')
app.add_typer(train_app, name='train', rich_help_panel=TRAIN)
tokens_app = typer.Typer(no_args_is_help=True, help='Make vision transformers faster by giving them fewer tokens.')
app.add_typer(tokens_app, name='tokens', rich_help_panel=TRAIN)


@app.callback()
def _vishub() -> None:
    # Keeps the verbs verbs: typer would make a lone one the whole command.
    pass

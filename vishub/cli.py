"""The `vishub` command. Every verb is a thin call into the packages; heavy imports happen inside the verb.

Exit codes: 0 done, 1 a fault in vishub (with a traceback), 2 something the user can put right (one sentence).
"""
import os
import sys
from typing import Optional, Sequence

import typer

__all__ = ['app', 'main']

app = typer.Typer(
    name='vishub',
    help='A hub of vision models for PyTorch: list them, look at one, run it, train it, see it in a browser.',
    epilog='Errors are one sentence; set VISHUB_DEBUG=1 for the traceback.',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode='rich',
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)


@app.callback()
def _vishub() -> None:
    # Keeps the verbs verbs: typer would make a lone one the whole command.
    pass


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line and leave the process.

    Errors that vishub itself defines (wrong input, missing weights, missing extra, unknown model) are printed as one
    sentence on stderr with exit code 2. With the environment variable VISHUB_DEBUG set they keep their traceback.

    Args:
        arguments: Words behind `vishub`; those of the process by default.
    """
    try:
        app(args=arguments)
    except Exception as error:
        if os.environ.get('VISHUB_DEBUG') or not type(error).__module__.startswith('vishub.'):
            raise
        print(f'vishub: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()

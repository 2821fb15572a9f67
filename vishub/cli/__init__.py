"""The `vishub` command. Every verb is a thin call into the packages; heavy imports happen inside the verb.

Exit codes: 0 done, 1 a fault in vishub (with a traceback), 2 something the user can put right (one sentence).
"""
import importlib
import os
import sys
from typing import Optional, Sequence

from vishub.cli.root import app

__all__ = ['app', 'main']

# The files that add verbs, in the order of --help. A task joins with its `train_<task>`.
for _file in (
        'look',
        'predict',
        'train_classification',
        'train_deblurring',
        'train_generation',
        'train_tracking',
        'train_slide_analysis',
        'train_video_prediction',
        'train_volume_segmentation',
        'train_video_segmentation',
        'evaluate',
        'prune',
        'tokens',
        'share',
):
    importlib.import_module(f'vishub.cli.{_file}')


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

"""`python -m app` in a checkout, and the file that a Hugging Face Space runs. `vishub demo` is the usual way."""
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: make the folder a package again, whatever it is called
    _folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(_folder.parent))
    __package__ = _folder.name
    __import__(__package__)

from .main import launch

if __name__ == '__main__':
    # A Space names its address in these variables.
    launch(os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1'), int(os.environ.get('GRADIO_SERVER_PORT', '7860')))

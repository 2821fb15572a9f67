"""Find, verify, download and save weights; model cards.

A weight is a folder `weights/<arch>.<tag>/` that is also a ready Hub repository: `model.safetensors`, `config.json`
(timm's Hub layout), `metrics.json` (layout in `vishub/hub/folder.py`) and `README.md` (the model card).
"""
# `publish`, `client` and `download` are imported where they are used: they need the huggingface-hub client.
from vishub.hub.find import available, resolve, verify, weights_folders
from vishub.hub.folder import annotate, catalog_row, save_folder

__all__ = ['annotate', 'available', 'catalog_row', 'resolve', 'save_folder', 'verify', 'weights_folders']

"""Structural pruning of trained vision transformers, after NViT (CVPR 2023, arXiv 2110.04869).

`prune(model, loader, target_latency=0.5)` gives a smaller model and a report; `save` writes both.
"""
from vishub.pruning.cost import LatencyTable, count_macs, count_params
from vishub.pruning.distillation import DistilledRecipe
from vishub.pruning.engine import Pruner, Schedule
from vishub.pruning.official import load_official
from vishub.pruning.procedure import Pruned, prune, save
from vishub.pruning.report import PruningReport
from vishub.pruning.structure import as_nvit

__all__ = [
    'DistilledRecipe', 'LatencyTable', 'Pruned', 'Pruner', 'PruningReport', 'Schedule', 'as_nvit', 'count_macs',
    'count_params', 'load_official', 'prune', 'save',
]

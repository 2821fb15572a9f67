"""What every family's `_create_<family>` calls instead of `timm.models.build_model_with_cfg`.

timm's own builder does almost all of it. Four things are ours:

* `create_model('favit_b2')` without weights gives the published architecture (1000 classes), although timm would
  take the class count of the first tag that has weights;
* a tag may need constructor arguments of its own (`favit_b2.cifar10` has a smaller window), which timm can only
  express for Hub names;
* `pretrained=True` asks the weight resolver, which the hub sets, so that the checkout's `weights/`, the cache and
  the Hub are searched in that order and checksums are verified, for plain `timm.create_model` too;
* a configuration may hold what timm's table has no place for (how a scan is prepared for a model, by what constants a
  tracker goes): timm builds without it, and the model has it.
"""
import copy
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Type, Union

from timm.models import build_model_with_cfg
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from torch import nn

__all__ = ['build_model', 'set_weight_resolver']

_TIMM_ENTRIES = frozenset(field.name for field in dataclasses.fields(PretrainedCfg))

# (name 'arch.tag', its cfg, cache_dir) -> the cfg to load from, usually with `file` set to a verified local path.
WeightResolver = Callable[[str, PretrainedCfg, Optional[Union[str, Path]]], PretrainedCfg]

_weight_resolver: Optional[WeightResolver] = None


def set_weight_resolver(resolver: Optional[WeightResolver]) -> None:
    """Set the function that turns a registered weight into a verified local file (called by `vishub.hub`)."""
    global _weight_resolver
    _weight_resolver = resolver


def build_model(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool,
        default_cfgs: Mapping[str, DefaultCfg],
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        tag_args: Optional[Mapping[str, Mapping[str, Any]]] = None,
        tag_cfgs: Optional[Mapping[str, Mapping[str, Any]]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build `variant` as timm does, choosing the configuration and the place of the weights as vishub promises.

    Args:
        model_cls: Model class.
        variant: Architecture name, e.g. `favit_b2`.
        pretrained: Load weights.
        default_cfgs: The family's `generate_default_cfgs(...)` table.
        pretrained_cfg: Tag name, or a whole configuration (as timm passes for `hf-hub:` and `local-dir:` names).
        tag_args: `{'arch.tag': constructor arguments}` of tags whose model differs from the plain architecture.
        tag_cfgs: `{'arch.tag': entries}` of configurations that timm's table has no place for. A whole configuration
            brings its own.
        **kwargs: Passed to `timm.models.build_model_with_cfg`.

    Raises:
        RuntimeError: If `pretrained` is true and the architecture has no weights, or none of that name.
    """
    model_args: Dict[str, Any] = {}
    extra: Dict[str, Any] = {}
    if isinstance(pretrained_cfg, dict):
        extra = {key: value for key, value in pretrained_cfg.items() if key not in _TIMM_ENTRIES}
        pretrained_cfg = {key: value for key, value in pretrained_cfg.items() if key in _TIMM_ENTRIES}
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    ask = pretrained and _weight_resolver is not None and not any(
        overlay.get(key) for key in ('url', 'file', 'state_dict', 'hf_hub_id'))
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        cfgs = default_cfgs[variant].cfgs
        tag = pretrained_cfg
        if not tag:
            tag = next((t for t, cfg in cfgs.items() if cfg.has_weights), '') if pretrained else ''
        if tag not in cfgs:
            known = ', '.join(t for t in cfgs if t) or 'none'
            raise RuntimeError(f"'{variant}' has no weights '{tag}'; it has: {known}.")
        cfg = cfgs[tag]
        name = f'{variant}.{tag}' if tag else variant
        cfg = dataclasses.replace(cfg, architecture=variant, tag=tag or None)
        for key, value in (tag_args or {}).get(name, {}).items():
            kwargs.setdefault(key, value)
            model_args[key] = kwargs[key]
        extra = copy.deepcopy(dict((tag_cfgs or {}).get(name, {})))
        if ask:
            cfg = _weight_resolver(name, cfg, kwargs.get('cache_dir'))
        pretrained_cfg = cfg
    elif ask:
        cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, dict) else pretrained_cfg
        if cfg.source == 'hf-hub':  # the user named a repository: its file is verified like any other
            pretrained_cfg = _weight_resolver(variant, cfg, kwargs.get('cache_dir'))
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
    if extra:
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **extra}
    # timm adds the caller's own later; saving the model writes them all to its config.json.
    model._model_args = {**model_args, **getattr(model, '_model_args', {})}
    return model

"""Applying a method to a model, and taking it off again.

A reduced model is the same object with another class: the loop over its blocks is ours, its parameters, their names
and everything else stay timm's. The class is made from the model's own, so `isinstance` holds and `remove` only has to
give the class back. The one attribute added, `_token_reduction`, holds settings; tensors of a call never do.
"""
import functools
import threading
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import nn

from vishub.errors import InputError
from vishub.tokens.backbones import Backbone, Task, backbone_of
from vishub.tokens.method import Layout, Method, State, find_method
from vishub.tokens.tracing import Trace, restore

__all__ = ['apply', 'config', 'reduced', 'remove']


class Reduction:
    """What is applied to a model."""

    def __init__(self, method: Method, backbone: Backbone, layout: Layout, model_type: type) -> None:
        self.method = method
        self.backbone = backbone
        self.layout = layout
        self.model_type = model_type
        self.listeners: Dict[int, List[List[Trace]]] = {}  # thread -> its open recordings, outermost first

    @contextmanager
    def recording(self) -> Iterator[List[Trace]]:
        thread, traces = threading.get_ident(), []
        mine = self.listeners.setdefault(thread, [])
        mine.append(traces)
        try:
            yield traces
        finally:
            mine.pop()
            if not mine:
                del self.listeners[thread]

    def listening(self) -> List[List[Trace]]:
        return self.listeners.get(threading.get_ident(), []) if self.listeners else []

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, 'listeners': {}}  # a copy starts with nobody listening


class Passed(NamedTuple):
    """Result of the blocks."""
    x: torch.Tensor
    state: State
    taken: List[torch.Tensor]
    trace: Optional[Trace]


class ReducedModel:
    """Mixed in before the model's own class: the forward passes, written as a loop with the state in plain sight."""

    def _pass_blocks(
            self,
            images: torch.Tensor,
            take: Sequence[int] = (),
            stop: Optional[int] = None,
            record: bool = False,
    ) -> Passed:
        """Embed, then run the blocks before `stop`, keeping the tokens behind those in `take`."""
        reduction = self._token_reduction
        method, backbone, layout = reduction.method, reduction.backbone, reduction.layout
        x, shared = backbone.embed(self, images)
        state, trace, taken = State(), None, []
        positional = backbone.positional(self)
        if record:
            grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
            trace = Trace(layout.prefix, tuple(grid), x.shape[1], x.shape[0], method.merges)
        for layer in range(len(self.blocks) if stop is None else stop):
            before = x.shape[1]
            count = method.count(layer, before)
            task = Task(layer, None if count == before else count, method, layout, positional, record)
            if self.grad_checkpointing:
                x, state = checkpoint(backbone.step, self, x, state, shared, task)
            else:
                x, state = backbone.step(self, x, state, shared, task)
            if trace is not None:
                trace.add(layer, before if method.place == 'end' else count, count, state)
                state = State(state.size, state.index)
            if layer in take:
                taken.append(x)
        return Passed(x, state, taken, trace)

    def _listen(self, passed: Passed) -> None:
        for traces in self._token_reduction.listening():
            traces.append(passed.trace)

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """(B, C, H, W) -> the tokens that are left, after the final norm (B, N', D)."""
        return self._features(x, attn_mask, is_causal)[0]

    def _features(
            self,
            images: torch.Tensor,
            attn_mask: Optional[torch.Tensor],
            is_causal: bool,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Tokens after the final norm (B, N', D), and their sizes (B, N') or None."""
        _refuse_masks(attn_mask, is_causal)
        passed = self._pass_blocks(images, record=bool(self._token_reduction.listening()))
        self._listen(passed)
        return self.norm(passed.x), passed.state.size

    def forward_head(
            self,
            x: torch.Tensor,
            pre_logits: bool = False,
            size: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Pool and classify.

        Args:
            x: (B, N', D) of `forward_features`.
            pre_logits: Stop before the classifier.
            size: (B, N') tokens that each token stands for (`Trace.sizes`), weights of average and attention pooling.

        Raises:
            InputError: If tokens were merged, the head averages them and `size` is not given: the mean would be
                another one than that of `forward`.
        """
        pool = self.global_pool
        if size is None and getattr(self, 'attn_pool', None) is None and pool in ('avg', 'avgmax') \
                and self._may_have_merged(x.shape[1]):
            raise InputError(f'forward_head: global_pool={pool!r} has to weight merged tokens by their size; call '
                             'the model, or pass size= (Trace.sizes() of the same forward)')
        return self._pool_and_classify(x, size, pre_logits)

    def _may_have_merged(self, tokens: int) -> bool:
        """Whether `tokens` that come out of the blocks may stand for more that went in."""
        method, layout = self._token_reduction.method, self._token_reduction.backbone.layout(self)
        if not method.merges:
            return False
        if layout.fixed:
            return tokens != layout.tokens
        many = 1 << 20  # of images of any size: does a block make anything of a long sequence?
        return any(method.count(layer, many) < many for layer in range(layout.depth))

    def _pool_and_classify(
            self,
            x: torch.Tensor,
            size: Optional[torch.Tensor],
            pre_logits: bool = False,
    ) -> torch.Tensor:
        """`forward_head` of tokens whose sizes are known; None: all are 1."""
        if size is None:
            return super().forward_head(x, pre_logits=pre_logits)
        reduction = self._token_reduction
        prefix, pool = reduction.layout.prefix, self.global_pool
        attn_pool = getattr(self, 'attn_pool', None)
        if attn_pool is not None:
            if not reduction.method.prop_attn:
                return super().forward_head(x, pre_logits=pre_logits)
            skip = 0 if getattr(self, 'pool_include_prefix', True) else prefix
            bias = size[:, skip:].log()[:, None, None, :].to(x.dtype)  # B, 1, 1, N
            x = attn_pool(x[:, skip:], attn_mask=bias)
        elif pool in ('avg', 'avgmax'):
            skip = 0 if getattr(self, 'pool_include_prefix', False) else prefix
            weight = size[:, skip:] / size[:, skip:].sum(dim=1, keepdim=True)
            if pool == 'avg':
                # Weights that average 1 turn the model's own mean into the weighted one.
                weight = weight * weight.shape[1]
                patches = x[:, skip:] * weight.unsqueeze(-1).to(x.dtype)
                return super().forward_head(torch.cat([x[:, :skip], patches], dim=1), pre_logits=pre_logits)
            mean = (x[:, skip:] * weight.unsqueeze(-1).to(x.dtype)).sum(dim=1)
            x = 0.5 * (x[:, skip:].amax(dim=1) + mean)
        else:
            return super().forward_head(x, pre_logits=pre_logits)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        x, size = self._features(x, attn_mask, is_causal)
        return self._pool_and_classify(x, size)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`: intermediates are restored to all positions, the final features are not."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ('NCHW', 'NLC'):
            raise InputError(f"forward_intermediates: output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        passed = self._pass_blocks(x, take, last + 1 if stop_early else None, record=True)
        self._listen(passed)
        prefix = self._token_reduction.layout.prefix
        full = [restore(tokens, passed.trace, layer) for tokens, layer in zip(passed.taken, sorted(take))]
        if norm:
            full = [self.norm(tokens) for tokens in full]
        fronts = [tokens[:, :prefix] for tokens in full]
        patches = [tokens[:, prefix:] for tokens in full]
        if output_fmt == 'NCHW':
            rows, columns = passed.trace.grid
            patches = [  # B, N, D -> B, D, rows, columns
                y.reshape(y.shape[0], rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in patches]
        if output_dict:
            out = {'image_intermediates': patches}
            if prefix and return_prefix_tokens:
                out['image_intermediates_prefix'] = fronts
            if not intermediates_only:
                out['image_features'] = self.norm(passed.x)
            return out
        if return_prefix_tokens and prefix:
            patches = list(zip(patches, fronts))
        return patches if intermediates_only else (self.norm(passed.x), patches)

    def __reduce_ex__(self, protocol: int) -> Tuple:
        # The class is made while the program runs, so pickle and deepcopy are told how to make it again.
        return _blank, (self._token_reduction.model_type,), self.__dict__.copy()


def _refuse_masks(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputError('a model with token reduction takes neither attn_mask nor is_causal: '
                         'tokens that merge or leave would no longer match the mask')


@functools.cache
def _reduced_type(model_type: type) -> type:
    return type(model_type.__name__, (ReducedModel, model_type), {'__doc__': model_type.__doc__})


def _blank(model_type: type) -> nn.Module:
    """A reduced model without content, for pickle to fill."""
    cls = _reduced_type(model_type)
    return cls.__new__(cls)


def apply(model: nn.Module, method: str, **config: Any) -> nn.Module:
    """Reduce the tokens of a vision transformer, in place.

    Args:
        model: timm VisionTransformer (vit, deit, deit3, dinov2, CLIP and SigLIP towers), VisionTransformerDistilled,
            Eva, Beit, or our NViT. A reduced one gets the new method in place of the old.
        method: A name of `vishub.tokens.methods()`.
        config: How many tokens stay, `tokens_after={block: tokens}`, `keep={block: share}`, `r=` for merging, or
            `macs=` share of the full multiply-accumulates (with `layers=`, see `schedule`); and the method's options.

    Returns:
        The same model. Its state dict is as before (PYRA adds its own parameters).

    Raises:
        InputError: If the model or a value cannot be used. Nothing is changed then.
    """
    before = vars(model).get('_token_reduction')
    model_type = type(model) if before is None else before.model_type
    backbone = backbone_of(model, model_type)
    layout = backbone.layout(model)
    config = find_method(method).expand(config)
    if 'macs' in config:
        from vishub.tokens.cost import schedule  # which asks this module for what is applied
        counted = {key: config.pop(key) for key in ('macs', 'layers') if key in config}
        config = {**config, **schedule(model, method, **counted, **config)}
    chosen = find_method(method)()
    chosen.name = method
    chosen.prepare(model, config, layout)
    if layout.fixed:  # otherwise the counts meet their tokens in the forward
        _warn_of_waste(chosen, model, chosen.token_counts())
    remove(model)
    chosen.attach(model)
    model._token_reduction = Reduction(chosen, backbone, layout, model_type)
    model.__class__ = _reduced_type(model_type)
    return model


def _warn_of_waste(method: Method, model: nn.Module, counts: List[int]) -> None:
    before = counts[-2] if len(counts) > 1 else method.layout.tokens
    if method.place == 'end' and counts[-1] < before and model.global_pool == 'token':
        warnings.warn(f'{method.name} reduces behind the last block ({len(counts) - 1}): the head reads the class '
                      'token only, so this saves nothing', stacklevel=3)


def remove(model: nn.Module) -> nn.Module:
    """Take the reduction off: class, outputs and state dict as before `apply`. Does nothing to other models."""
    reduction = vars(model).get('_token_reduction')
    if reduction is not None:
        reduction.method.detach(model)
        del model._token_reduction
        model.__class__ = reduction.model_type
    return model


def config(model: nn.Module) -> Optional[Dict[str, Any]]:
    """What is applied, in plain values: `method` and the configuration that `apply` takes; None if nothing is."""
    reduction = vars(model).get('_token_reduction')
    return None if reduction is None else {'method': reduction.method.name, **reduction.method.config()}


@contextmanager
def reduced(model: nn.Module, method: str, **config: Any) -> Iterator[nn.Module]:
    """`apply` for the length of a `with`; afterwards the model has what it had before.

    Raises:
        InputError: As `apply`; and if the model is reduced by a method with parameters, which would be lost.
    """
    before = vars(model).get('_token_reduction')
    if before is not None and type(before.method).attach is not Method.attach:
        raise InputError(f'reduced: the model has {before.method.name} with parameters of its own; '
                         'use a copy.deepcopy of it, or remove() it first')
    apply(model, method, **config)
    try:
        yield model
    finally:
        remove(model)
        if before is not None:
            model._token_reduction = before
            model.__class__ = _reduced_type(before.model_type)

"""Token reduction for vision transformers: fewer tokens inside, the same inputs and outputs outside.

    model = timm.create_model('deit_small_patch16_224', pretrained=True).eval()
    tokens.apply(model, 'tome', r=13)         # or macs=0.6
    with tokens.trace(model) as traces:
        logits = model(images)
    tokens.visualize(image, traces[0]).save('merged.png')
    tokens.remove(model)                      # bit for bit what it was
"""
from vishub.tokens import functional
from vishub.tokens.baselines import ClassAttention, Random, Uniform
from vishub.tokens.compare import compare
from vishub.tokens.cost import Macs, macs, schedule
from vishub.tokens.method import Method, Seen, State, keep_tokens, methods, register_method
from vishub.tokens.picture import visualize
from vishub.tokens.pyra import PYRA, load_peft_state_dict, merge_lora, peft_state_dict, trainable_parameters
from vishub.tokens.reduced import apply, config, reduced, remove
from vishub.tokens.search import SearchResult, Trial, search
from vishub.tokens.token_transforming import TokenTransforming
from vishub.tokens.tome import ToMe
from vishub.tokens.tracing import Trace, restore, trace
from vishub.tokens.tuning import tune
from vishub.tokens.zero_tprune import PRESETS, ZeroTPrune

__all__ = [
    'ClassAttention', 'Macs', 'Method', 'PRESETS', 'PYRA', 'Random', 'SearchResult', 'Seen', 'State', 'ToMe',
    'TokenTransforming', 'Trace', 'Trial', 'Uniform', 'ZeroTPrune', 'apply', 'compare', 'config', 'functional',
    'keep_tokens', 'load_peft_state_dict', 'macs', 'merge_lora', 'methods', 'peft_state_dict', 'reduced',
    'register_method', 'remove', 'restore', 'schedule', 'search', 'trace', 'trainable_parameters', 'tune', 'visualize',
]

"""Reading the text that a text-to-image model is told: a T5 encoder with its tokenizer, through transformers."""
import os
from typing import Any, List, Sequence, Tuple, Union

import torch
from torch import nn

from vishub.errors import InputError, import_extra

__all__ = ['TextEncoder', 'load_text_encoder']


class TextEncoder(nn.Module):
    """Texts -> features of their tokens.

    Args:
        tokenizer: A tokenizer of transformers.
        encoder: Its T5 encoder.
        max_tokens: Tokens to which texts are cut or padded.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, max_tokens: int) -> None:
        super().__init__()
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tuple[torch.Tensor, torch.Tensor]:
        """B texts -> features float32 (B, max_tokens, D), and bool (B, max_tokens), False at padding."""
        tokens = self.tokenizer(
            list(texts), max_length=self.max_tokens, padding='max_length', truncation=True, return_tensors='pt')
        device = next(self.encoder.parameters()).device
        mask = tokens['attention_mask'].to(device)
        features: Any = self.encoder(input_ids=tokens['input_ids'].to(device), attention_mask=mask)
        return features.last_hidden_state.float(), mask.bool()

    def too_long(self, texts: Sequence[str]) -> List[str]:
        """Those of the texts that are cut."""
        return [text for text in texts if len(self.tokenizer(text)['input_ids']) > self.max_tokens]


def load_text_encoder(source: Union[str, os.PathLike], max_tokens: int) -> TextEncoder:
    """Load a T5 encoder and its tokenizer.

    Args:
        source: A folder as transformers saves it, or a name on the Hub, such as DeepFloyd/t5-v1_1-xxl. Folders
            `tokenizer` and `text_encoder` inside it, as diffusers stores them, are found.
        max_tokens: Tokens to which texts are cut or padded.

    Raises:
        InputError: If nothing of the kind lies there.
        MissingExtraError: If transformers is not installed.
    """
    transformers = import_extra('transformers', 'generate')
    source = os.fspath(source)
    parts = [os.path.join(source, part) for part in ('tokenizer', 'text_encoder')]
    places = parts if all(map(os.path.isdir, parts)) else [source, source]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(places[0])
        encoder = transformers.T5EncoderModel.from_pretrained(places[1])
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no T5 encoder could be loaded from '{source}': {reason}") from error
    return TextEncoder(tokenizer, encoder, max_tokens)

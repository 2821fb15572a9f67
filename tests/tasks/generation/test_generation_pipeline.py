"""The pipeline of generation: what it takes, what it gives, what it refuses."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vishub
from tests.models.test_dit import tiny
from tests.models.test_lit import tiny_text
from vishub import InputError
from vishub.models.lit import LinearDiffusionTransformer
from vishub.tasks.generation.pipeline import GenerationPipeline, picture_grid

NAMES = ('boot', 'Bag', 'shirt', 'coat', 'dress')


def pixels(**kwargs):
    """A tiny model of grey pixels, with bounded outputs so that the pictures differ."""
    model = tiny(LinearDiffusionTransformer, in_chans=1, img_size=8, **kwargs)
    return GenerationPipeline(model, 'cpu', class_names=NAMES)


def arrays(result):
    return np.stack([np.asarray(picture) for picture in result.pictures])


@pytest.fixture(scope='module')
def pipe():
    return pixels()


def test_a_seed_is_a_picture(pipe):
    options = dict(num_inference_steps=3, num_images=3)
    first = arrays(pipe('boot', seed=4, **options))
    assert first.shape == (3, 8, 8) and first.dtype == np.uint8
    np.testing.assert_array_equal(arrays(pipe('boot', seed=4, **options)), first)
    assert not np.array_equal(first[0], first[1])
    alone = pipe(0, seed=5, num_inference_steps=3, num_images=1)
    assert alone.seeds == (5,)
    # in another batch, up to the rounding of sums
    assert np.abs(arrays(alone)[0].astype(int) - first[1]).max() <= 1
    assert not np.array_equal(arrays(pipe('Bag', seed=4, **options)), first)


@pytest.mark.parametrize('solver', ['ddim', 'ddpm'])
def test_other_solvers_keep_to_the_seed(pipe, solver):
    first, second = (arrays(pipe(1, num_images=2, num_inference_steps=4, solver=solver)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    torch.rand(5)  # nothing of it comes from the global generator
    np.testing.assert_array_equal(arrays(pipe(1, num_images=2, num_inference_steps=4, solver=solver)), first)


def test_a_list_gives_a_list_in_order(pipe):
    results = pipe(['coat', 1, '2'], num_images=2, num_inference_steps=2, seed=1, batch_size=4)
    assert [(result.prompt, result.index) for result in results] == [('coat', 3), ('Bag', 1), ('shirt', 2)]
    single = pipe(1, num_images=2, num_inference_steps=2, seed=1)
    assert np.abs(arrays(results[1]).astype(int) - arrays(single)).max() <= 1
    assert pipe([]) == []


def test_guidance_one_is_the_model_itself(pipe):
    calls = []
    handle = pipe.model.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    try:
        pipe(0, num_images=1, num_inference_steps=2, guidance_scale=1)
        pipe(0, num_images=1, num_inference_steps=2, guidance_scale=2.5)
    finally:
        handle.remove()
    assert calls == [1, 1, 2, 2]


def test_progress_preview_and_frames(pipe):
    seen, told = [], []
    result = pipe(
        2, num_images=3, num_inference_steps=4, frames=2, batch_size=2,
        callback=lambda done, total, pictures: seen.append((done, total, len(pictures), pictures[0].size)),
        progress=lambda done, total: told.append((done, total)))
    assert seen == [(done, 8, 2 if done <= 4 else 1, (8, 8)) for done in range(1, 9)]
    assert told == [(done, 8) for done in range(9)]
    assert [len(frame) for frame in result.frames] == [3, 3]
    assert not np.array_equal(np.asarray(result.frames[0][0]), np.asarray(result.pictures[0]))


def test_an_exception_in_progress_stops_the_work(pipe):
    class Enough(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Enough

    with pytest.raises(Enough):
        pipe(0, num_images=1, num_inference_steps=50, progress=stop)


def test_saved_files(pipe, tmp_path):
    result = pipe(0, num_images=4, num_inference_steps=3, frames=2)
    with Image.open(result.save(tmp_path / 'a.gif')) as gif:
        assert gif.n_frames == 3 and gif.format == 'GIF'
    facts = json.loads(result.save(tmp_path / 'a.json').read_text())
    assert facts['prompt'] == 'boot' and facts['seeds'] == [0, 1, 2, 3] and facts['num_inference_steps'] == 3
    with Image.open(result.save(tmp_path / 'a.png')) as png:
        assert png.width > 2 * 112 and png.height > 2 * 112
    assert result.suffixes == ('.png', '.json', '.gif')
    plain = pipe(0, num_images=1, num_inference_steps=2)
    assert plain.suffixes == ('.png', '.json')
    with pytest.raises(InputError, match='frames=12'):
        plain.save(tmp_path / 'b.gif')
    assert not (tmp_path / 'b.gif').exists()


def test_the_grid_shows_every_picture_once():
    pictures = [Image.new('L', (28, 28), 40 * number) for number in range(5)]
    grid = np.asarray(picture_grid(pictures, columns=3))
    assert grid.shape == (2 * 112 + 2, 3 * 112 + 4, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        assert (grid[row * 114:row * 114 + 112, column * 114:column * 114 + 112] == 40 * number).all()


@pytest.mark.parametrize('options, words', [
    (dict(prompt=5), 'no class 5: give an index from 0 to 4'),
    (dict(prompt=-1), '0 to 4'),
    (dict(prompt='hat'), "'hat' is no class .* boot, Bag, shirt"),
    (dict(prompt=1.5), 'index'),
    (dict(prompt=True), 'index'),
    (dict(prompt=0, num_inference_steps=1), '2 to 1000'),
    (dict(prompt=0, num_inference_steps=1001), '2 to 1000'),
    (dict(prompt=0, guidance_scale=-0.5), 'guidance_scale is -0.5: give 1'),
    (dict(prompt=0, guidance_scale=float('nan')), 'guidance_scale is nan'),
    (dict(prompt=0, num_images=0), 'num_images is 0'),
    (dict(prompt=0, seed=-3), 'seed is -3'),
    (dict(prompt=0, frames=-1), 'frames is -1'),
    (dict(prompt=0, batch_size=0), 'batch_size is 0'),
    (dict(prompt=0, height=9), 'height is 9: give a multiple of 2 .* as 8'),
    (dict(prompt=0, width=16), 'dynamic_img_size=True'),
    (dict(prompt=0, solver='euler'), 'dpm\\+\\+, ddim, ddpm'),
])
def test_refusals(pipe, options, words):
    with pytest.raises(InputError, match=words):
        pipe(**options)


def test_other_sizes_where_the_model_takes_them():
    result = pixels(dynamic_img_size=True)(0, num_images=1, num_inference_steps=2, height=6, width=12)
    assert result.pictures[0].size == (12, 6)


def test_a_model_that_never_missed_a_label_cannot_be_guided():
    pipe = pixels(class_drop_rate=0.)
    with pytest.raises(InputError, match='guidance_scale=1'):
        pipe(0, num_inference_steps=2)
    assert len(pipe(0, num_inference_steps=2, guidance_scale=1, num_images=1).pictures) == 1


def test_classifiers_and_broken_weights_are_refused():
    with pytest.raises(InputError, match='does not generate'):
        GenerationPipeline(nn.Linear(2, 2), 'cpu')
    pipe = pixels()
    with torch.no_grad():
        pipe.model.final.linear.bias.fill_(float('nan'))
    with pytest.raises(InputError, match='not finite'):
        pipe(0, num_inference_steps=2)


def test_found_by_its_task():
    assert isinstance(vishub.pipeline('generation', tiny(in_chans=1), 'cpu'), GenerationPipeline)


# ---- latents and texts ------------------------------------------------------------------------------------------


def tiny_vae():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, layers_per_block=1)


def test_latents_go_through_an_autoencoder_of_a_folder(tmp_path):
    model = tiny(num_classes=5)
    with pytest.raises(InputError, match='give vae='):
        GenerationPipeline(model, 'cpu')(0, num_inference_steps=2)
    with pytest.raises(InputError, match='AutoencoderKL'):
        GenerationPipeline(model, 'cpu', vae=tmp_path)
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    pipe = GenerationPipeline(model, 'cpu', vae=tmp_path)
    assert pipe.latent and pipe.picture_size == (16, 16)
    previews = []
    result = pipe(
        0, num_images=2, num_inference_steps=2, frames=1,
        callback=lambda done, total, pictures: previews.append(pictures[0]))
    assert result.pictures[0].size == (16, 16) and result.pictures[0].mode == 'RGB'
    assert result.frames[0][0].size == (16, 16) and previews[0].size == (8, 8)
    with pytest.raises(InputError, match='multiple of 4'):
        pipe(0, height=18)


class Letters:
    """A stand-in for a text encoder: features are the letters."""

    def to(self, device):
        return self

    def __call__(self, texts):
        features, mask = torch.zeros(len(texts), 6, 12), torch.zeros(len(texts), 6, dtype=torch.bool)
        for row, text in enumerate(texts):
            for place, letter in enumerate(text[:6]):
                features[row, place, ord(letter) % 12] = 3.
                mask[row, place] = True
        return features, mask

    def too_long(self, texts):
        return [text for text in texts if len(text) > 6]


def test_texts_make_pictures():
    model = tiny_text()
    with pytest.raises(InputError, match='needs text_encoder='):
        GenerationPipeline(model, 'cpu', vae=tiny_vae())('a cat')
    pipe = GenerationPipeline(model, 'cpu', vae=tiny_vae(), text_encoder=Letters())
    assert pipe.takes_text
    cat, dog = pipe(['cat', 'dog'], num_images=1, num_inference_steps=2)
    assert cat.prompt == 'cat' and cat.index is None and cat.guidance_scale == 4.5 and not cat.warnings
    assert not np.array_equal(arrays(cat), arrays(dog))
    np.testing.assert_array_equal(arrays(pipe('cat', num_images=1, num_inference_steps=2, batch_size=1)), arrays(cat))
    assert 'cut after 6 tokens' in pipe('elephants', num_images=1, num_inference_steps=2).warnings[0]
    with pytest.raises(InputError, match='give a sentence'):
        pipe(3)
    with pytest.raises(InputError, match='takes classes'):
        GenerationPipeline(tiny(in_chans=1), 'cpu', text_encoder=Letters())


def test_a_t5_of_a_folder(tmp_path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from vishub.tasks.generation.text import load_text_encoder
    with pytest.raises(InputError, match='no T5 encoder'):
        load_text_encoder(tmp_path, 6)
    words = {word: number for number, word in enumerate(['<pad>', '</s>', '<unk>', 'a', 'cat', 'dog'])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>',
    ).save_pretrained(tmp_path / 'tokenizer')
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=6, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / 'text_encoder')
    encoder = load_text_encoder(tmp_path, 6)
    features, mask = encoder(['a cat', 'a dog a cat'])
    assert features.shape == (2, 6, 12) and mask.tolist() == [[True] * 2 + [False] * 4, [True] * 4 + [False] * 2]
    torch.testing.assert_close(encoder(['a cat'])[0][0, :2], features[0, :2])
    assert encoder.too_long(['a cat', 'a a a a a a a']) == ['a a a a a a a']
    pipe = GenerationPipeline(tiny_text(), 'cpu', vae=tiny_vae(), text_encoder=tmp_path)
    assert len(pipe('a cat', num_images=1, num_inference_steps=2).pictures) == 1

"""Generation: a class or a sentence in, pictures out; the same seed gives the same pictures on every run."""
import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image, ImageDraw
from torch import nn

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.models.dit import DiffusionTransformer
from vishub.tasks import drawing
from vishub.tasks.base import Pipeline, Progress, Result, pretrained_cfg_of
from vishub.tasks.generation.data import to_pixels
from vishub.tasks.generation.sampling import check_steps, draw_noise, make_scheduler, sampling_steps

__all__ = ['GenerationPipeline', 'GenerationResult', 'load_autoencoder', 'picture_grid']

# (steps done, steps in all, the pictures of this batch as the model guesses them now)
PreviewCallback = Callable[[int, int, List[Image.Image]], None]
ClassOrText = Union[int, str]


@dataclass(frozen=True, eq=False)
class GenerationResult(Result):
    """Pictures of one class or sentence.

    Attributes:
        pictures: RGB or grey, one a seed.
        prompt: Name of the class, or the text.
        index: Index of the class; None for text.
        seeds: Each makes its picture again, alone or beside others.
        frames: Moments of the denoising, from noise on, each with all pictures; empty if they were not asked for.
        model: Name of the model.
        num_params: Its parameters.
        num_inference_steps, guidance_scale, solver: As asked for.
        latency_ms: Milliseconds of sampling and decoding, divided by the pictures that were made together.
    """
    pictures: Tuple[Image.Image, ...] = field(repr=False)
    prompt: str
    index: Optional[int]
    seeds: Tuple[int, ...]
    frames: Tuple[Tuple[Image.Image, ...], ...] = field(repr=False)
    model: str
    num_params: int
    num_inference_steps: int
    guidance_scale: float
    solver: str
    latency_ms: float
    warnings: Tuple[str, ...] = ()

    @property
    def suffixes(self) -> Tuple[str, ...]:  # type: ignore[override]  # depends on what was asked for
        return ('.png', '.json', '.gif') if self.frames else ('.png', '.json')

    def to_dict(self) -> Dict[str, Any]:
        """All but the pixels."""
        return {
            'model': self.model,
            'prompt': self.prompt,
            'index': self.index,
            'seeds': list(self.seeds),
            'width': self.pictures[0].width,
            'height': self.pictures[0].height,
            'num_inference_steps': self.num_inference_steps,
            'guidance_scale': self.guidance_scale,
            'solver': self.solver,
            'latency_ms': round(self.latency_ms, 3),
            'num_params': self.num_params,
            'warnings': list(self.warnings),
        }

    def summary(self) -> Sequence[str]:
        seeds = f'seed {self.seeds[0]}' if len(self.seeds) == 1 else f'seeds {self.seeds[0]} to {self.seeds[-1]}'
        return [
            f'{len(self.pictures)} picture(s) of {self.prompt}, {seeds}, {self.num_inference_steps} steps of '
            f'{self.solver}, guidance {self.guidance_scale:g}, {self.latency_ms:.0f} ms each']

    def plot(self) -> Image.Image:
        """The pictures as a grid under a line that says what they are."""
        grid = picture_grid(self.pictures)
        margin, header = 16, 48
        canvas = Image.new('RGB', (max(grid.width, 320) + 2 * margin, grid.height + header + margin), drawing.PAPER)
        draw = ImageDraw.Draw(canvas)
        facts = f'{self.model}, {self.num_inference_steps} steps, seed {self.seeds[0]}'
        small = drawing.font(13)
        draw.text(
            (margin, 7), drawing.elide(self.prompt, drawing.font(18), canvas.width - 2 * margin), fill=drawing.INK,
            font=drawing.font(18))
        draw.text((margin, 30), drawing.elide(facts, small, canvas.width - 2 * margin), fill=drawing.MUTED, font=small)
        canvas.paste(grid, (margin, header))
        return canvas

    def gif(self) -> bytes:
        """The denoising as an animated GIF: the kept moments, each as a grid, and the pictures."""
        moments = [picture_grid(frame) for frame in (*self.frames, self.pictures)]
        durations = [140] * (len(moments) - 1) + [1800]  # milliseconds; the last one is what one wants to look at
        buffer = io.BytesIO()
        moments[0].save(buffer, 'GIF', save_all=True, append_images=moments[1:], duration=durations, loop=0)
        return buffer.getvalue()

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """As `Result.save`; `.gif` writes the denoising, which needs `frames`.

        Raises:
            InputError: If a GIF is asked for and no frames were kept.
        """
        path = Path(path)
        if path.suffix.lower() != '.gif':
            return super().save(path)
        if not self.frames:
            raise InputError(f"'{path}' needs the moments of the denoising: ask for them, as frames=12")
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.gif())
        return path


def picture_grid(pictures: Sequence[Image.Image], columns: Optional[int] = None) -> Image.Image:
    """Pictures of one size side by side, RGB; small ones are enlarged by a whole factor, so that pixels stay square.

    Args:
        pictures: At least one.
        columns: Pictures a row; by default as many as make the grid nearly square, at most 8.
    """
    columns = columns or min(8, max(1, round(len(pictures) ** 0.5 + 0.49)))
    columns = min(columns, len(pictures))
    factor = max(1, 112 // max(pictures[0].size))
    width, height, gap = pictures[0].width * factor, pictures[0].height * factor, 2
    rows = -(-len(pictures) // columns)
    grid = Image.new('RGB', (columns * (width + gap) - gap, rows * (height + gap) - gap), drawing.PAPER)
    for number, picture in enumerate(pictures):
        enlarged = picture.convert('RGB').resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (number % columns * (width + gap), number // columns * (height + gap)))
    return grid


def load_autoencoder(source: Union[str, os.PathLike, nn.Module]) -> nn.Module:
    """diffusers' AutoencoderKL, frozen: between pictures and the latents that a model makes.

    Args:
        source: Folder with its `config.json` and weights, name on the Hub, or the module itself.

    Raises:
        InputError: If nothing of the kind lies there.
        MissingExtraError: If diffusers is not installed.
    """
    if isinstance(source, nn.Module):
        return source
    diffusers = import_extra('diffusers', 'generate')
    try:
        autoencoder = diffusers.AutoencoderKL.from_pretrained(os.fspath(source))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no AutoencoderKL could be loaded from '{source}': {reason}") from error
    return autoencoder.eval().requires_grad_(False)


class GenerationPipeline(Pipeline):
    """Make pictures with a denoiser of vishub.

        pipe = GenerationPipeline('lit_small28.fashion_mnist')
        pipe('Sneaker', num_images=4, seed=7).save('sneakers.png')

    Models of latents (four channels) need a VAE, models of text a text encoder, too; neither comes with vishub. Of
    the model of text no trained weights exist: not ours, and none of its authors that we could find.

    Args:
        model: See `Pipeline`.
        device: See `Pipeline`.
        vae: AutoencoderKL for a model of latents: folder, Hub name or module.
        text_encoder: For a model of text: folder or Hub name of a T5 encoder with its tokenizer, or a
            `text.TextEncoder`.
        class_names: Names of the classes; by default those that came with the weights.

    Raises:
        InputError: If the model does not generate pictures, or as `Pipeline` says.

    Attributes:
        class_names: In the order of the labels; None if they are not known.
        takes_text: Whether the model is told what to make by a text.
        latent: Whether it makes latents.
        picture_size: (height, width) in pixels of the pictures that it makes by default.
    """

    task = 'generation'
    default_model = 'lit_small28.fashion_mnist'
    takes_pictures = False
    model: Any

    def __init__(
            self,
            model: Union[str, nn.Module, None] = None,
            device: Union[str, torch.device, None] = None,
            vae: Union[str, os.PathLike, nn.Module, None] = None,
            text_encoder: Any = None,
            class_names: Optional[Sequence[str]] = None,
    ):
        super().__init__(model, device)
        if not isinstance(self.model, DiffusionTransformer):
            raise InputError(f"'{self.name}' does not generate pictures: give a model of the task generation")
        self.takes_text = hasattr(self.model, 'caption_embed')
        self.latent = self.model.in_chans not in (1, 3)
        self.autoencoder: Any = load_autoencoder(vae).to(self.device) if vae is not None else None
        self.text_encoder = text_encoder
        if text_encoder is not None and not self.takes_text:
            raise InputError(f"'{self.name}' takes classes, not texts: leave text_encoder out")
        if isinstance(text_encoder, (str, os.PathLike)):
            from vishub.tasks.generation.text import load_text_encoder
            max_tokens: Any = self.model.max_tokens
            self.text_encoder = load_text_encoder(text_encoder, max_tokens).to(self.device)
        self.class_names = class_names or pretrained_cfg_of(self.model).get('label_names')
        self.latent_scale = 8 if self.latent else 1
        if self.autoencoder is not None:
            config: Any = self.autoencoder.config
            self.latent_scale = 2 ** (len(config.block_out_channels) - 1)
        height, width = self.model.img_size
        self.picture_size = (height * self.latent_scale, width * self.latent_scale)

    def __call__(
            self,
            prompt: Union[ClassOrText, Sequence[ClassOrText]],
            num_images: int = 4,
            num_inference_steps: int = 25,
            guidance_scale: Optional[float] = None,
            seed: int = 0,
            solver: str = 'dpm++',
            height: Optional[int] = None,
            width: Optional[int] = None,
            frames: int = 0,
            batch_size: int = 16,
            callback: Optional[PreviewCallback] = None,
            progress: Optional[Progress] = None,
    ) -> Union[GenerationResult, List[GenerationResult]]:
        """Make pictures of one class or text, or of each in a list.

        Args:
            prompt: Index or name of a class, or a text for a model of text; a list gives a list of results.
            num_images: Pictures of each.
            num_inference_steps: Steps of the solver.
            guidance_scale: Classifier-free guidance: 1 is none, more is more typical and less varied; by default
                2 for classes, 4.5 for text.
            seed: Picture i of each prompt is drawn from seed + i: the same one at every call and in every batch
                (up to the rounding of sums, which the batch's size may change), on every device.
            solver: `dpm++` (few steps), `ddim`, or `ddpm` (many steps; uses the learned variance).
            height, width: In pixels; the model's own size by default. Another one needs a model that was built with
                dynamic_img_size=True.
            frames: Keep so many moments of the denoising, for a GIF.
            batch_size: Pictures made at once.
            callback: Called after every step with (steps done, steps in all, this batch's pictures as guessed now).
            progress: Called with (steps done, steps in all), first with 0.

        Raises:
            InputError: If an option is out of range, a class is unknown, or a VAE or text encoder is missing.
            MissingExtraError: If diffusers is not installed.
        """
        several = isinstance(prompt, (list, tuple))
        prompts: List[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        guidance = guidance_scale if guidance_scale is not None else 4.5 if self.takes_text else 2.
        self._check(num_images, guidance, seed, frames, batch_size)
        check_steps(solver, num_inference_steps)
        size = self._latent_size(height, width)
        named = [self._named(item) for item in prompts]  # before any work
        warnings: Tuple[str, ...] = ()
        if self.takes_text and hasattr(self.text_encoder, 'too_long'):
            warnings = tuple(
                f"the text '{text[:40]} …' is cut after {self.model.max_tokens} tokens"
                for text in self.text_encoder.too_long([name for name, _ in named]))
        if not prompts:
            return []
        if self.latent and self.autoencoder is None:
            raise InputError(
                f"'{self.name}' makes latents: give vae=, the folder or Hub name of an AutoencoderKL, to see pictures")
        jobs = [(which, seed + number) for which in range(len(prompts)) for number in range(num_images)]
        batches = -(-len(jobs) // batch_size)
        total, done = batches * num_inference_steps, 0
        if progress is not None:
            progress(0, total)
        keep = {round((i + 1) * num_inference_steps / (frames + 1)) for i in range(frames)}
        pictures: List[Image.Image] = []
        moments: List[List[Image.Image]] = [[] for _ in keep]
        start = time.perf_counter()
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first:first + batch_size]
            noise, generators = draw_noise((self.model.in_chans, *size), [own for _, own in batch])
            denoise = self._denoiser([named[which] for which, _ in batch], guidance)
            scheduler = make_scheduler(
                solver, num_inference_steps, learn_sigma=self.model.learn_sigma, clip=not self.latent)
            x = noise.to(self.device)
            kept = []
            for state in sampling_steps(denoise, x, scheduler, generators, clip=not self.latent):
                x, done = state.x, done + 1
                if state.step in keep:
                    kept.append(x)
                if callback is not None:
                    callback(done, total, self._preview(state.x_start))
                if progress is not None:
                    progress(done, total)
            if not x.isfinite().all():
                raise InputError(f"'{self.name}' made values that are not finite: its weights are damaged")
            pictures += self._decode(x)
            for moment, frame in zip(moments, kept):
                moment += self._decode(frame)
        latency_ms = (time.perf_counter() - start) * 1000 / len(jobs)
        results = []
        for which, (name, index) in enumerate(named):
            own = slice(which * num_images, (which + 1) * num_images)
            results.append(GenerationResult(
                pictures=tuple(pictures[own]), prompt=name, index=index,
                seeds=tuple(own_seed for _, own_seed in jobs[own]),
                frames=tuple(tuple(moment[own]) for moment in moments),
                model=self.name, num_params=self.num_params, num_inference_steps=num_inference_steps,
                guidance_scale=guidance, solver=solver, latency_ms=latency_ms, warnings=warnings))
        return results if several else results[0]

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check(self, num_images: int, guidance: float, seed: int, frames: int, batch_size: int) -> None:
        for name, value in (('num_images', num_images), ('batch_size', batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f'{name} is {value}: give a whole number, 1 or more')
        if not isinstance(frames, int) or frames < 0:
            raise InputError(f'frames is {frames}: give a whole number, 0 or more')
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2 ** 63 - num_images:
            raise InputError(f'seed is {seed}: give a whole number from 0 to {2 ** 63 - num_images - 1}')
        if isinstance(guidance, (str, bytes)) or not 0 <= guidance < float('inf'):
            raise InputError(f'guidance_scale is {guidance}: give 1 for none, or more, as 2; nothing below 0')
        if guidance != 1 and not self.takes_text and not self.model.class_drop_rate:
            raise InputError(
                f"'{self.name}' was trained without dropping labels, so it cannot be guided: give guidance_scale=1")

    def _latent_size(self, height: Optional[int], width: Optional[int]) -> Tuple[int, int]:
        """Height and width of x."""
        step = self.model.patch_size * self.latent_scale
        sizes = (height or self.picture_size[0], width or self.picture_size[1])
        for name, value in zip(('height', 'width'), sizes):
            if value < 1 or value % step:
                right = max(step, round(value / step) * step)
                raise InputError(f'{name} is {value}: give a multiple of {step} (the patch in pixels), as {right}')
        if sizes != self.picture_size and not self.model.dynamic_img_size:
            raise InputError(
                f"'{self.name}' makes pictures of {self.picture_size[1]}x{self.picture_size[0]} pixels; "
                'build it with dynamic_img_size=True for other sizes')
        return sizes[0] // self.latent_scale, sizes[1] // self.latent_scale

    def _named(self, prompt: ClassOrText) -> Tuple[str, Optional[int]]:
        """(name, index) of a class; (text, None) for a model of text."""
        if self.takes_text:
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"'{self.name}' makes what a text says: give a sentence, not {prompt!r}")
            if self.text_encoder is None:
                raise InputError(
                    f"'{self.name}' needs text_encoder=, the folder or Hub name of a T5 encoder, to read a text")
            return prompt, None
        names, count = self.class_names, self.model.num_classes
        span = f'0 to {count - 1}' + (f' ({names[0]} to {names[-1]})' if names else '')
        index: Any = prompt
        if isinstance(prompt, str):
            wanted = prompt.strip().casefold()
            found = [number for number, name in enumerate(names or ()) if name.casefold() == wanted]
            if found:
                index = found[0]
            elif wanted.lstrip('-').isdigit():
                index = int(wanted)
            elif names:
                raise InputError(f"'{prompt}' is no class of '{self.name}': give one of {', '.join(names)}, or {span}")
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"'{self.name}' takes classes: give an index from {span}, not {prompt!r}")
        if not 0 <= index < count:
            raise InputError(f"'{self.name}' has no class {index}: give an index from {span}")
        return (names[index] if names else f'class {index}'), index

    # -- work ---------------------------------------------------------------------------------------------------------

    def _denoiser(self, named: List[Tuple[str, Optional[int]]], guidance: float) -> Callable[..., torch.Tensor]:
        """The model under guidance, for the prompts of one batch."""
        model = self.model
        if self.takes_text:
            captions, mask = (part.to(self.device) for part in self.text_encoder([name for name, _ in named]))
            if guidance == 1:
                return lambda x, t: model(x, t, captions, mask)
            return lambda x, t: model.forward_with_cfg(x, t, captions, guidance, mask)
        y = torch.tensor([index for _, index in named], device=self.device)
        if guidance == 1:
            return lambda x, t: model(x, t, y)
        both = torch.cat([y, torch.full_like(y, model.num_classes)])
        return lambda x, t: model.forward_with_cfg(torch.cat([x, x]), t, both, guidance)[:len(x)]

    @torch.inference_mode()
    def _decode(self, x: torch.Tensor) -> List[Image.Image]:
        if self.autoencoder is not None and self.latent:
            config = self.autoencoder.config
            latents = x / config.scaling_factor + (getattr(config, 'shift_factor', None) or 0.)
            # one by one: at full size a decoder takes more memory than the denoiser
            x = torch.cat([self.autoencoder.decode(one[None]).sample for one in latents])
        return _images(x)

    def _preview(self, x_start: torch.Tensor) -> List[Image.Image]:
        """Pixels as they are; of latents the first three channels, in false colours: decoding would cost a step."""
        if self.latent:
            x_start = x_start[:, :3] / x_start[:, :3].abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        return _images(x_start)


def _images(x: torch.Tensor) -> List[Image.Image]:
    return [Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels) for pixels in to_pixels(x)]

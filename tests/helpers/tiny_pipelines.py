"""Eight real diffusers pipelines with tiny random weights, built in memory without any download.

``ALL[name]()`` builds one; ``generate(tiny, seeds=(0, 1))`` runs it. Weights depend on the seed
only, and every module is in eval mode: the dropout of T5 would make two equal calls differ. Widths
are multiples of 16 in at least two blocks, so that group-wise quantization has something to do.
"""

from __future__ import annotations

import functools
import itertools
import os
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported

import diffusers as d
import torch
import transformers as tf
from torch import Tensor

#: Pipelines that do not run end to end after ``pipe.to(torch.bfloat16)`` on CPU, and why.
NO_BFLOAT16: dict[str, str] = {}

PROMPTS = ("a cat on a mat", "two dogs in the rain")
WIDTH = 32  # of every transformer, and of every text encoder unless stated
TOKENS = 32  # prompt length of the pipelines that let us choose

_BLOCKS = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": WIDTH // 4}
_LATENT = {"in_channels": 4, "out_channels": 4}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_PLAIN = {"use_resolution_binning": False, "clean_caption": False}

_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
_PROJECTED = tf.CLIPTextModelWithProjection
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline and what a test must know to call it and to read its latents.

    ``call`` holds the keyword arguments besides prompt, generator, number of steps and guidance.
    ``latent_channels`` counts channels of the autoencoder, ``channel_axis`` is the axis they lie
    on in the tensor that enters ``scheduler.step``. The latents of FLUX are packed: the last axis
    holds 4 channels times the 2 x 2 patch, channel = index // 4.
    """

    name: str
    pipe: Any
    call: dict[str, Any]
    guidance_scale: float
    denoiser: str
    latent_channels: int
    channel_axis: int
    prompts: tuple[Any, Any] = PROMPTS

    @property
    def model(self) -> torch.nn.Module:
        return getattr(self.pipe, self.denoiser)


def generate(
    tiny: TinyPipeline,
    *,
    steps: int = 4,
    seeds: Sequence[int] = (0,),
    prompts: Sequence[Any] | None = None,
    **extra: Any,
) -> Tensor:
    """One sample per seed, each with its own generator: final latents (DiT: images in [0, 1]).

    Without ``prompts`` those of ``tiny`` are dealt out in turn. ``extra`` wins over ``tiny.call``.
    """
    if prompts is None:
        prompts = tuple(itertools.islice(itertools.cycle(tiny.prompts), len(seeds)))
    if len(prompts) != len(seeds):
        raise ValueError(f"Got {len(prompts)} prompts for {len(seeds)} seeds: give one per seed.")
    arguments: dict[str, Any] = {
        **tiny.call,
        "guidance_scale": tiny.guidance_scale,
        "num_inference_steps": steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "return_dict": False,
        **extra,
    }
    return tiny.pipe(list(prompts), **arguments)[0]


def _seeded(build: Callable[[], TinyPipeline]) -> Callable[..., TinyPipeline]:
    """Draw the weights from ``seed``, switch dropout off everywhere, silence the progress bar."""

    @functools.wraps(build)
    def built(seed: int = 0) -> TinyPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tiny = build()
        for component in tiny.pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        tiny.pipe.set_progress_bar_config(disable=True)
        return tiny

    return built


# ---- text: encoder and tokenizer, one token per character, no merges


def _numbered(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _clip(kind: type) -> tuple[Any, Any]:
    pieces = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tf.CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=77)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
    config = tf.CLIPTextConfig(vocab_size=len(tokenizer), **ids, **sizes, **heads)
    return kind(config), tokenizer


def _t5(width: int = WIDTH, config: Any = tf.T5Config, kind: Any = tf.T5EncoderModel) -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = special + [(character, -3.0) for character in _CHARACTERS]
    tokenizer = tf.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4}
    encoder_only = {"is_encoder_decoder": False, "use_cache": False}
    return kind(config(vocab_size=len(tokenizer), **sizes, **encoder_only)), tokenizer


def _gemma() -> tuple[Any, Any]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_CHARACTERS, "\n", " "]
    tokenizer = tf.GemmaTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=300)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.Gemma2Config(vocab_size=len(tokenizer), **sizes, **heads)
    return tf.Gemma2Model(config), tokenizer


# ---- autoencoders: 4 latent channels each


def _kl(**extra: Any) -> Any:
    """Twice smaller in height and width."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 1, "sample_size": 32}
    return d.AutoencoderKL(down_block_types=down, up_block_types=up, **sizes, **extra)


def _kl_flow() -> Any:
    """The autoencoder of the flow models: latents are shifted, and nothing is convolved twice."""
    scale = {"shift_factor": 0.0609, "scaling_factor": 1.5035}
    return _kl(use_quant_conv=False, use_post_quant_conv=False, **scale)


def _dc() -> Any:
    """Twice smaller in height and width, the deep-compression kind of Sana."""
    sizes: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 2}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_block_types"] = ("ResBlock", "EfficientViTBlock")
        sizes[f"{side}_block_out_channels"] = (8, 8)
        sizes[f"{side}_layers_per_block"] = (1, 1)
        sizes[f"{side}_qkv_multiscales"] = ((), (5,))
    return d.AutoencoderDC(downsample_block_type="conv", **sizes)


def _kl_wan() -> Any:
    """Eight times smaller in height and width, four times in time."""
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return d.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **scale)


def _kl_cogvideox() -> Any:
    """Four times smaller in height, width and time."""
    down, up = ("CogVideoXDownBlock3D",) * 3, ("CogVideoXUpBlock3D",) * 3
    sizes = {"block_out_channels": (8, 8, 8), "latent_channels": 4, "norm_num_groups": 2}
    return d.AutoencoderKLCogVideoX(down_block_types=down, up_block_types=up, **sizes)


# ---- pipelines


def _call(side: int, **extra: Any) -> dict[str, Any]:
    text = {"max_sequence_length": TOKENS}
    return {"height": side, "width": side, "output_type": "latent", **text, **extra}


def _sdxl_unet() -> Any:
    # Text reaches it as both encoders side by side, and pooled together with six sizes and crops.
    text = {"cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time"}
    text |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    return d.UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        **sizes,
        **text,
    )


@_seeded
def sdxl() -> TinyPipeline:
    encoders, tokenizers = zip(*map(_clip, (tf.CLIPTextModel, _PROJECTED)), strict=True)
    scheduler = d.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **_SD_BETAS)
    parts = (_kl(), *encoders, *tokenizers, _sdxl_unet(), scheduler)
    pipe = d.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    call = {"height": 32, "width": 32, "output_type": "latent"}
    return TinyPipeline("sdxl", pipe, call, 5.0, "unet", 4, 1)


@_seeded
def flux() -> TinyPipeline:
    sizes = {"num_single_layers": 2, "in_channels": 16, "axes_dims_rope": (2, 2, 4)}
    text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
    transformer = d.FluxTransformer2DModel(guidance_embeds=True, **sizes, **text, **_BLOCKS)
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = d.FluxPipeline(scheduler, _kl_flow(), *_clip(tf.CLIPTextModel), *_t5(), transformer)
    return TinyPipeline("flux", pipe, _call(32), 3.5, "transformer", 4, 2)


@_seeded
def pixart_sigma() -> TinyPipeline:
    encoder, tokenizer = _t5()
    text = {"caption_channels": WIDTH, "cross_attention_dim": WIDTH}
    sizes = {"sample_size": 16, "in_channels": 4, "out_channels": 8}  # 4 and the learned variance
    transformer = d.PixArtTransformer2DModel(**sizes, **text, **_BLOCKS)
    scheduler = d.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2)
    pipe = d.PixArtSigmaPipeline(tokenizer, encoder, _kl(), transformer, scheduler)
    return TinyPipeline("pixart_sigma", pipe, _call(32, **_PLAIN), 4.5, "transformer", 4, 1)


@_seeded
def sana() -> TinyPipeline:
    encoder, tokenizer = _gemma()
    cross = {"num_cross_attention_heads": 4, "cross_attention_head_dim": WIDTH // 4}
    text = {"caption_channels": WIDTH, "cross_attention_dim": WIDTH}
    transformer = d.SanaTransformer2DModel(sample_size=16, **cross, **text, **_LATENT, **_BLOCKS)
    scheduler = d.DPMSolverMultistepScheduler(flow_shift=3.0, solver_order=2, **_FLOW)
    pipe = d.SanaPipeline(tokenizer, encoder, _dc(), transformer, scheduler)
    call = _call(32, complex_human_instruction=None, **_PLAIN)
    return TinyPipeline("sana", pipe, call, 4.5, "transformer", 4, 1)


@_seeded
def sd3() -> TinyPipeline:
    wide = 2 * WIDTH  # both CLIP encoders side by side; T5 must be as wide
    text = {"joint_attention_dim": wide, "pooled_projection_dim": wide}
    sizes = {"sample_size": 16, "pos_embed_max_size": 16, "caption_projection_dim": WIDTH}
    transformer = d.SD3Transformer2DModel(**sizes, **text, **_LATENT, **_BLOCKS)
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    texts = (*_clip(_PROJECTED), *_clip(_PROJECTED), *_t5(wide))
    pipe = d.StableDiffusion3Pipeline(transformer, scheduler, _kl_flow(), *texts)
    return TinyPipeline("sd3", pipe, _call(32), 5.0, "transformer", 4, 1)


@_seeded
def dit() -> TinyPipeline:
    transformer = d.DiTTransformer2DModel(sample_size=8, in_channels=4, out_channels=8, **_BLOCKS)
    scheduler = d.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = d.DiTPipeline(transformer, _kl(), scheduler, id2label={3: "three", 7: "seven"})
    # This pipeline knows no latent output; guidance doubles the rows that enter the scheduler.
    return TinyPipeline("dit", pipe, {"output_type": "pt"}, 4.0, "transformer", 4, 1, (3, 7))


@_seeded
def wan() -> TinyPipeline:
    encoder, tokenizer = _t5(WIDTH, tf.UMT5Config, tf.UMT5EncoderModel)
    sizes = {"text_dim": WIDTH, "freq_dim": WIDTH, "ffn_dim": 2 * WIDTH}
    transformer = d.WanTransformer3DModel(**sizes, **_LATENT, **_BLOCKS)
    scheduler = d.UniPCMultistepScheduler(flow_shift=5.0, **_FLOW)
    pipe = d.WanPipeline(tokenizer, encoder, _kl_wan(), scheduler, transformer)
    return TinyPipeline("wan", pipe, _call(64, num_frames=9), 5.0, "transformer", 4, 1)


@_seeded
def cogvideox() -> TinyPipeline:
    encoder, tokenizer = _t5()
    text = {"text_embed_dim": WIDTH, "max_text_seq_length": TOKENS, "time_embed_dim": 16}
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 9}
    transformer = d.CogVideoXTransformer3DModel(**text, **sizes, **_LATENT, **_BLOCKS)
    # As shipped: the first step holds no signal at all (alpha is zero).
    shipped = {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0, "clip_sample": False}
    shipped |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = d.CogVideoXDDIMScheduler(**shipped, **_SD_BETAS)
    pipe = d.CogVideoXPipeline(tokenizer, encoder, _kl_cogvideox(), transformer, scheduler)
    return TinyPipeline("cogvideox", pipe, _call(32, num_frames=9), 6.0, "transformer", 4, 2)


ALL: dict[str, Callable[..., TinyPipeline]] = {
    build.__name__: build for build in (sdxl, flux, pixart_sigma, sana, sd3, dit, wan, cogvideox)
}

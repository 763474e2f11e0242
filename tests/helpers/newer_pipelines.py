"""Tiny pipelines of newer models, with random weights: Qwen-Image, Z-Image, FLUX.2, SD 3.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import tiny_pipelines as tiny
import transformers as tf
from tiny_pipelines import WIDTH, TinyPipeline

_BLOCKS = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4}
_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _qwen_tokenizer() -> Any:
    """One token per byte."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tiny._CHARACTERS, "Ġ", "Ċ"]
    tokenizer = tf.Qwen2Tokenizer(vocab=tiny._numbered(pieces), merges=[], model_max_length=512)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


def _qwen3(kind: Any) -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    return kind(tf.Qwen3Config(**_sizes(tokenizer))), tokenizer


def _qwen_vl() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**_sizes(tokenizer), "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tf.Qwen2_5_VLForConditionalGeneration(config), tokenizer


def _flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _call(**extra: Any) -> dict[str, Any]:
    return {**tiny._call(32), **extra}


@tiny._seeded
def qwen_image() -> TinyPipeline:
    vae = d.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
        **_BLOCKS,
    )  # fmt: skip
    pipe = d.QwenImagePipeline(_flow(), vae, *_qwen_vl(), transformer)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    call = _call(true_cfg_scale=1.0)
    return TinyPipeline("qwen_image", pipe, call, None, "transformer", 4, 2)


@tiny._seeded
def z_image() -> TinyPipeline:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=WIDTH, axes_dims=[2, 2, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = d.ZImagePipeline(_flow(), tiny._kl_flow(), *_qwen3(tf.Qwen3Model), transformer)
    return TinyPipeline("z_image", pipe, _call(), 3.0, "transformer", 4, 1)


@tiny._seeded
def flux2() -> TinyPipeline:
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=1,
    )  # fmt: skip
    transformer = d.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2), **_BLOCKS,
    )  # fmt: skip
    pipe = d.Flux2KleinPipeline(_flow(), vae, *_qwen3(tf.Qwen3ForCausalLM), transformer)
    call = _call(text_encoder_out_layers=(1, 2, 3))
    return TinyPipeline("flux2", pipe, call, 4.0, "transformer", 16, 2)


@tiny._seeded
def sd35() -> TinyPipeline:
    """With a second attention in the first block, as the medium one has it."""
    found = tiny.sd3()
    config = {**found.model.config, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    transformer = d.SD3Transformer2DModel(**{k: v for k, v in config.items() if k[0] != "_"})
    found.pipe.register_modules(transformer=transformer)
    return found


NEWER: dict[str, Callable[..., TinyPipeline]] = {
    build.__name__: build for build in (qwen_image, z_image, flux2, sd35)
}
NEWER["wan"] = tiny.wan

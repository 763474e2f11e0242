"""Denoisers of diffusers as small as they come, with what enters them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=16, in_channels=4, cross_attention_dim=24, out_channels=8,
        norm_type="ada_norm_single", use_additional_conditions=True,
    ).eval()  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64,
        pooled_projection_dim=64, out_channels=4, dual_attention_layers=(0,),
    ).eval()  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8, guidance_embeds=True,
    ).eval()  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80, cross_attention_dim=16, norm_num_groups=1,
    ).eval()  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, image_dim=16,
        added_kv_proj_dim=24,
    ).eval()  # fmt: skip


def cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=8,
    ).eval()  # fmt: skip


def run_pixart(net: nn.Module) -> Tensor:
    size = torch.tensor([[64.0, 64.0]]), torch.tensor([[1.0]])
    dtype = net.dtype
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8, dtype=dtype),
            encoder_hidden_states=gaussian(1, 5, 16, seed=1, dtype=dtype),
            timestep=torch.tensor([500]),
            added_cond_kwargs={"resolution": size[0].to(dtype), "aspect_ratio": size[1].to(dtype)},
        ).sample


def run_sana(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8, dtype=net.dtype),
            encoder_hidden_states=gaussian(1, 5, 16, seed=1, dtype=net.dtype),
            timestep=torch.tensor([500]),
            guidance=torch.tensor([4.5], dtype=net.dtype),
        ).sample


def run_sdxl(net: nn.Module) -> Tensor:
    added = {"text_embeds": gaussian(1, 32, seed=2), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return net(
            gaussian(1, 4, 8, 8), 500, gaussian(1, 5, 16, seed=1), added_cond_kwargs=added
        ).sample

"""The output head of a denoiser: found in every class of diffusers, and rows that reproduce it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines as tp
import torch
from head_layers import (
    NEEDED,
    d,
    noise,
    on_meta,
    seen,
)
from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.actuators.head_rows import rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_plain, is_reordered, layer_of

# ---- every denoiser class of diffusers

EXPECTED = {
    "AllegroTransformer3DModel": "proj_out",
    "AnyFlowFARTransformer3DModel": "proj_out",
    "AnyFlowTransformer3DModel": "proj_out",
    "AudioLDM2UNet2DConditionModel": "conv_out",
    "AuraFlowTransformer2DModel": "proj_out",
    "BriaFibo2Transformer2DModel": "final_layer.linear",
    "BriaFiboTransformer2DModel": "proj_out",
    "BriaTransformer2DModel": "proj_out",
    "ChromaTransformer2DModel": "proj_out",
    "ChronoEditTransformer3DModel": "proj_out",
    "CogVideoXTransformer3DModel": "proj_out",
    "CogView3PlusTransformer2DModel": "proj_out",
    "CogView4Transformer2DModel": "proj_out",
    "ConsisIDTransformer3DModel": "proj_out",
    "CosmosTransformer3DModel": "proj_out",
    "DiTTransformer2DModel": "proj_out_2",
    "DreamLiteUNetModel": "conv_out",
    "EasyAnimateTransformer3DModel": "proj_out",
    "Flux2Transformer2DModel": "proj_out",
    "Flux3Transformer2DModel": "proj_out",
    "FluxTransformer2DModel": "proj_out",
    "GlmImageTransformer2DModel": "proj_out",
    "HeliosTransformer3DModel": "proj_out",
    "HiDreamImageTransformer2DModel": "final_layer.linear",
    "HunyuanDiT2DModel": "proj_out",
    "HunyuanImageTransformer2DModel": "proj_out",
    "HunyuanVideo15Transformer3DModel": "proj_out",
    "HunyuanVideoFramepackTransformer3DModel": "proj_out",
    "HunyuanVideoTransformer3DModel": "proj_out",
    "I2VGenXLUNet": "conv_out",
    "Ideogram4Transformer2DModel": "final_layer.linear",
    "JoyImageEditPlusTransformer3DModel": "proj_out",
    "JoyImageEditTransformer3DModel": "proj_out",
    "Kandinsky3UNet": "conv_out",
    "Kandinsky5Transformer3DModel": "out_layer.out_layer",
    "Kandinsky6SRTransformer3DModel": "out_layer.out_layer",
    "Krea2Transformer2DModel": "final_layer.linear",
    "LTXVideoTransformer3DModel": "proj_out",
    "LatteTransformer3DModel": "proj_out",
    "LongCatImageTransformer2DModel": "proj_out",
    "Lumina2Transformer2DModel": "norm_out.linear_2",
    "LuminaNextDiT2DModel": "norm_out.linear_2",
    "MochiTransformer3DModel": "proj_out",
    "MotifVideoTransformer3DModel": "proj_out",
    "NucleusMoEImageTransformer2DModel": "proj_out",
    "OmniGenTransformer2DModel": "proj_out",
    "OvisImageTransformer2DModel": "proj_out",
    "PRXTransformer2DModel": "final_layer.linear",
    "PixArtTransformer2DModel": "proj_out",
    "PriorTransformer": "proj_to_clip_embeddings",
    "QwenImage21Transformer2DModel": "proj_out",
    "QwenImageTransformer2DModel": "proj_out",
    "SD3Transformer2DModel": "proj_out",
    "SanaTransformer2DModel": "proj_out",
    "SanaVideoTransformer3DModel": "proj_out",
    "SanaWMTransformer3DModel": "final_layer.linear",
    "SkyReelsV2Transformer3DModel": "proj_out",
    "StableCascadeUNet": "clf.1",
    "T5FilmDecoder": "spec_out",
    "Transformer2DModel": "proj_out_2",
    "UNet2DConditionModel": "conv_out",
    "UNet2DModel": "conv_out",
    "UNet3DConditionModel": "conv_out",
    "UNetMotionModel": "conv_out",
    "UNetSpatioTemporalConditionModel": "conv_out",
    "WanAnimate2Transformer3DModel": "head.head",
    "WanAnimateTransformer3DModel": "proj_out",
    "WanTransformer3DModel": "proj_out",
    "WanVACETransformer3DModel": "proj_out",
    "ZImageTransformer2DModel": "all_final_layer.2-1.linear",
}
REFUSED = {
    "AceStepTransformer1DModel": "no layer",  # a transposed one-dimensional convolution
    "Cosmos3OmniTransformer": "lm_head",  # text, video, sound and action at once
    "DreamLiteTransformer2DModel": "adds its own input",
    "ErnieImageTransformer2DModel": "before the batch",
    "Kandinsky6Transformer3DModel": "audio_out_layer",  # video and audio
    "LTX2VideoTransformer3DModel": "audio_proj_out",
    "LongCatAudioDiTTransformer": "masks",
    "MiniMaxH3Transformer3DModel": "audio_proj_out",
    "MiniMaxMusic3RVQDepthDecoder": "no layer",  # samples tokens, denoises nothing
    "MiniMaxMusic3Transformer1DModel": "postprocess_conv",
    "MotionAdapter": "no layer",  # a part of UNetMotionModel
    "RFD4ProteinaTransformer": "no layer",  # four outputs, masked
    "SanaWMLTX2RefinerTransformer3DModel": "audio_proj_out",
    "StableAudio3DiTModel": "postprocess_conv",
    "StableAudioDiTModel": "postprocess_conv",
    "TransformerTemporalModel": "adds its own input",
    "UNet1DModel": "no layer",  # a one-dimensional convolution
    "UVit2DModel": "mlm_layer",  # logits of tokens
    "UniDiffuserModel": "no layer",  # image, text and their CLIP embeddings at once
}


def _is_denoiser(kind: Any) -> bool:
    if not (
        isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "load_config")
    ):
        return False
    place, name = kind.__module__, kind.__name__
    named = any(word in name for word in ("Transformer", "UNet", "DiT", "UniDiffuserModel"))
    placed = ".models.transformers." in place or ".models.unets." in place
    return (named or placed) and not any(x in place for x in (".autoencoders.", ".controlnets."))


def _denoisers() -> set[str]:
    found = set()
    for name in dir(d):
        try:
            kind = getattr(d, name)
        except (ImportError, RuntimeError):  # a pipeline that needs a package that is not here
            continue
        found |= {name} if _is_denoiser(kind) else set()
    return found


def test_every_denoiser_class_is_listed_once():
    assert not EXPECTED.keys() & REFUSED.keys()
    assert _denoisers() == EXPECTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_head_of_every_class(name):
    denoiser = on_meta(name)
    head = find_head(denoiser)
    layer = layer_of(denoiser, head)
    assert head.name == EXPECTED[name]
    assert layer is denoiser.get_submodule(head.name)
    assert (head.targets, head.features) == layer.weight.flatten(1).shape
    assert head.has_bias == (layer.bias is not None)
    assert set(head.corrected) <= set(range(head.targets))
    assert not is_plain(layer)  # on the meta device there is nothing to overwrite


@pytest.mark.parametrize("name", REFUSED)
def test_refused_classes(name):
    with pytest.raises(UnsupportedPipeline, match=REFUSED[name]) as caught:
        find_head(on_meta(name))
    assert name in str(caught.value) and 'head="' in str(caught.value)


def test_a_refused_class_takes_a_name():
    head = find_head(on_meta("LTX2VideoTransformer3DModel"), "audio_proj_out")
    assert (head.name, head.features, head.targets) == ("audio_proj_out", 2048, 128)


# ---- eight pipelines


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _first_call(tiny: tp.TinyPipeline) -> Callable[[], Tensor]:
    """The first call a pipeline makes of its denoiser, to be made again at will."""
    calls: list[tuple[Any, Any]] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        calls.append(([_copied(a) for a in args], {k: _copied(v) for k, v in kwargs.items()}))

    hook = tiny.model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        tp.generate(tiny, steps=2, seeds=(0, 1))
    hook.remove()
    args, kwargs = calls[0]

    def again() -> Tensor:
        with torch.no_grad():
            return tiny.model(*args, **{**kwargs, "return_dict": False})[0].clone()

    return again


def _replaced(layer: nn.Module, out: Tensor, call: Callable[[], Tensor]) -> Tensor:
    """The denoiser's output when the layer gives ``out``, whatever its weights are."""
    hook = layer.register_forward_hook(lambda *_: out)
    prediction = call()
    hook.remove()
    return prediction


HEADS = {
    "sdxl": ("conv_out", "convolution", 144, 4, 4),
    "flux": ("proj_out", "linear", 32, 16, 16),
    "pixart_sigma": ("proj_out", "linear", 32, 32, 16),
    "sana": ("proj_out", "linear", 32, 4, 4),
    "sd3": ("proj_out", "linear", 32, 16, 16),
    "dit": ("proj_out_2", "linear", 32, 32, 16),
    "wan": ("proj_out", "linear", 32, 16, 16),
    "cogvideox": ("proj_out", "linear", 32, 16, 16),
}


def test_all_pipelines_are_covered():
    assert HEADS.keys() == tp.ALL.keys()


@pytest.mark.parametrize("name", HEADS)
def test_rows_predict_what_a_changed_head_does(name):
    tiny = tp.ALL[name]()
    call = _first_call(tiny)
    head = find_head(tiny.model)
    layer = layer_of(tiny.model, head)
    sizes = (head.name, head.kind, head.features, head.targets, len(head.corrected))
    assert sizes == HEADS[name]
    assert is_plain(layer)

    h, out, before = seen(layer, call)
    assert is_reordered(out, before)
    assert not is_reordered(h, before)

    generator = torch.Generator().manual_seed(1)
    columns = list(head.corrected)
    dw, db = torch.zeros(head.targets, head.features), torch.zeros(head.targets)
    dw[columns] = 0.3 * torch.randn(len(columns), head.features, generator=generator)
    db[columns] = torch.randn(len(columns), generator=generator)
    with torch.no_grad():
        layer.weight += dw.reshape(layer.weight.shape)
        layer.bias += db

    rows = rows_of(head, layer, h) @ dw.T + db
    predicted = out + rows_as_outputs(head, rows, out)
    _, changed, after = seen(layer, call)
    torch.testing.assert_close(changed, predicted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, _replaced(layer, predicted, call), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.5  # not a comparison of nothing with nothing


@pytest.mark.parametrize("name", ["pixart_sigma", "dit"])
def test_learned_variance_stays_to_the_bit(name):
    tiny = tp.ALL[name]()
    call = _first_call(tiny)
    head = find_head(tiny.model)
    layer = layer_of(tiny.model, head)
    before, columns = call(), list(head.corrected)
    with torch.no_grad():
        layer.weight[columns] *= 1.5
        layer.bias[columns] += 1.0
    after = call()
    assert torch.equal(after[:, 4:], before[:, 4:])
    assert (after[:, :4] != before[:, :4]).all()
    with torch.no_grad():  # and the other columns are the variance
        layer.bias += 1.0
    assert (call()[:, 4:] != before[:, 4:]).all()


# ---- which columns are a learned variance, in every class that has one

_TOKENS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
_WIDE = {"cross_attention_dim": 32, "caption_channels": 8}
_LEARNED = {"in_channels": 4, "out_channels": 8}
_SQUARE = {"patch_size": 2, "sample_size": 8}
_CROSS = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16}


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    model = d.DiTTransformer2DModel(**_TOKENS, **_LEARNED, **_SQUARE)
    labels = torch.tensor([1, 2])
    return model, {"hidden_states": noise(2, 4, 8, 8), "class_labels": labels}


def _transformer_2d() -> tuple[nn.Module, dict[str, Any]]:
    norm = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
    model = d.Transformer2DModel(**_TOKENS, **_LEARNED, **_SQUARE, **norm)
    return model, {"hidden_states": noise(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}


def _latte() -> tuple[nn.Module, dict[str, Any]]:
    norm = {"norm_type": "ada_norm_single", "video_length": 2}
    model = d.LatteTransformer3DModel(**_TOKENS, **_WIDE, **_LEARNED, **_SQUARE, **norm)
    return model, {"hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 5, 8)}


def _sana() -> tuple[nn.Module, dict[str, Any]]:
    model = d.SanaTransformer2DModel(**_TOKENS, **_CROSS, **_WIDE, **_LEARNED, **_SQUARE)
    return model, {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 8)}


def _sana_video() -> tuple[nn.Module, dict[str, Any]]:
    model = d.SanaVideoTransformer3DModel(**_TOKENS, **_CROSS, **_WIDE, **_LEARNED, sample_size=8)
    return model, {"hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 5, 8)}


def _hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    text = {"cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8}
    more = {"hidden_size": 32, "text_len": 3, "text_len_t5": 3, "in_channels": 4, "num_layers": 2}
    more["use_style_cond_and_image_meta_size"] = False
    model = d.HunyuanDiT2DModel(**{**_TOKENS, **more}, **text, **_SQUARE)
    masks = {"text_embedding_mask": torch.ones(2, 3), "text_embedding_mask_t5": torch.ones(2, 3)}
    states = {"encoder_hidden_states": noise(2, 3, 8), "encoder_hidden_states_t5": noise(2, 3, 8)}
    return model, {"hidden_states": noise(2, 4, 8, 8), **masks, **states}


def _lumina() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_size": 8, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    model = d.LuminaNextDiT2DModel(**sizes, num_kv_heads=2, cross_attention_dim=8, multiple_of=16)
    rope = torch.polar(torch.ones(8, 8, 8), noise(8, 8, 8))
    text = {"encoder_hidden_states": noise(2, 3, 8), "encoder_mask": torch.ones(2, 3).bool()}
    inputs = {"hidden_states": noise(2, 4, 8, 8), "image_rotary_emb": rope, **text}
    return model, {**inputs, "cross_attention_kwargs": {}}


def _allegro() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_height": 8, "sample_width": 8, "sample_frames": 2, **_TOKENS}
    sizes |= {"attention_head_dim": 18, "cross_attention_dim": 36, "caption_channels": 8}
    model = d.AllegroTransformer3DModel(**sizes, **_LEARNED)
    one = noise(32, 6)
    ids = torch.zeros(1, 32, dtype=torch.long)
    text = {"encoder_hidden_states": noise(2, 1, 5, 8), "attention_mask": torch.ones(2, 2, 8, 8)}
    rope = (((one, one),) * 3, (ids,) * 3)
    return model, {"hidden_states": noise(2, 4, 2, 8, 8), **text, "image_rotary_emb": rope}


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2}
    model = d.UNet2DModel(**_LEARNED, **blocks, **sizes, attention_head_dim=4)
    return model, {"sample": noise(2, 4, 8, 8)}


BUILDERS = (_dit, _transformer_2d, _latte, _sana, _sana_video, _hunyuan, _lumina, _allegro, _unet)


@pytest.mark.parametrize("build", BUILDERS)
def test_corrected_columns_are_the_first_half_of_the_channels(build):
    """A head that gives one in the corrected columns and zero elsewhere shows where they go."""
    model, inputs = build()
    head = find_head(model.eval())
    layer = layer_of(model, head)
    shown = torch.zeros(head.targets)
    shown[list(head.corrected)] = 1.0
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(shown)
        prediction = model(timestep=torch.full((2,), 0.5), **inputs, return_dict=False)[0]
    assert prediction.shape[1] == 8
    assert (prediction[:, :4] == 1).all()
    assert (prediction[:, 4:] == 0).all()


def _with_config(layer: nn.Module, place: str = "conv_out", **config: Any) -> nn.Module:
    model = nn.ModuleDict({place: layer})
    model.config = config
    return model


def test_inputs_beside_the_latents_are_no_learned_variance():
    inpainting = _with_config(nn.Conv2d(8, 4, 3), in_channels=9, out_channels=4)
    assert find_head(inpainting).corrected == (0, 1, 2, 3)
    assert find_head(inpainting, channels=4).corrected == (0, 1, 2, 3)


@pytest.mark.parametrize(("inputs", "outputs", "channels"), [(9, 8, 4), (6, 6, 3)])
def test_the_number_of_latent_channels_tells_a_variance_apart(inputs, outputs, channels):
    denoiser = _with_config(nn.Conv2d(8, outputs, 3), in_channels=inputs, out_channels=outputs)
    assert find_head(denoiser).corrected == tuple(range(outputs))
    assert find_head(denoiser, channels=channels).corrected == tuple(range(channels))


@pytest.mark.parametrize(("learned", "targets"), [(True, 32), (False, 16)])
def test_learn_sigma_decides_where_the_configuration_has_it(learned, targets):
    config = {**NEEDED["HunyuanDiT2DModel"], "learn_sigma": learned}
    with torch.device("meta"):
        head = find_head(d.HunyuanDiT2DModel(**config))
    assert (head.targets, len(head.corrected)) == (targets, 16)


def test_a_subclass_is_treated_like_its_class():
    with torch.device("meta"):
        own = type("OwnDiT", (d.DiTTransformer2DModel,), {})(**_TOKENS, **_LEARNED, **_SQUARE)
        temporal = type("Own", (d.TransformerTemporalModel,), {})(in_channels=32)
    assert len(find_head(own).corrected) == 16
    with pytest.raises(UnsupportedPipeline, match="adds its own input"):
        find_head(temporal)


def test_a_variance_of_unknown_order_is_refused():
    tokens = _with_config(nn.Linear(8, 32), "proj_out", in_channels=4, out_channels=8)
    with pytest.raises(UnsupportedPipeline, match="learned variance, but in which of the 32"):
        find_head(tokens)

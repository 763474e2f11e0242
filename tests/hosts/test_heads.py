"""The output head of a denoiser: found in every class of diffusers, and rows that reproduce it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines as tp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.actuators.head_rows import Head, outputs_as_rows, rows_as_outputs, rows_of
from evenkeel.hosts.actuators.heads import find_head, is_plain, is_reordered, layer_of
from evenkeel.quantizers.methods.spec import QuantizerSpec

d = tp.d

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

_PATCHED = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "num_layers": 1}
_LLAMA = {"llama_layers": [0], "caption_channels": [8, 8], "max_resolution": (8, 8)}
_ROPE = [1.0] * 48

#: What the constructors need where their own defaults do not build a model.
NEEDED: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"in_channels": 16, "patch_size": 2, **_LLAMA},
    "HunyuanDiT2DModel": {"activation_fn": "gelu-approximate", **_PATCHED, "num_layers": 2},
    "LatteTransformer3DModel": {"caption_channels": 8, **_PATCHED},
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": _ROPE, "long_factor": _ROPE}},
    "Transformer2DModel": {"num_embeds_ada_norm": 9, "norm_type": "ada_norm_zero", **_PATCHED},
    "TransformerTemporalModel": {"in_channels": 32},
    "UniDiffuserModel": {"text_dim": 32, "clip_img_dim": 32, "out_channels": 4, **_PATCHED},
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


def _on_meta(name: str) -> nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return getattr(d, name)(**NEEDED.get(name, {}))


def test_every_denoiser_class_is_listed_once():
    assert not EXPECTED.keys() & REFUSED.keys()
    assert _denoisers() == EXPECTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_head_of_every_class(name):
    denoiser = _on_meta(name)
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
        find_head(_on_meta(name))
    assert name in str(caught.value) and 'head="' in str(caught.value)


def test_a_refused_class_takes_a_name():
    head = find_head(_on_meta("LTX2VideoTransformer3DModel"), "audio_proj_out")
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


def _seen(layer: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What enters and leaves the layer during a call, and what the denoiser gives."""
    seen: list[Tensor] = []
    keep = layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out.clone())))
    prediction = call()
    keep.remove()
    h, out = seen
    return h, out, prediction


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

    h, out, before = _seen(layer, call)
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
    _, changed, after = _seen(layer, call)
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


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    model = d.DiTTransformer2DModel(**_TOKENS, **_LEARNED, **_SQUARE)
    labels = torch.tensor([1, 2])
    return model, {"hidden_states": _noise(2, 4, 8, 8), "class_labels": labels}


def _transformer_2d() -> tuple[nn.Module, dict[str, Any]]:
    norm = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
    model = d.Transformer2DModel(**_TOKENS, **_LEARNED, **_SQUARE, **norm)
    return model, {"hidden_states": _noise(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}


def _latte() -> tuple[nn.Module, dict[str, Any]]:
    norm = {"norm_type": "ada_norm_single", "video_length": 2}
    model = d.LatteTransformer3DModel(**_TOKENS, **_WIDE, **_LEARNED, **_SQUARE, **norm)
    return model, {"hidden_states": _noise(2, 4, 2, 8, 8), "encoder_hidden_states": _noise(2, 5, 8)}


def _sana() -> tuple[nn.Module, dict[str, Any]]:
    model = d.SanaTransformer2DModel(**_TOKENS, **_CROSS, **_WIDE, **_LEARNED, **_SQUARE)
    return model, {"hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": _noise(2, 5, 8)}


def _sana_video() -> tuple[nn.Module, dict[str, Any]]:
    model = d.SanaVideoTransformer3DModel(**_TOKENS, **_CROSS, **_WIDE, **_LEARNED, sample_size=8)
    return model, {"hidden_states": _noise(2, 4, 2, 8, 8), "encoder_hidden_states": _noise(2, 5, 8)}


def _hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    text = {"cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8}
    more = {"hidden_size": 32, "text_len": 3, "text_len_t5": 3, "in_channels": 4, "num_layers": 2}
    more["use_style_cond_and_image_meta_size"] = False
    model = d.HunyuanDiT2DModel(**{**_TOKENS, **more}, **text, **_SQUARE)
    masks = {"text_embedding_mask": torch.ones(2, 3), "text_embedding_mask_t5": torch.ones(2, 3)}
    states = {"encoder_hidden_states": _noise(2, 3, 8), "encoder_hidden_states_t5": _noise(2, 3, 8)}
    return model, {"hidden_states": _noise(2, 4, 8, 8), **masks, **states}


def _lumina() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_size": 8, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    model = d.LuminaNextDiT2DModel(**sizes, num_kv_heads=2, cross_attention_dim=8, multiple_of=16)
    rope = torch.polar(torch.ones(8, 8, 8), _noise(8, 8, 8))
    text = {"encoder_hidden_states": _noise(2, 3, 8), "encoder_mask": torch.ones(2, 3).bool()}
    inputs = {"hidden_states": _noise(2, 4, 8, 8), "image_rotary_emb": rope, **text}
    return model, {**inputs, "cross_attention_kwargs": {}}


def _allegro() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_height": 8, "sample_width": 8, "sample_frames": 2, **_TOKENS}
    sizes |= {"attention_head_dim": 18, "cross_attention_dim": 36, "caption_channels": 8}
    model = d.AllegroTransformer3DModel(**sizes, **_LEARNED)
    one = _noise(32, 6)
    ids = torch.zeros(1, 32, dtype=torch.long)
    text = {"encoder_hidden_states": _noise(2, 1, 5, 8), "attention_mask": torch.ones(2, 2, 8, 8)}
    rope = (((one, one),) * 3, (ids,) * 3)
    return model, {"hidden_states": _noise(2, 4, 2, 8, 8), **text, "image_rotary_emb": rope}


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2}
    model = d.UNet2DModel(**_LEARNED, **blocks, **sizes, attention_head_dim=4)
    return model, {"sample": _noise(2, 4, 8, 8)}


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


# ---- rows


def _of(layer: nn.Module) -> Head:
    return find_head(nn.ModuleDict({"conv_out": layer}))


_PADDINGS = ["zeros", "reflect", "replicate", "circular"]
_PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    kernel=_PAIR,
    stride=_PAIR,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    mode=st.sampled_from(_PADDINGS),
    bias=st.booleans(),
)
def test_rows_of_a_convolution_times_its_weight_are_the_convolution(
    kernel, stride, dilation, padding, mode, bias
):
    geometry = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    layer = nn.Conv2d(3, 5, kernel, **geometry, bias=bias, dtype=torch.float64)
    _matches(layer, _noise(2, 3, 7, 6).double())


@pytest.mark.parametrize("mode", _PADDINGS)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(1, 4), (3, 2)])
def test_padding_by_name(kernel, padding, mode):
    geometry = {"padding": padding, "padding_mode": mode, "dilation": (2, 1)}
    layer = nn.Conv2d(3, 5, kernel, **geometry, dtype=torch.float64)
    _matches(layer, _noise(2, 3, 7, 6).double())


def test_points_of_three_axes():
    _matches(nn.Conv3d(3, 5, 1, dtype=torch.float64), _noise(2, 3, 2, 4, 5).double())


def _matches(layer: Any, h: Tensor) -> None:
    head = _of(layer)
    assert head.has_bias == (layer.bias is not None)
    with torch.no_grad():
        out = layer(h)
        rows = rows_of(head, layer, h) @ layer.weight.flatten(1).T
    rows = rows if layer.bias is None else rows + layer.bias.detach()
    assert rows.shape[-1] == head.targets
    torch.testing.assert_close(rows, outputs_as_rows(head, out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows_as_outputs(head, rows, out), out, rtol=1e-12, atol=1e-12)


def test_the_order_of_features_matters():
    """The companion: rows in another order do not reproduce the convolution."""
    layer = nn.Conv2d(3, 5, 3, bias=False)
    head, h = _of(layer), _noise(2, 3, 6, 6)
    rows = rows_of(head, layer, h).unflatten(-1, (3, 9)).transpose(-1, -2).flatten(-2)
    wrong = rows_as_outputs(head, (rows @ layer.weight.flatten(1).T).detach(), layer(h))
    assert (wrong - layer(h)).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(2, 8), (2, 7, 8), (2, 3, 4, 5, 8)])
def test_tokens_of_any_number_of_axes(shape):
    layer = nn.Linear(8, 3)
    head, h = _of(layer), _noise(*shape)
    rows, out = rows_of(head, layer, h), layer(h)
    assert rows.shape == (2, h[0].numel() // 8, 8)
    assert torch.equal(rows_as_outputs(head, outputs_as_rows(head, out), out), out)
    torch.testing.assert_close(rows_as_outputs(head, layer(rows), out), out)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_round_trip_of_rows_and_outputs(kind):
    head = Head("x", kind, 9, 3, True, (0, 1, 2))
    out = _noise(2, 3, 4, 3)  # three columns on either axis
    rows = outputs_as_rows(head, out)
    assert rows.shape == (2, 12, 3)
    assert torch.equal(rows_as_outputs(head, rows, out), out)
    other = {"linear": "convolution", "convolution": "linear"}[kind]
    assert not torch.equal(rows, outputs_as_rows(Head("x", other, 9, 3, True, ()), out))


def test_dtype_is_kept():
    layer = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.bfloat16)
    assert rows_of(_of(layer), layer, _noise(1, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


# ---- layers of other makes


class _Packed:
    """A layer as a quantization backend may write it: sizes, and no weight of that shape."""

    @staticmethod
    def linear() -> nn.Module:
        layer = nn.Module()
        layer.in_features, layer.out_features, layer.bias = 8, 4, None
        return layer

    @staticmethod
    def convolution() -> nn.Module:
        layer = nn.Module()
        layer.in_channels, layer.out_channels, layer.kernel_size = 8, 4, 3
        layer.stride, layer.padding, layer.dilation, layer.padding_mode = 1, 1, 1, "zeros"
        return layer


def test_quantized_layers_are_heads_and_not_plain():
    spec = QuantizerSpec(8, 8)
    linear = spec.layer(nn.Linear(32, 4))
    convolution = spec.layer(nn.Conv2d(4, 6, 3, padding=1))
    assert _of(linear) == Head("conv_out", "linear", 32, 4, True, (0, 1, 2, 3))
    assert _of(convolution) == Head("conv_out", "convolution", 36, 6, True, tuple(range(6)))
    assert rows_of(_of(convolution), convolution, _noise(1, 4, 5, 5)).shape == (1, 25, 36)
    assert not is_plain(linear) and not is_plain(convolution)


def test_layers_that_only_know_their_sizes():
    linear, convolution = _Packed.linear(), _Packed.convolution()
    assert _of(linear) == Head("conv_out", "linear", 8, 4, False, (0, 1, 2, 3))
    assert _of(convolution) == Head("conv_out", "convolution", 72, 4, False, (0, 1, 2, 3))
    rows = rows_of(_of(convolution), convolution, _noise(2, 8, 5, 5))
    expected = F.unfold(_noise(2, 8, 5, 5), 3, padding=1).transpose(1, 2)
    assert torch.equal(rows, expected)
    assert not is_plain(linear)


class _SubclassedLinear(nn.Linear):
    pass


class _SubclassedParameter(nn.Parameter):
    pass


def _with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(weight) if type(weight) is Tensor else weight
    return layer


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 4), nn.Linear(8, 4, bias=False), nn.Conv2d(3, 4, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_layers(layer, dtype):
    assert is_plain(layer.to(dtype))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.Linear(8, 4, device="meta"),
        _SubclassedLinear(8, 4),
        _with_weight(_SubclassedParameter(torch.zeros(4, 8))),
        _with_weight(torch.zeros(4, 8).to(torch.float8_e4m3fn)),
        _with_weight(torch.zeros(4, 8).to_sparse()),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)),
    ],
)
def test_layers_that_cannot_be_overwritten(layer):
    assert not is_plain(layer)


def test_compiled_denoisers_and_layers_are_looked_through():
    model = nn.ModuleDict({"proj_out": nn.Linear(8, 4)})
    head = find_head(torch.compile(model))
    assert head == find_head(model)
    assert layer_of(torch.compile(model), head) is model["proj_out"]
    wrapped = nn.ModuleDict({"proj_out": torch.compile(model["proj_out"])})
    assert find_head(wrapped) == head
    assert layer_of(wrapped, head) is model["proj_out"]


# ---- is the output only reordered?


def test_reordered_means_the_same_values():
    out = _noise(2, 6, 4)
    assert is_reordered(out, out.flip(1).transpose(1, 2).double())
    assert is_reordered(out, out[:, 2:])
    assert not is_reordered(out, out + 1e-3)
    assert not is_reordered(out, out.tanh()[:, 2:])
    assert not is_reordered(out, out[:, :1].expand(2, 6, 4))  # each value there, but not as often


def test_an_output_that_is_changed_afterwards_shows():
    """What a name given by the user cannot be checked for, one call can."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "norm_num_groups": 4}
    model = d.TransformerTemporalModel(in_channels=16, **sizes).eval()
    layer = layer_of(model, find_head(model, "proj_out"))
    _, out, prediction = _seen(layer, lambda: model(_noise(2, 16, 4, 4), num_frames=2).sample)
    assert prediction.numel() == out.numel()
    assert not is_reordered(out, prediction)


def test_stable_cascade_only_shuffles_pixels():
    last = _on_meta("StableCascadeUNet").clf
    assert [type(part) for part in last][1:] == [nn.Conv2d, nn.PixelShuffle]
    out = _noise(2, 16, 3, 3)
    assert is_reordered(out, nn.PixelShuffle(2)(out))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"time_embedding_type": "fourier"}, "divides"),
        ({"up_block_types": ("SkipUpBlock2D",) * 4}, "skip connection"),
    ],
)
def test_configurations_that_change_the_output(config, reason):
    with torch.device("meta"), pytest.raises(UnsupportedPipeline, match=reason):
        find_head(d.UNet2DModel(**config))


# ---- errors


def test_no_head():
    with pytest.raises(UnsupportedPipeline, match=r"components are 0, 1\. Name the last layer"):
        find_head(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(UnsupportedPipeline, match="components are none"):
        find_head(nn.Module())


def test_several_heads():
    both = nn.ModuleDict({"proj_out": nn.Linear(8, 4), "final_linear": nn.Linear(8, 4)})
    with pytest.raises(UnsupportedPipeline, match="several layers could be it: proj_out, final"):
        find_head(both)
    assert find_head(both, "final_linear").name == "final_linear"


def test_several_final_layers_of_z_image():
    with torch.device("meta"):
        sizes = {"all_patch_size": (2, 4), "all_f_patch_size": (1, 1), "n_layers": 1}
        model = d.ZImageTransformer2DModel(**sizes)
    with pytest.raises(UnsupportedPipeline, match=r"several .* all_final_layer\.4-1\.linear"):
        find_head(model)
    assert find_head(model, "all_final_layer.4-1.linear").targets == 16 * 16


@pytest.mark.parametrize(("name", "found"), [("nowhere.at_all", "not in it"), ("act", "a ReLU")])
def test_a_name_that_is_no_layer(name, found):
    model = nn.ModuleDict({"proj_out": nn.Linear(8, 4), "act": nn.ReLU()})
    with pytest.raises(UnsupportedPipeline, match=f"'{name}' is {found}"):
        find_head(model, name)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 4, 3, groups=2), "in 2 groups"),
        (nn.ConvTranspose2d(8, 4, 3), "transposed"),
        (nn.Conv1d(8, 4, 1), "over 1 axes"),
        (nn.Conv3d(8, 4, 3), r"over 3 axes with kernel \(3, 3, 3\)"),
        (nn.Conv3d(8, 4, 1, stride=2), "over 3 axes"),
        (nn.Conv3d(8, 4, 1, padding=1), "over 3 axes"),
    ],
)
def test_convolutions_that_have_no_rows(layer, reason):
    with pytest.raises(UnsupportedPipeline, match=reason):
        _of(layer)


def test_a_layer_that_another_denoiser_does_not_have():
    with pytest.raises(UnsupportedPipeline, match="no layer called 'proj_out'"):
        layer_of(nn.ReLU(), Head("proj_out", "linear", 8, 4, True, ()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 4), (2, 5, 7)),
        (nn.Linear(8, 4), (8,)),
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8)),
        (nn.Conv2d(3, 4, 3), (3, 8, 8)),
        (nn.Conv3d(3, 4, 1), (2, 3, 8, 8)),
    ],
)
def test_inputs_that_do_not_fit(layer, shape):
    with pytest.raises(UnsupportedPipeline, match="its input is"):
        rows_of(_of(layer), layer, torch.zeros(shape))


def test_outputs_that_do_not_fit():
    head = Head("proj_out", "linear", 8, 4, True, (0, 1, 2, 3))
    with pytest.raises(UnsupportedPipeline, match="gives 4 values along axis -1"):
        outputs_as_rows(head, torch.zeros(2, 4, 5))
    with pytest.raises(UnsupportedPipeline, match=r"holds rows \(2, 5, 4\); got \(2, 6, 4\)"):
        rows_as_outputs(head, torch.zeros(2, 6, 4), torch.zeros(2, 5, 4))

"""CLIP and DINOv2 from folders on disk, tiny and with random weights."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, measure
from evenkeel.comparing.evaluators import evaluator_named
from evenkeel.comparing.packaged_evaluators import (
    Several,
    resized_as_adm,
    resized_as_clean_fid,
)
from evenkeel.errors import EvenkeelError
from evenkeel.metrics import cmmd, frechet_distance

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PROMPTS = ["a", "b", "a b", "b a"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder
    )
    return folder


def pictures(n: int = 4, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(0, 256, (n, 3, 24, 24), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def test_clip_scores_are_the_models_own_cosines(clip: Path) -> None:
    evaluator = evaluator_named(f"clip:{clip}")
    x = pictures().float() / 255
    features = evaluator.features(x)
    assert features.shape == (4, 8) and torch.allclose(features.norm(dim=1), torch.ones(4))
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        out = model(**tokens, pixel_values=evaluator._prepared(x))
    cosine = out.logits_per_image.diagonal() / model.logit_scale.exp()
    assert torch.allclose(
        evaluator.score(x, PROMPTS), 100 * cosine.detach().clamp_min(0), atol=1e-4
    )


def test_they_measure_what_a_comparison_asks(clip: Path) -> None:
    images = {FULL_PRECISION: pictures(), QUANTIZED: pictures(seed=1), "arm": pictures(seed=2)}
    seconds = {name: [1.0, 1.0] for name in images}
    found = measure(images, seconds, PROMPTS, evaluator_named(f"clip:{clip}"), None, more=True)
    arm = found[2]
    seen = [evaluator_named(f"clip:{clip}").features(i.float() / 255) for i in images.values()]
    own = cmmd(seen[2], seen[0], paired_reference=True)
    assert arm.measures["cmmd_full_precision"] == own
    assert arm.measures["frechet_full_precision"].value > 0
    change = arm.difference_to_quantized["prompt_score"].value
    before, after = (found[i].measures["prompt_score"].value for i in (1, 2))
    assert change == pytest.approx(after - before)


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(**SMALL, image_size=28, patch_size=14, mlp_ratio=1)
    Dinov2Model(config).save_pretrained(tmp_path)
    evaluator = evaluator_named(f"dinov2:{tmp_path}")
    features = evaluator.features(pictures().float() / 255)
    assert features.shape == (4, 16) and features.std() > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("inception", "inception:FILE"),
        ("inception:/nowhere", "is no file"),
        ("torchscript:/nowhere", "is no file"),
        ("lpips", "pip install lpips"),
        ("imagereward", "pip install image-reward"),
        ("magic:x", "clip:FOLDER"),
        ("clip:/nowhere", "no config.json"),
    ],
)
def test_what_is_not_there_says_where_to_get_it(text: str, says: str) -> None:
    with pytest.raises(EvenkeelError, match=says):
        evaluator_named(text)


# What writes the format warns that it is old; what people have is in it.
old = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Layers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


class Scripted(nn.Module):
    """As NVIDIA's file: its layers take pictures of 299 pixels around 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, no_output_bias: bool = False) -> torch.Tensor:
        if no_output_bias:  # pictures from 0 to 255 here, and its classes
            return self.layers((x - 128) / 128).flatten(1).softmax(1)
        return self.layers(x).flatten(1)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Scripted()).save(str(file))
    return file


def test_clean_fid_resizes_as_pillow_does() -> None:
    x = pictures(2).float() / 255
    ours = resized_as_clean_fid(x)
    for picture, mine in zip(x, ours, strict=True):
        for channel, found in zip(picture, mine, strict=True):
            theirs = Image.fromarray(channel.numpy(), mode="F").resize((299, 299), Image.BICUBIC)
            assert np.allclose(np.asarray(theirs), found.numpy(), atol=1e-5)
    large = torch.rand(1, 3, 512, 400, generator=torch.Generator().manual_seed(0))
    theirs = Image.fromarray(large[0, 0].numpy(), mode="F").resize((299, 299), Image.BICUBIC)
    assert np.allclose(np.asarray(theirs), resized_as_clean_fid(large)[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [24, 299, 512])
def test_adm_resizes_as_tensorflow_1_did(size: int) -> None:
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(size))
    found, scale = resized_as_adm(x)[0, 0], size / 299
    for i, j in [(0, 0), (17, 230), (150, 149), (298, 298)]:
        y, z = i * scale, j * scale
        a, b = int(y), int(z)
        c, d = min(a + 1, size - 1), min(b + 1, size - 1)
        p, q, v = y - a, z - b, x[0, 0]
        by_hand = (1 - p) * ((1 - q) * v[a, b] + q * v[a, d]) + p * (
            (1 - q) * v[c, b] + q * v[c, d]
        )
        assert float(found[i, j]) == pytest.approx(float(by_hand), abs=1e-6)
    if size == 299:
        assert torch.equal(resized_as_adm(x), x)


@pytest.mark.parametrize("adm", [False, True])
def test_the_distance_is_torchmetrics_on_the_same_resized_pictures(
    scripted: Path, adm: bool
) -> None:
    evaluator = evaluator_named(f"inception{'-adm' if adm else ''}:{scripted}")
    resize = resized_as_adm if adm else resized_as_clean_fid
    real, fake = (pictures(40, seed) for seed in (0, 1))

    class Net(nn.Module):
        num_features = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((255 * resize(x.float() / 255) - 128) / 128).mean((2, 3)).double()

    theirs = FrechetInceptionDistance(feature=Net(), input_img_size=(3, 24, 24))
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(*(evaluator.features(x.float() / 255) for x in (fake, real)))
    assert ours.value == pytest.approx(float(theirs.compute()), rel=1e-3)
    x = fake.float() / 255
    assert torch.allclose(evaluator.posterior(x), evaluator.features(x).softmax(1), atol=1e-6)


@old
def test_any_torchscript_gives_features(scripted: Path, tmp_path: Path) -> None:
    x = pictures().float() / 255
    found = evaluator_named(f"torchscript:{scripted}").features(x)
    assert torch.allclose(found, x.mean((2, 3)))
    torch.jit.script(Layers()).save(str(tmp_path / "layers.pt"))
    with pytest.raises(EvenkeelError, match="a row of features"):
        evaluator_named(f"torchscript:{tmp_path / 'layers.pt'}").features(x)
    with pytest.raises(EvenkeelError, match="without 'layers'"):
        evaluator_named(f"inception:{tmp_path / 'layers.pt'}")
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(EvenkeelError, match="pip install torch-fidelity"):
        evaluator_named(f"inception:{tmp_path / 'weights.pth'}")
    with pytest.raises(EvenkeelError, match="no TorchScript"):
        evaluator_named(f"torchscript:{tmp_path / 'weights.pth'}")


def test_packages_that_somebody_has_are_asked_as_they_want(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Net(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert normalize
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    class Reward:
        def score(self, prompt: str, pictures: list[Image.Image]) -> float:
            return len(prompt) + pictures[0].getpixel((0, 0))[0] / 255

    def extractor(name: str, wanted: list[str], feature_extractor_weights_path: str) -> object:
        assert wanted == ["2048", "logits_unbiased"]
        assert feature_extractor_weights_path.endswith("weights.pth")

        def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3)), x[:, :, 0, 0].float() / 255

        return both

    fidelity = SimpleNamespace(FeatureExtractorInceptionV3=extractor)
    modules = {
        "lpips": SimpleNamespace(LPIPS=lambda net, verbose: Net()),
        "ImageReward": SimpleNamespace(load=lambda name: Reward()),
        "torch_fidelity": SimpleNamespace(feature_extractor_inceptionv3=fidelity),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "weights.pth").write_bytes(b"theirs")
    x, y = (pictures(seed=s).float() / 255 for s in (0, 1))
    net, reward = evaluator_named("lpips:vgg"), evaluator_named("imagereward")
    seen = evaluator_named(f"inception:{tmp_path / 'weights.pth'}")
    assert torch.allclose(net.perceptual(x, y), (x - y).abs().mean((1, 2, 3)))
    scores = torch.tensor([len(p) + float(i[0, 0, 0]) for p, i in zip(PROMPTS, x, strict=True)])
    assert torch.allclose(reward.score(x, PROMPTS), scores)
    assert seen.features(x).shape == (4, 3)
    posterior = seen.posterior(x)
    assert posterior.shape == (4, 3) and torch.allclose(posterior.sum(1), torch.ones(4))
    assert torch.equal(posterior.argmax(1), seen._resized(x)[:, :, 0, 0].argmax(1))
    images = {FULL_PRECISION: pictures(), QUANTIZED: pictures(seed=1), "arm": pictures(seed=2)}
    seconds = {name: [1.0, 1.0] for name in images}
    clip = SimpleNamespace(
        score=lambda images, prompts: torch.tensor([float(len(p)) for p in prompts])
    )
    both = Several([net, reward, seen, clip, None])
    words = ["goldfish", *PROMPTS[1:]]
    arm = measure(images, seconds, PROMPTS, both, None, more=True, words=words)[2]
    expected = {"perceptual", "prompt_score", "image_reward", "inception_score"}
    assert {*expected, "kernel_full_precision"} <= {*arm.measures}
    assert arm.measures["prompt_score"].value == pytest.approx(sum(map(len, words)) / 4)
    alone = measure(images, seconds, PROMPTS, Several([net]), None, more=True)[2]
    assert math.isnan(alone.measures["frechet_full_precision"].value)
    assert alone.measures["perceptual"] == arm.measures["perceptual"]

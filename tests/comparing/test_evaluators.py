"""CLIP and DINOv2 from folders on disk, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, measure
from evenkeel.comparing.evaluators import evaluator_named
from evenkeel.errors import EvenkeelError

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
        ("inception", "torch-fidelity"),
        ("lpips", "pip install lpips"),
        ("magic:x", "clip:FOLDER"),
        ("clip:/nowhere", "no config.json"),
    ],
)
def test_what_is_not_there_says_where_to_get_it(text: str, says: str) -> None:
    with pytest.raises(EvenkeelError, match=says):
        evaluator_named(text)

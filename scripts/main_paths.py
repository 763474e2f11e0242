"""The main paths from an installed package: restore, apply and compare on a pipeline made here.

``scripts/wheel`` runs it in an environment that has the wheel and its dependencies, and nothing of the
checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import evenkeel


def tiny() -> DiTPipeline:
    """Random weights; class labels for prompts."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    autoencoder = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    pipeline = DiTPipeline(transformer.eval(), autoencoder.eval(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Ends with an error where something is not right."""
    checkout = Path(__file__).parents[1]
    assert checkout not in Path(evenkeel.__file__).parents, f"{evenkeel.__file__} is the checkout"
    assert (Path(evenkeel.__file__).parent / "py.typed").is_file()
    described = str(metadata("evenkeel").get_payload() or metadata("evenkeel")["Description"])
    assert "# evenkeel" in described and "](docs/" not in described, "links into the checkout"
    pipeline = tiny()
    quantized, _ = evenkeel.quantize_module(
        pipeline.transformer, evenkeel.QuantizerSpec.parse("w3a16-g16")
    )
    run = {"num_inference_steps": 3, "guidance_scale": 2.0, "progress": False}
    classes = list(range(8))
    with tempfile.TemporaryDirectory() as folder:
        adapters, _ = evenkeel.fit_adapters(
            pipeline, quantized=quantized, prompts=classes, budget=0.2, **run
        )
        place = evenkeel.save(adapters, Path(folder) / "adapters.safetensors")
        record = evenkeel.calibrate(pipeline, quantized=quantized, prompts=classes, **run)
        pipeline.transformer = quantized

        def picture() -> torch.Tensor:
            noise = torch.Generator().manual_seed(0)
            made = pipeline(
                class_labels=[3], num_inference_steps=3, generator=noise, output_type="np"
            )
            return torch.from_numpy(made.images)

        plain = picture()
        for correction in (evenkeel.load(place), evenkeel.ExactDrift(record.evidence)):
            with evenkeel.applied(pipeline, correction, allow=("guidance",)):
                assert torch.isfinite(picture()).all()
        assert torch.equal(picture(), plain)
    command = [sys.executable, "-m", "evenkeel", "--help"]
    assert "restore" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()

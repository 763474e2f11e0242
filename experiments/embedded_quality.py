"""How good the embedded pipeline's own samples are, before any quantization.

1,000 captions (seed 31), 20 steps, guidance 4.5, full precision. Which attributes do the samples show,
according to the evaluator, and how far are they from pictures of held-out scans; beside it the
evaluator's own accuracy on held-out scans and the distance between two disjoint sets of real pictures.
Writes quality.json and samples.png into the pipeline's folder.

    python experiments/embedded_quality.py
"""

from __future__ import annotations

import json

import torch
from PIL import Image

from evenkeel import zoo
from evenkeel.generation import Arm, generate
from evenkeel.metrics import frechet_distance, mean_estimate
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts
from evenkeel.zoo.handwriting import ATTRIBUTES

IMAGES, SEED = 1000, 31


def main() -> None:
    twin = zoo.twin("pixart-sigma")
    folder = zoo.path_of(twin.name)
    pipe, evaluator = zoo.load(twin.name), HandwritingEvaluator(folder)
    prompts = sample_prompts(IMAGES, SEED)
    options = {
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
        "call": {},
    }
    arm = Arm("full-precision", pipe.transformer)
    images, seconds = generate(pipe, arm, prompts, SEED, 100, options, None, lambda: None)
    real, other = reference_images(prompts, SEED), reference_images(prompts, SEED + 1)

    def accuracy(pictures: torch.Tensor) -> dict[str, object]:
        matches = evaluator.matches(pictures.float() / 255, prompts)
        columns = dict(zip(ATTRIBUTES, matches.unbind(1), strict=True))
        return {k: mean_estimate(v[~v.isnan()]).as_dict() for k, v in columns.items()}

    features = [evaluator.features(x.float() / 255) for x in (images, real, other)]
    quality = {
        "command": "python experiments/embedded_quality.py",
        "images": IMAGES,
        "settings": options,
        "shown_by_samples": accuracy(images),
        "shown_by_held_out_scans": accuracy(real),
        "frechet_samples_to_held_out": frechet_distance(features[0], features[1]).as_dict(),
        "frechet_held_out_to_held_out": frechet_distance(features[2], features[1]).as_dict(),
        "seconds_per_image": sum(seconds) / len(seconds),
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    grid = images[:60].reshape(6, 10, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(192, 320, 3)
    Image.fromarray(grid.contiguous().numpy()).resize((640, 384), 0).save(folder / "samples.png")
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    main()

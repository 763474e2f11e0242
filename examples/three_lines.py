"""Calibrate a quantized pipeline, correct its sampler, generate. Run: python examples/three_lines.py."""

import evenkeel
from evenkeel import zoo
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import sample_prompts


def main() -> None:
    pipe = zoo.load("pixart-sigma")  # any diffusers pipeline
    quantized, report = quantize_module(pipe.transformer, QuantizerSpec.parse("w3a4-g32-r16"))
    print(f"{len(report.quantized)} layers quantized")

    settings = {"num_inference_steps": 20, "guidance_scale": 4.5}
    record = evenkeel.calibrate(pipe, quantized=quantized, prompts=sample_prompts(4, 0), **settings)
    pipe.transformer = quantized
    evenkeel.apply(pipe, evenkeel.QDrift(record.evidence), guidance_scale=4.5)

    call = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    images = pipe("a large red seven on a blue canvas", **settings, **call).images
    print(evenkeel.summary(pipe))
    print(images[0].size)


if __name__ == "__main__":
    main()

"""Refit a quantized denoiser and its output head, generate. Run: python examples/readout.py."""

import evenkeel
from evenkeel import zoo
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.evaluation import sample_prompts


def main() -> None:
    pipe = zoo.load("pixart-sigma")  # any diffusers pipeline
    quantized, _ = quantize_module(pipe.transformer, QuantizerSpec.parse("w3a4-g32-r16"))

    settings = {"num_inference_steps": 4, "guidance_scale": 4.5}
    fitting = {"prompts": sample_prompts(8, 0), **settings}
    # Optional, for layers of this library: branches, scales and biases, once and for all steps.
    refitted, report = evenkeel.refit_branches(pipe, quantized=quantized, **fitting)
    print(f"{len(report.changed)} of {len(report.layers)} layers refitted")

    readout = evenkeel.fit_readout(pipe, quantized=refitted, **fitting)
    pipe.transformer = refitted
    evenkeel.apply(pipe, readout)

    call = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    images = pipe("a large red seven on a blue canvas", **settings, **call).images
    print(evenkeel.summary(pipe))
    print(images[0].size)


if __name__ == "__main__":
    main()

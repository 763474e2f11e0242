"""What comes with a prompt goes with it: sliced, told apart by content, in every fit and comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.comparing.comparison import compare, standard_arms
from evenkeel.errors import CalibrationError, EvenkeelError, Incompatible, StorageError
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.hosts.pipeline.prompts import Prompts
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module

STEPS = 2
NAMES = ["a cat", "a dog", "a boat", "a tree", "a hill"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3))
    return Image.fromarray(values.astype("uint8"))


# ---- slices

FORMS: dict[str, tuple[str, Callable[[int], Any], Callable[[Any, int], Any]]] = {
    "tensor": ("prompt_embeds", lambda n: numbers(n, 3, 2), lambda v, i: v[i : i + 1]),
    "array": ("image", lambda n: numbers(n, 4, 4, 3).numpy(), lambda v, i: v[i : i + 1]),
    "pictures": ("image", lambda n: [picture(i) for i in range(n)], lambda v, i: [v[i]]),
    "texts": ("negative_prompt", lambda n: NAMES[:n], lambda v, i: [v[i]]),
    "layers first": (
        "prompt_embeds_llama3",
        lambda n: numbers(6, n, 3),
        lambda v, i: v[:, i : i + 1],
    ),
    "per adapter, guided": (
        "ip_adapter_image_embeds",
        lambda n: [numbers(2 * n, 1, 4), numbers(n, 1, 4, seed=1)],
        lambda v, i: [v[0][[i, len(v[1]) + i]], v[1][i : i + 1]],
    ),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(np.array_equal(a, b))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(which=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_any_choice_of_prompts_is_one_of_their_inputs(form: str, which: list[int]) -> None:
    name, made, row = FORMS[form]
    value = made(3)
    prompts, rest = Prompts.of(NAMES[:3]).with_call({name: value, "height": 32}, None)
    assert rest == {"height": 32}
    taken = prompts.take(which)
    for place, i in enumerate(which):
        alone = taken[place : place + 1]
        assert alone.texts == [NAMES[i]]
        assert same(alone.arguments({"prompt": None})[name], row(value, i))
        assert alone == prompts[i : i + 1] and alone.keys == [prompts.keys[i]]
    assert taken.take(range(len(which))).keys == taken.keys


@pytest.mark.parametrize("form", FORMS)
def test_prompts_of_equal_texts_are_told_apart_by_what_comes_with_them(form: str) -> None:
    name, made, _ = FORMS[form]
    prompts, _ = Prompts.of(["same"] * 3).with_call({name: made(3)}, None)
    assert len(set(prompts.keys)) == 3
    assert prompts != prompts.take([1, 0, 2])


@pytest.mark.parametrize(
    "shared",
    [
        {"image": picture(0)},
        {"image": numbers(3, 32, 32)},
        {"mask_image": numbers(1, 1, 32, 32)},
        {"negative_prompt": "bad"},
        {"timesteps": [3, 2, 1, 0], "sigmas": [1.0, 0.5, 0.2, 0.1], "original_size": (1, 2, 3, 4)},
    ],
)
def test_what_all_prompts_share_stays_an_argument_of_the_call(shared: dict[str, Any]) -> None:
    prompts, rest = Prompts.of(NAMES[:4]).with_call(shared, None)
    assert rest == shared and not prompts.columns


def test_one_row_of_embeddings_is_for_all_prompts() -> None:
    one = numbers(1, 3, 2)
    prompts, _ = Prompts.of(NAMES[:4]).with_call({"negative_prompt_embeds": one}, None)
    assert torch.equal(prompts[2:].arguments({})["negative_prompt_embeds"], one.expand(2, 3, 2))


def test_several_control_nets_have_the_images_of_all_prompts_each() -> None:
    host = type("Host", (), {"controlnet": type("Several", (), {"nets": ()})()})()
    images = [numbers(3, 3, 8, 8), picture(0), [picture(i) for i in range(3)]]
    prompts, rest = Prompts.of(NAMES[:3]).with_call({"image": images}, host)
    found = prompts[1:2].arguments({})["image"]
    assert torch.equal(found[0], images[0][1:2]) and found[1] is images[1] and not rest
    assert found[2] == [images[2][1]]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 entries for 5 prompts"),
        ({"prompt_embeds": numbers(4, 2, 2)}, "prompt_embeds has 4 entries for 5 prompts"),
        ({"latents": numbers(1, 4, 8, 8)}, "latents has 1 entries for 5 prompts"),
        ({"image": [picture(0)] * 2}, "image has 2 entries for 5 prompts"),
        ({"generator": torch.Generator()}, "'generator'.*seed="),
        ({"guidance_scale": 3.0}, "'guidance_scale'.*guidance_scale="),
        ({"prompt": ["x"] * 5}, "'prompt'.*prompts="),
        ({"prompt": None}, "no prompt_embeds"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_runs(
    sd3: TinyPipeline, wrong: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CalibrationError, match=expected):
        Run(sd3.pipe, NAMES, STEPS, call=wrong)


def test_a_declared_input_has_an_entry_per_prompt() -> None:
    assert Prompts.of(prompt_embeds=numbers(3, 2, 2)).texts == ["0", "1", "2"]
    for wrong in ({"image": picture(0)}, {"anything": [1, 2]}):
        with pytest.raises(CalibrationError, match=next(iter(wrong))):
            Prompts.of(NAMES, **wrong)
    with pytest.raises(CalibrationError, match="neither"):
        Prompts.of()


def test_given_noise_needs_prompts_to_hold_out(sd3: TinyPipeline) -> None:
    run = Run(sd3.pipe, NAMES, STEPS, call={"latents": numbers(5, 4, 8, 8)})
    with pytest.raises(CalibrationError, match=r"latents.*at least 8 prompts"):
        Pairs.of(run)


# ---- embeddings alone


def embeddings(name: str, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What ``encode_prompt`` gives, by the arguments that take it."""
    text = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    masked = ("prompt_embeds", "prompt_attention_mask")
    if name == "sdxl":
        return dict(zip((*text, *pooled), pipe.encode_prompt(prompts), strict=True))
    if name == "sd3":
        found = pipe.encode_prompt(prompts, None, None, max_sequence_length=32)
        return dict(zip((*text, *pooled), found, strict=True))
    if name == "flux":
        first, second, _ = pipe.encode_prompt(prompts, None, max_sequence_length=32)
        return {"prompt_embeds": first, "pooled_prompt_embeds": second}
    found = pipe.encode_prompt(prompts, max_sequence_length=32, clean_caption=False)
    return dict(zip((*masked, *(f"negative_{m}" for m in masked)), found, strict=True))


@pytest.mark.parametrize("name", ["sdxl", "flux", "pixart_sigma", "sd3"])
@torch.no_grad()
def test_embeddings_do_without_encoders(name: str) -> None:
    tiny = ALL[name]()
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    asked = {"guidance_scale": tiny.guidance_scale, "batch_size": 2, "seed": 5}
    texts = Run(tiny.pipe, NAMES[:3], STEPS, call=call, **asked)
    wanted = [texts.sample(batch) for batch in texts.batches()]
    given = embeddings(name, tiny.pipe, NAMES[:3])
    for part in [k for k in tiny.pipe.components if k.startswith(("text_encoder", "tokenizer"))]:
        setattr(tiny.pipe, part, None)
    run = Run(tiny.pipe, NAMES[:3], STEPS, call={**call, **given}, **asked)
    for found, expected in zip(map(run.sample, run.batches()), wanted, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    kept = Prompts.of(NAMES[:3], **given)
    options = {**asked, "num_inference_steps": STEPS, "call": call, "progress": False}
    record = evenkeel.calibrate(tiny.pipe, quantized=quantized, prompts=kept, **options)
    assert len(record.seeds) == 3 and len({tuple(k.tolist()) for k in record.prompt_keys}) == 3
    if name == "sd3":
        options["quantized"] = quantized
        for fit in (evenkeel.fit_readout, evenkeel.fit_tac, evenkeel.refit_branches):
            fit(tiny.pipe, prompts=kept, **options)
        found = compare(
            tiny.pipe,
            standard_arms(tiny.pipe, options.pop("quantized"), []),
            prompts=kept,
            **options,
        )
        assert len(found.images["quantized"]) == 3


def test_without_encoders_what_is_missing_is_said() -> None:
    tiny = ALL["sd3"]()
    for part in [k for k in tiny.pipe.components if k.startswith(("text_encoder", "tokenizer"))]:
        setattr(tiny.pipe, part, None)
    run = Run(tiny.pipe, NAMES, STEPS, call=tiny.call)
    with pytest.raises(EvenkeelError, match=r"no text_encoder.*prompt_embeds"):
        run.sample(run.batches()[0])


def test_every_prompt_meets_its_own_noise_and_negative_prompt(sd3: TinyPipeline) -> None:
    given = {"negative_prompt": ["dark", "", "bright"], "latents": numbers(3, 4, 16, 16)}
    one, many = (
        Run(sd3.pipe, NAMES[:3], STEPS, call={**sd3.call, **given}, batch_size=size)
        for size in (1, 3)
    )
    (whole,) = (many.sample(batch) for batch in many.batches())
    parts = torch.cat([one.sample(batch) for batch in one.batches()])
    assert torch.allclose(whole, parts, atol=1e-4)
    swapped = Run(sd3.pipe, NAMES[:3], STEPS, call={**sd3.call, "latents": given["latents"]})
    assert not torch.allclose(swapped.sample(swapped.batches()[0]), whole, atol=1e-4)


# ---- kept only for what is the same


def key_of(tiny: TinyPipeline, **options: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompts": NAMES[:2], "num_inference_steps": STEPS, "call": tiny.call}
    run = Run(tiny.pipe, **{**asked, **options})
    return run.key(tiny.model) | {"prompts": run.prompts.keys}


def nudge(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0].add_(0.25)


def add_lora(tiny: TinyPipeline) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    tiny.model.add_adapter(adapter, adapter_name="a")  # type: ignore[operator]


CHANGES: dict[str, dict[str, Callable[[TinyPipeline], Any]]] = {
    "sdxl": {
        "autoencoder": lambda t: nudge(t.pipe.vae),
        "text encoder": lambda t: nudge(t.pipe.text_encoder_2),
        "denoiser": lambda t: nudge(t.model),
        "tiling": lambda t: t.pipe.vae.enable_tiling(),
        "freeu": lambda t: t.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "dropout": lambda t: t.pipe.text_encoder.train(),
        "attention": lambda t: t.model.set_attn_processor(AttnProcessor()),
        "vocabulary": lambda t: t.pipe.tokenizer.add_tokens(["<mine>"]),
        "token length": lambda t: setattr(t.pipe.tokenizer, "model_max_length", 20),
        "scheduler": lambda t: t.pipe.scheduler.register_to_config(beta_end=0.013),
        "betas": lambda t: t.pipe.scheduler.alphas_cumprod.mul_(0.5),
        "pipeline": lambda t: t.pipe.register_to_config(force_zeros_for_empty_prompt=False),
    },
    "sd3": {
        "shift": lambda t: t.pipe.scheduler.set_shift(5.0),
        "encoder gone": lambda t: setattr(t.pipe, "text_encoder_3", None),
        "adapter": lambda t: add_lora(t),
        "its strength": lambda t: t.model.set_adapters(["a"], [0.5]),  # type: ignore[operator]
        "none active": lambda t: t.model.disable_adapters(),  # type: ignore[operator]
    },
}


@pytest.mark.parametrize("pipeline", CHANGES)
def test_whatever_decides_about_an_image_is_in_the_key(pipeline: str) -> None:
    tiny = ALL[pipeline]()
    seen = [key_of(tiny)]
    assert key_of(ALL[pipeline]()) == seen[0]  # another process
    for name, change in CHANGES[pipeline].items():
        change(tiny)
        assert key_of(tiny) not in seen, name
        seen.append(key_of(tiny))


@pytest.mark.parametrize("name", ["sdxl", "sana", "dit"])
def test_a_run_does_not_change_the_key(name: str) -> None:
    tiny = ALL[name]()
    asked = {"prompts": tiny.prompts, "call": {**tiny.call, "output_type": "pt"}}
    before = key_of(tiny, **asked)
    run = Run(tiny.pipe, asked["prompts"], STEPS, call=asked["call"])
    run.sample(run.batches()[0])
    assert key_of(tiny, **asked) == before


@pytest.mark.parametrize("name", ["image", "negative_prompt_embeds", "latents", "mask_image"])
def test_the_content_of_every_input_is_in_the_key(sd3: TinyPipeline, name: str) -> None:
    count = 1 if name == "mask_image" else 2  # shared, and one for each
    values = [numbers(count, 3, 32, 32, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (key_of(sd3, call={name: value}) for value in values)
    assert first == again != other


def test_what_nobody_can_recognise_is_not_kept(sd3: TinyPipeline) -> None:
    call = {**sd3.call, "callback_on_step_end": lambda *_: {}}
    run = Run(sd3.pipe, NAMES, STEPS, call=call)
    run.sample(run.batches()[0].alone)
    with pytest.raises(CalibrationError, match=r"callback_on_step_end.*keep nothing"):
        run.refuse_unknown()


def test_images_and_parts_are_not_used_again_for_other_components(tmp_path: Any) -> None:
    tiny = ALL["sd3"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    asked = {"prompts": NAMES[:2], "num_inference_steps": STEPS, "call": call, "progress": False}

    def images() -> Any:
        arms = standard_arms(tiny.pipe, quantized, [])
        return compare(tiny.pipe, arms, folder=tmp_path / "images", **asked).images

    def part() -> Any:
        return evenkeel.calibrate(
            tiny.pipe, quantized=quantized, resume=tmp_path / "parts", batch_size=1, **asked
        )

    first = images()
    again = images()
    assert all(torch.equal(first[name], again[name]) for name in first)
    calls = iter(range(STEPS + 1))  # the first batch and half of the second
    hook = quantized.register_forward_pre_hook(lambda *_: (next(calls), None)[1])
    with pytest.raises(StopIteration):
        part()
    hook.remove()
    assert list((tmp_path / "parts").glob("part-*"))
    nudge(tiny.pipe.text_encoder_3)
    with pytest.raises(StorageError, match="other"):
        images()
    with pytest.raises(StorageError):
        part()


@pytest.fixture(scope="module")
def sd3() -> TinyPipeline:
    return ALL["sd3"]()


# ---- another resolution than measured


def test_another_resolution_is_remarked_on_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    tiny = ALL["sd3"]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    asked = {"prompts": NAMES[:2], "num_inference_steps": STEPS, "call": call, "progress": False}
    asked |= {"quantized": quantized, "guidance_scale": tiny.guidance_scale}
    record = evenkeel.calibrate(tiny.pipe, **asked)
    tac = evenkeel.fit_tac(tiny.pipe, **asked)
    tiny.pipe.transformer = quantized
    larger = {"height": 64, "width": 64}
    said = "measured on latents of shape (4, 16, 16), and this run samples (4, 32, 32)"
    with evenkeel.applied(tiny.pipe, evenkeel.QDrift(record.evidence, min_explained=0.0)):
        generate(tiny, steps=STEPS)
        assert said not in caplog.text
        for _ in range(2):  # once is enough
            generate(tiny, steps=STEPS, **larger)
        assert caplog.text.count(said) == 1
    with (
        evenkeel.applied(tiny.pipe, tac),
        pytest.raises(Incompatible, match=r"shape \(4, 16, 16\).*\(4, 32, 32\)"),
    ):
        generate(tiny, steps=STEPS, **larger)

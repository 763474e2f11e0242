"""A seeded part of ``scripts/fuzz``: damaged files are refused by name, or say the same."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import tiny_pipelines
from fuzzing import damage, files
from fuzzing.command_line import Outcome
from fuzzing.sandbox import sandbox
from safetensors.torch import load_file, save_file

from evenkeel.cli.sources import load_denoiser, load_pipeline
from evenkeel.errors import EvenkeelError, StorageError
from evenkeel.hosts.foreign_files import check_diffusers_folder, loading
from evenkeel.storage import Kind, parse_json, read_json, write_json

SEEDS = {
    "record": 40,
    "readout": 15,
    "images": 40,
    "twin": 30,
    "adapters": 6,
    "restored": 10,
    "quantized": 12,
    "resume": 12,
    "piece": 8,
    "training": 8,
    "zoo-training": 8,
    "blueprint": 8,
    "denoiser": 8,
    "pipeline": 8,
    "gguf": 8,
}


def test_every_kind_has_its_share():
    assert SEEDS.keys() == files.KINDS.keys()


@pytest.mark.parametrize("kind", SEEDS)
def test_damage_is_refused_by_name_or_changes_nothing(kind):
    if kind == "gguf":
        pytest.importorskip("gguf")
    with sandbox():
        found = [*files.outcomes(kind, range(SEEDS[kind]))]
    assert [(seed, x.word, x.said) for seed, x in found if x.word.isupper()] == []
    assert Counter(x.word for _, x in found)["refused"] > SEEDS[kind] // 3


def test_the_judge_sees_faults():
    def judged(load, expected="good", ours=True, signed=False):
        kind = files.FileKind(lambda place: None, load, ours)
        found = files._judged(kind, Path("bad"), Path("bad/file.json"), expected, signed)
        assert isinstance(found, Outcome)
        return found.word

    def raising(error):
        def load(place):
            raise error

        return load

    assert judged(lambda _: "good") == "same"
    assert judged(lambda _: "other") == "SILENT CHANGE"
    assert judged(lambda _: "other", ours=False) == judged(lambda _: "other", signed=True)
    drawn = iter("ab")
    assert judged(lambda _: next(drawn), ours=False) == "BY CHANCE"
    assert judged(raising(KeyError("x"))) == "TRACEBACK"
    assert judged(raising(EvenkeelError("something is wrong"))) == "NAMELESS"
    assert judged(raising(EvenkeelError("bad/file.json is damaged"))) == "refused"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "LIMIT", -1.0)
        assert judged(lambda _: "good") == "SLOW"
        patch.setattr(files, "LIMIT", 10.0)
        patch.setattr(files, "MEMORY", -1.0)
        assert judged(lambda _: "good") == "TOO MUCH MEMORY"


@pytest.mark.parametrize("text", [damage.DEEP, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[1" * 300])
def test_a_bomb_of_json_is_no_json(text, tmp_path):
    with pytest.raises(ValueError, match=r"nested|Expecting"):
        parse_json(text)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(StorageError, match=r"config\.json is damaged"):
        check_diffusers_folder(tmp_path)
    kind = Kind("thing", 1, "make it again", keys=("a",))
    with pytest.raises(StorageError, match=r"config\.json is not JSON"):
        read_json(tmp_path / "config.json", kind)


@pytest.mark.parametrize("value", [2**31, 10**400, -(2**62), 1e12, float("nan")], ids="abcde")
def test_a_number_that_no_network_has_is_refused_before_it_is_built(value, tmp_path):
    text = json.dumps({"a": 1, "lambda_min_clipped": -float("inf"), "num_layers": [value]})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StorageError, match=r"config\.json is damaged: .*num_layers holds"):
        check_diffusers_folder(tmp_path)


def test_a_forged_folder_is_refused_before_a_network_without_end_is_built():
    with sandbox() as place:
        files.KINDS["quantized"].make(place)
        path = place / "quantized.json"
        found = json.loads(path.read_bytes())
        found["config"]["num_layers"] = 2**31
        path.write_bytes(files._signed_json(json.dumps(found).encode()))
        with pytest.raises(StorageError, match="num_layers holds a number of 32 bits"):
            files.KINDS["quantized"].load(place)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("how", ["gone", "renamed"])
def test_weights_that_no_file_holds_are_not_made_up(part, how, tmp_path):
    tiny_pipelines.pixart_sigma().pipe.save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).text_encoder is not None
    path = next((tmp_path / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[0]
    lost = tensors.pop(name)
    save_file(tensors | ({"another": lost} if how == "renamed" else {}), path, {"format": "pt"})
    with pytest.raises(StorageError, match=rf"its {part} is incomplete: .*{re.escape(name)}"):
        load_pipeline(str(tmp_path))
    if part == "transformer":
        whole = tiny_pipelines.pixart_sigma().pipe
        with pytest.raises(StorageError, match=rf"{part} is incomplete: .*{re.escape(name)}"):
            load_denoiser(str(tmp_path / part), whole)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', b'{"\xed\xa0\x80": 1}'])
def test_half_a_character_is_no_text(text):
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(text)


def test_what_others_raise_is_one_error_with_the_source():
    for error in (
        KeyError("weight"),
        AssertionError(),
        RuntimeError("a\nb"),
        RecursionError("deep"),
    ):
        with (
            pytest.raises(EvenkeelError, match=r"^'here' is not a model: \w+Error") as caught,
            loading("here", "a model"),
        ):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="as it is"), loading("here", "a model"):
        raise StorageError("as it is")


def test_a_deep_header_is_refused_when_it_is_written_too(tmp_path):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(StorageError):
        write_json(tmp_path / "x.json", Kind("thing", 1, "again", keys=("a",)), {"a": deep})

"""What is kept of unfinished work is taken in for the same work only, and by one process at a time."""

import os

import pytest
import torch
from small_denoisers import dit
from synthetic_record import part
from tiny_pipelines import ALL

from evenkeel.errors import StorageError
from evenkeel.fitting import calibrate
from evenkeel.fitting.calibration.kept_batches import Parts
from evenkeel.fitting.quantize import PARTIAL, quantize
from evenkeel.hosts.pipeline.prompts import Prompts
from evenkeel.hosts.run import Batch
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.quantizers.saved.progress_files import Partial
from evenkeel.storage import alone, write_atomically


@pytest.fixture(scope="module")
def tiny():
    return ALL["dit"]()


def test_the_second_of_two_calibrations_is_told(tiny, tmp_path):
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w4a16-g16"))[0]
    with alone(tmp_path / "kept"), pytest.raises(StorageError, match=r"kept is being written to"):
        calibrate(
            tiny.pipe,
            quantized=quantized,
            prompts=[0, 1],
            num_inference_steps=2,
            resume=tmp_path / "kept",
            progress=False,
        )


def test_the_second_of_two_quantizations_is_told(tiny, tmp_path):
    with alone(tmp_path / PARTIAL), pytest.raises(StorageError, match=r"partial is being written"):
        quantize(tiny.pipe, QuantizerSpec(4), out=tmp_path, progress=False)


def test_rows_of_another_batch_are_refused(tmp_path):
    """An orphan of another writer, with other seeds, was taken in silently as the first batch."""
    record = part(0)
    prompts, first = Prompts.of(["a", "b"]), int(record.seeds[0])
    parts = Parts(tmp_path, [Batch(prompts, 0, first)])
    parts.put(0, record)
    with pytest.raises(StorageError, match=r"part-00000\.safetensors holds other prompts or seeds"):
        parts.frame()
    with pytest.raises(StorageError, match="other prompts or seeds"):
        parts.merged(1)


def test_a_unit_moved_here_from_another_run_or_another_unit_is_refused(tmp_path):
    torch.manual_seed(0)
    module = quantize_module(dit(), QuantizerSpec(4))[0]
    one, other = module.evenkeel_report.quantized[:2]

    def kept(place, identity):
        partial = Partial(tmp_path / place, identity)
        for layer in (one, other):
            partial.write(layer.name, {layer.name: module.get_submodule(layer.name)}, [layer])
        partial.stage("bits", lambda: {"of": identity})
        return partial

    here, there = kept("here", "this run"), kept("there", "another run")
    assert here.read(one.name, dit()) is not None
    os.replace(there._place(one.name), here._place(one.name))
    with pytest.raises(StorageError, match=r"made by .*another run"):
        here.read(one.name, dit())
    os.replace(here._place(other.name), here._place(one.name))
    with pytest.raises(StorageError, match=r"made by .*this run"):
        here.read(one.name, dit())
    os.replace(there.folder / "bits.json", here.folder / "bits.json")
    with pytest.raises(StorageError, match="another run"):
        here.stage("bits", dict)


def test_what_a_library_makes_of_a_full_disk_names_the_file(tmp_path):
    """As safetensors says it."""

    def raising(text):
        def content(path):
            raise RuntimeError(text)

        return content

    with pytest.raises(OSError, match=r"No space left on device.*weights") as caught:
        write_atomically(
            tmp_path / "weights", raising("I/O error: No space left on device (os error 28)")
        )
    assert caught.value.errno == 28
    with pytest.raises(RuntimeError, match="something else"):
        write_atomically(tmp_path / "w", raising("something else"))

"""What can go wrong, as a tree.

EvenkeelError
├── CalibrationError      the evidence is missing, too thin, not finite, or not repeatable
├── StorageError          a file or folder is missing, damaged, foreign, changed or of another version
│   └── RecordError       the same of a record or a readout
├── Incompatible          record, model, scheduler and guidance do not belong together
├── OutOfRange            statistics were asked for at a noise level that was not calibrated
├── UnsupportedSampler    a step is not of a form this library can correct
├── UnsupportedPipeline   no denoiser, an unknown latent layout, a missing component
├── QuantizationError     a quantizer specification or a layer that cannot be quantized
├── ProcessError          another of several processes failed, is gone, or was asked for something else
├── MissingExtra          an optional package is not installed; names the extra that brings it
└── MetricError           too few images, unequal numbers, shapes that do not match
"""

from __future__ import annotations


class EvenkeelError(Exception):
    """Base class; catch this to catch everything the library raises on purpose."""


class CalibrationError(EvenkeelError, ValueError):
    """The evidence is missing, too thin, not finite, or not repeatable.

    The two denoisers are the same, a record holds fewer prompts than a statistic needs, a network gave NaN,
    or the same call gave two results. To do: check that the quantized denoiser is the one that was meant,
    give more prompts, take bfloat16 in place of float16, and put every module into ``eval()``.
    """


class StorageError(EvenkeelError, ValueError):
    """A file or folder is missing, damaged, foreign, changed, or was written by another version.

    What was not written whole, or not here, is never read in part. To do: take the file from where it came
    from, or make it again; of a folder with unfinished work of another run, name another folder.
    """


class RecordError(StorageError):
    """The file is not a record or readout, is damaged, or was written by another version.

    To do: ``evenkeel inspect FILE`` says what it is; calibrate or fit again where its version is another.
    """


class Incompatible(EvenkeelError, ValueError):
    """Record, model, scheduler and guidance do not belong together.

    A correction that was measured on something else is a wrong correction, so each difference is named with
    both values. To do: load the denoiser, scheduler or guidance that it was made for, fit it again for
    what you have, or pass the word of that difference as ``allow=`` (``--allow``) where it is meant.
    """


class OutOfRange(EvenkeelError, ValueError):
    """Statistics were asked for at a noise level that was not calibrated.

    More steps or another schedule reach levels between or beyond those of the record. To do: calibrate with
    the schedule that you run, or pass ``allow=("range",)`` to leave such steps alone.
    """


class UnsupportedSampler(EvenkeelError, ValueError):
    """A step is not of a form this library can correct.

    It clips or thresholds, is not linear in what the network said, or its configuration gives NaN. To do:
    switch clipping off in the scheduler's configuration, or take another scheduler of the same family;
    adapters, once fitted, ask nothing of it.
    """


class UnsupportedPipeline(EvenkeelError, ValueError):
    """No denoiser, an unknown latent layout, or a missing component.

    To do: give a pipeline of diffusers with one ``transformer`` or ``unet``, install the backend that
    the weights were made with, or load the missing component.
    """


class QuantizationError(EvenkeelError, ValueError):
    """A quantizer specification or a layer that cannot be quantized.

    To do: the sentence lists what is known, or names the layer; layers can be kept by ``skip``.
    """


class MetricError(EvenkeelError, ValueError):
    """Too few images, unequal numbers, or shapes that do not match.

    To do: compare as many images in every arm, of one size, and more of them for distances between sets.
    """


class ProcessError(EvenkeelError, RuntimeError):
    """Another of several processes failed, is gone, or was asked for something else.

    To do: look at that process's own message, which comes first, and start all with the same command.
    """


class MissingExtra(EvenkeelError, ImportError):
    """A package that an optional extra brings is not installed.

    To do: ``pip install 'evenkeel[EXTRA]'`` with the extra that the sentence names.
    """


#: Ends the sentence about a value that is NaN or infinite.
OVERFLOW = "float16 often overflows where bfloat16 does not."

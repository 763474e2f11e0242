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
    """The evidence is missing, too thin, not finite, or not repeatable."""


class StorageError(EvenkeelError, ValueError):
    """A file or folder is missing, damaged, foreign, changed, or was written by another version."""


class RecordError(StorageError):
    """The file is not a record or readout, is damaged, or was written by another version."""


class Incompatible(EvenkeelError, ValueError):
    """Record, model, scheduler and guidance do not belong together."""


class OutOfRange(EvenkeelError, ValueError):
    """Statistics were asked for at a noise level that was not calibrated."""


class UnsupportedSampler(EvenkeelError, ValueError):
    """A step is not of a form this library can correct."""


class UnsupportedPipeline(EvenkeelError, ValueError):
    """No denoiser, an unknown latent layout, or a missing component."""


class QuantizationError(EvenkeelError, ValueError):
    """A quantizer specification or a layer that cannot be quantized."""


class MetricError(EvenkeelError, ValueError):
    """Too few images, unequal numbers, or shapes that do not match."""


class ProcessError(EvenkeelError, RuntimeError):
    """Another of several processes failed, is gone, or was asked for something else."""


class MissingExtra(EvenkeelError, ImportError):
    """A package that an optional extra brings is not installed."""


#: Ends the sentence about a value that is NaN or infinite.
OVERFLOW = "float16 often overflows where bfloat16 does not."

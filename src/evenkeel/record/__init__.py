"""The record: one small, safe file that holds what a calibration measured and what it was made for."""

from evenkeel.record.correction_file import load as load
from evenkeel.record.correction_file import load_correction as load_correction
from evenkeel.record.correction_file import save as save
from evenkeel.record.record import SCHEMA_VERSION as SCHEMA_VERSION
from evenkeel.record.record import Record as Record
from evenkeel.record.record import canonical_order as canonical_order
from evenkeel.record.record import fixed_point_spectrum as fixed_point_spectrum
from evenkeel.record.record import prompt_key as prompt_key
from evenkeel.statistics.provenance import Provenance as Provenance
from evenkeel.statistics.provenance import differences as differences

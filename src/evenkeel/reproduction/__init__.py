"""The cells of the papers' tables, as data, and what they give here."""

from __future__ import annotations

from evenkeel.reproduction.cells import PAPERS as PAPERS
from evenkeel.reproduction.cells import Cell as Cell
from evenkeel.reproduction.cells import Paper as Paper
from evenkeel.reproduction.cells import Row as Row
from evenkeel.reproduction.cells import paper as paper
from evenkeel.reproduction.verdict import Verdict as Verdict
from evenkeel.reproduction.verdict import judged as judged

"""Results for people: tables for the terminal, plots, and one HTML file that holds everything.

Presentation only. Numbers arrive measured, as a dictionary that JSON can hold; nothing here measures,
averages or tests anything, so a table made again from a saved file is the same table.
"""

from __future__ import annotations

from evenkeel.reports.html import write_report as write_report
from evenkeel.reports.measures import MEASURES as MEASURES
from evenkeel.reports.measures import Measure as Measure
from evenkeel.reports.measures import verdict as verdict
from evenkeel.reports.plots import correlation_plot as correlation_plot
from evenkeel.reports.plots import factor_plot as factor_plot
from evenkeel.reports.plots import gain_slope_plot as gain_slope_plot
from evenkeel.reports.plots import image_grid as image_grid
from evenkeel.reports.plots import spectrum_plot as spectrum_plot
from evenkeel.reports.plots import variance_plot as variance_plot
from evenkeel.reports.summary import summary as summary
from evenkeel.reports.table import markdown_table as markdown_table
from evenkeel.reports.table import text_table as text_table

__all__ = [
    "MEASURES",
    "Measure",
    "correlation_plot",
    "factor_plot",
    "gain_slope_plot",
    "image_grid",
    "markdown_table",
    "spectrum_plot",
    "summary",
    "text_table",
    "variance_plot",
    "verdict",
    "write_report",
]

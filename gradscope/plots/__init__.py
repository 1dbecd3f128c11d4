"""Figures from a cube, schedules or training logs: each function returns a plotly figure and writes nothing.

plotly is imported when a function is called, not when this package is.
"""

from gradscope.plots.bias_variance import plot_bias_variance
from gradscope.plots.compare import plot_compare
from gradscope.plots.groups import plot_groups
from gradscope.plots.heatmap import plot_heatmap
from gradscope.plots.schedule import plot_schedule
from gradscope.plots.schedules import plot_schedules
from gradscope.plots.training import plot_training

__all__ = [
    "plot_bias_variance",
    "plot_compare",
    "plot_groups",
    "plot_heatmap",
    "plot_schedule",
    "plot_schedules",
    "plot_training",
]

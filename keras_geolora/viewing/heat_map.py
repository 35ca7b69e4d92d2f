"""Draws the ranks of layers during training."""

import pathlib

import numpy as np

from keras_geolora.viewing.abbreviation import abbreviated

# Characters for the path of a layer.
LABEL_WIDTH = 44
# The most columns whose numbers are readable side by side.
MAX_COLUMNS = 24


def check_can_draw(filename):
    """Refuses a file name that is not PNG, or a missing matplotlib."""
    if pathlib.Path(filename).suffix.lower() != ".png":
        raise ValueError(
            "The heat map is a PNG file, so its name must end in '.png'. "
            f"Received: '{filename}'"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "The heat map is drawn by matplotlib. Run: "
            '`pip install "keras_geolora[plot]"`'
        ) from error


def heat_map(steps, paths, table, title=None):
    """Returns the `matplotlib.figure.Figure` of the ranks.

    It has its own canvas, so that pyplot's figures and backend do not change.

    Args:
        steps: List of ints, the number of updates of each column.
        paths: List of strings, the layer of each row.
        table: Array of shape `(rows, columns)`, NaN where there is no rank.
        title: String or `None`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    if title is None:
        first, last = np.nanmean(table[:, 0]), np.nanmean(table[:, -1])
        title = (
            f"Ranks found in training: on average {first:.1f} at first, "
            f"{last:.1f} at last"
        )
    readings = len(steps)
    if readings > MAX_COLUMNS:
        shown = np.linspace(0, readings - 1, MAX_COLUMNS).round().astype(int)
        steps, table = [steps[i] for i in shown], table[:, shown]
    common, names = abbreviated(paths, LABEL_WIDTH)
    rows, columns = table.shape
    width = 1.8 + 0.062 * max(map(len, names)) + 0.34 * columns
    figure = Figure(
        (max(width, 7), 1.6 + 0.2 * rows), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = figure.add_subplot()
    low, high = np.nanmin(table), np.nanmax(table)
    high = max(high, low + 1)
    greys = LinearSegmentedColormap.from_list("greys", ["0.96", "0.3"])
    image = axes.imshow(table, greys, vmin=low, vmax=high, aspect="auto")
    write_numbers(axes, table, dark=low + 0.7 * (high - low))
    write_labels(axes, steps, names)
    draw_lines(axes, names, columns)
    axes.set_ylabel(f"layer, below '{common}'" if common else "layer")
    some = f" ({columns} of {readings} readings)" if columns < readings else ""
    axes.set_xlabel(f"updates{some}")
    bar = figure.colorbar(
        image,
        ax=axes,
        label="rank",
        shrink=0.5 if rows > 16 else 1,
        aspect=20,
        anchor=(0, 1),
    )
    bar.locator.set_params(integer=True)
    bar.update_ticks()
    return figure


def write_numbers(axes, table, dark):
    """Writes the rank into every cell, in white if the cell is dark."""
    for (row, column), rank in np.ndenumerate(table):
        if np.isfinite(rank):
            axes.text(
                column,
                row,
                f"{rank:.0f}",
                color="white" if rank > dark else "black",
                fontsize=7,
                ha="center",
                va="center",
            )


def write_labels(axes, steps, names):
    """Names the rows and the columns."""
    turned = 90 if steps[-1] >= 10**4 else 0
    axes.set_xticks(range(len(steps)), steps, fontsize=7, rotation=turned)
    axes.set_yticks(range(len(names)), names, fontsize=7)


def draw_lines(axes, names, columns):
    """Draws white lines between cells, black ones between model parts."""
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    parts = [name.split("/")[0] for name in names]
    for row in range(1, len(names)):
        if "/" in names[row] and parts[row] != parts[row - 1]:
            axes.axhline(row - 0.5, color="black", linewidth=1)

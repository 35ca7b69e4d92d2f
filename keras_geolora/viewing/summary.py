"""Summary and plot of an adapted model."""

import io
import math
import pathlib

import numpy as np
from keras import ops

from keras_geolora.geometry import manifold
from keras_geolora.layers.clipping import asked_of
from keras_geolora.layers.factor import factors_of, matrices
from keras_geolora.layers.raw_weights import add_raw_weights
from keras_geolora.layers.tree import (
    adapted_layers,
    layers_with_adapters,
    walk,
)
from keras_geolora.optimizer.geolora import UNLIMITED, find_geolora
from keras_geolora.viewing.abbreviation import abbreviated
from keras_geolora.viewing.folding import fold
from keras_geolora.viewing.heat_map import check_can_draw, heat_map
from keras_geolora.viewing.rank_table import read_ranks
from keras_geolora.viewing.reach import Reach
from keras_geolora.whole_files import write_whole

BARS = "▁▂▃▄▅▆▇█"
# Width of a spectrum and of a path, in characters.
BAR_WIDTH = 16
PATH_WIDTH = 40
# As many rows are never folded.
FEW_ROWS = 12
# Columns that begin at the left; numbers end at the right.
LEFT = ("layer", "layers", "singular values")


def geolora_summary(
    model, print_fn=print, style="text", optimizer=None, expand=False
):
    """Prints a table of all adapters, and returns it as data.

    Also a method of every `keras.Model`: `model.geolora_summary()`. The
    columns are

    - the path of the layer, and the shape of its kernel as a matrix,
    - the current rank and the largest possible one; of experts, the range of
      their ranks and the mean,
    - a bar for each singular value, relative to the largest of the layer, and a
      dot for each free rank; of experts, the largest of their singular values,
    - the largest and the smallest singular value, `scale` included,
    - `dropped`: the share of the Frobenius norm of the update that its last
      truncation discarded,
    - `params`: the parameters of the update at its rank,
    - `share`: their share of the parameters of all adapters. With a
      `rank_budget` or `parameter_budget` it is `budget`, the share of that.

    If there are more than 12 rows, repeated layers, whose paths differ only in
    numbers, are folded into one row, unless `expand` is set. In place of the
    path it has a pattern, such as `.*/query`, that matches exactly these layers
    and can be used in `targets` and other arguments of `enable_geolora`. It
    shows how many they are, the smallest and the largest rank, means of ranks
    and singular values, the largest singular value, and sums of `params` and
    `share`.

    Below the table are

    - totals,
    - the parameters of LoRA on the same layers, with the mean rank (rounded),
      and with the largest rank found: what LoRA would need to give every layer
      at least its rank here,
    - the largest orthonormality error of a basis, which should stay below 1e-5,
    - the share of the model's parameters that neither train nor have an
      adapter,
    - if there are any, ranks that `enable_geolora` clipped to the smaller side
      of a kernel, and factors that are off the manifold, as after averaging or
      training with another optimizer.

    Args:
        model: `keras.Model` with adapted layers.
        print_fn: Callable that takes one line, or `None` to print nothing.
        style: `"text"` or `"markdown"`. Defaults to `"text"`, which shortens
            long paths.
        optimizer: The `GeoLoRA` of a custom training loop, which knows what
            was dropped and the budget. Defaults to that of `model.compile`.
        expand: Bool, whether to print a row for every layer of a large model;
            or `"experts"`, to print one for every expert, too. Defaults to
            `False`.

    Returns:
        List of dicts, one for each adapted layer, also if the table is folded,
        with the keys `path`, `kernel_shape`, `experts` (their number, or
        `None`), `rank` (of experts the largest), `ranks` (a list with the rank
        of each expert, or of the layer), `max_rank`, `parameters`,
        `singular_values` (a list of floats, descending, `scale` included),
        `orthogonality_error`, `discarded_share` (`None` if no `GeoLoRA`
        trains the layer), `parameter_share` (of the parameters of all
        adapters), `budget_share` (`None` without a budget) and `asked_ranks`
        (a dict of the ranks before they were clipped, or empty).

    Raises:
        ValueError: If no layer is adapted, or `style` or `expand` is unknown.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    rows = model.geolora_summary()
    assert rows[0]["rank"] == 2 and rows[0]["parameters"] == 2 * (8 + 4) + 2

    lines = []
    model.geolora_summary(print_fn=lines.append, style="markdown")
    assert lines[2].startswith("| layer | kernel | rank |")
    ```
    """
    if style not in ("text", "markdown"):
        raise ValueError(
            f"`style` must be 'text' or 'markdown'. Received: style={style!r}"
        )
    if expand not in (True, False, "experts"):
        raise ValueError(
            "`expand` must be `True`, `False` or 'experts'. Received: "
            f"expand={expand!r}"
        )
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "Without adapters there is nothing to summarize; add them with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    optimizer = find_geolora(optimizer or getattr(model, "optimizer", None))
    rows = [
        {
            **describe(path, layer.adapter, optimizer),
            "asked_ranks": asked_of(layer),
        }
        for path, layer in layers.items()
    ]
    budget, unit = None, "ranks"
    if optimizer is not None:
        adapters = [layer.adapter for layer in layers.values()]
        budget, unit = optimizer.budget_of(adapters)
    if budget is not None:
        budget = int(ops.convert_to_numpy(budget))
        budget = budget if budget < UNLIMITED else None  # not yet
    total = sum(row["parameters"] for row in rows) or 1
    add_shares(rows, total, budget, unit)
    if print_fn is not None:
        write = as_text if style == "text" else as_markdown
        shown = rows
        if len(rows) > FEW_ROWS and not expand:
            known = add_raw_weights(dict(walk(model)), model)
            shown = folded_if_shorter(rows, known)
        if expand == "experts":
            shown = sum(
                (
                    rows_of_experts(row, layers[row["path"]].adapter, optimizer)
                    for row in rows
                ),
                [],
            )
            add_shares(shown, total, budget, unit)
        sentences = [
            *totals(rows, budget, unit),
            Reach.of(model).sentence(),
            *notes_on_ranks(rows),
            *warnings_of(layers_with_adapters(model).values()),
        ]
        for line in write(shown, model.name, sentences):
            print_fn(line)
    return rows


def folded_if_shorter(rows, known):
    """Returns the rows folded, or as they are if nothing repeats."""
    folded = fold(rows, known)
    return folded if len(folded) < len(rows) else rows


def add_shares(rows, total, budget, unit):
    """Adds the shares of all parameters, and of the budget if there is one."""
    for row in rows:
        used = sum(row["ranks"]) if unit == "ranks" else row["parameters"]
        row["parameter_share"] = row["parameters"] / total
        row["budget_share"] = used / budget if budget else None


def describe(path, adapter, optimizer=None):
    """Returns the row of one adapter, without its shares of the total."""
    shares = optimizer and optimizer.discarded_shares(adapter)
    blocks = matrices(adapter.trimmed(), adapter.count)
    row = row_of(path, adapter, blocks, shares)
    return {**row, "experts": adapter.count}


def rows_of_experts(row, adapter, optimizer=None):
    """Returns a row for each expert, or that of an adapter without any."""
    if adapter.count is None:
        return [row]
    shares = optimizer and optimizer.discarded_shares(adapter)
    blocks = matrices(adapter.trimmed(), adapter.count)
    return [
        row_of(f"{row['path']}[{i}]", adapter, [block], shares and [shares[i]])
        for i, block in enumerate(blocks)
    ]


def row_of(path, adapter, blocks, shares):
    """Returns the row of some of the matrices of an adapter.

    Args:
        path: String.
        adapter: `LowRankAdapter`.
        blocks: List of `U, S, V`, the arrays of each matrix.
        shares: List of what was discarded of each, or `None`.
    """
    ranks = [used_columns(U) for U, _, _ in blocks]
    sigma = np.array([S.diagonal() for _, S, _ in blocks]).max(axis=0)
    return {
        "path": path,
        "kernel_shape": (adapter.input_dim, adapter.output_dim),
        "experts": None,
        "rank": max(ranks),
        "ranks": ranks,
        "max_rank": adapter.max_rank,
        "parameters": sum(ranks) * adapter.parameters_per_rank,
        "singular_values": (abs(adapter.scale) * sigma)[: max(ranks)].tolist(),
        "orthogonality_error": max(
            manifold.basis_error(basis, rank)
            for (U, _, V), rank in zip(blocks, ranks, strict=True)
            for basis in (U, V)
        ),
        "discarded_share": shares and max(shares),
    }


def used_columns(basis):
    """Returns the number of columns that are not zero."""
    return int((basis != 0).any(axis=0).sum())


def matrices_in(row):
    """Returns the number of matrices that an adapter updates."""
    return row["experts"] or 1


def totals(rows, budget, unit):
    """Returns the totals below the table, as sentences."""
    ranks = [rank for row in rows for rank in row["ranks"]]
    total = sum(row["parameters"] for row in rows)
    kernels = sum(
        matrices_in(row) * math.prod(row["kernel_shape"]) for row in rows
    )
    mean, largest = sum(ranks) / len(ranks), max(ranks)
    worst = max(rows, key=lambda row: row["orthogonality_error"])
    sentences = [
        f"{len(rows)} adapters, mean rank {mean:.1f}, {total:,} parameters at "
        f"these ranks ({total / kernels:.2%} of the adapted kernels).",
        f"LoRA with rank {round(mean)} on the same layers (the mean): "
        f"{lora_parameters(rows, round(mean)):,} parameters.",
        f"LoRA with rank {largest} on the same layers (the largest found): "
        f"{lora_parameters(rows, largest):,} parameters.",
        f"Bases are orthonormal up to {worst['orthogonality_error']:.0e} "
        f"({worst['path']}).",
    ]
    if budget:
        used = sum(ranks) if unit == "ranks" else total
        sentences.insert(
            1,
            f"Budget: {used:,} of {budget:,} {unit} in use "
            f"({used / budget:.1%}).",
        )
    return sentences


def notes_on_ranks(rows):
    """Yields a sentence on ranks that were clipped, if any were."""
    clipped = [row for row in rows if row["asked_ranks"]]
    if not clipped:
        return
    listed = [
        f"{row['path']} ("
        + ", ".join(f"{k} {n}" for k, n in row["asked_ranks"].items())
        + f": now {min(row['kernel_shape'])})"
        for row in clipped[:4]
    ]
    more = f", ... ({len(clipped)} in all)" if len(clipped) > 4 else ""
    yield (
        "Ranks that were clipped to the smaller side of the kernel: "
        f"{', '.join(listed)}{more}."
    )


def warnings_of(layers):
    """Yields a warning if any factors are off the manifold."""
    far = manifold.far_off(factors_of(layers))
    if far:
        yield (
            f"Warning: {manifold.described(far)}. {manifold.RULE} Such an "
            f"adapter cannot be saved or merged. {manifold.MEND} "
            f"{manifold.AVERAGE}"
        )


def lora_parameters(rows, rank):
    """Returns the parameters of LoRA with the same rank on all layers."""
    return sum(
        matrices_in(row)
        * min(rank, *row["kernel_shape"])
        * sum(row["kernel_shape"])
        for row in rows
    )


def columns(rows):
    """Returns a dict from the title of a column to the texts in it."""
    texts = of_kind if "number" in rows[0] else of_layer
    cells = [{**texts(row), **share_of(row)} for row in rows]
    return {title: [texts[title] for texts in cells] for title in cells[0]}


def of_layer(row):
    """Returns the texts about one layer, by title."""
    sigma = row["singular_values"]
    return {
        "layer": row["path"],
        "kernel": shape_text(row),
        "rank": f"{rank_text(row)}/{row['max_rank']}",
        "singular values": spectrum(sigma, row["max_rank"]),
        "largest": two_digits(sigma[0] if sigma else 0.0),
        "smallest": two_digits(sigma[-1] if sigma else 0.0),
        "dropped": percent(row["discarded_share"]),
    }


def of_kind(row):
    """Returns the texts about all layers of a kind, by title."""
    ranks = "-".join(map(str, dict.fromkeys(row["ranks"])))
    return {
        "layers": row["path"],
        "number": str(row["number"]),
        "kernel": shape_text(row),
        "rank": f"{ranks}/{row['max_rank']}",
        "mean": f"{row['mean_rank']:.1f}",
        "singular values": spectrum(row["singular_values"], row["max_rank"]),
        "largest": two_digits(row["largest"]),
        "dropped": percent(row["discarded_share"]),
    }


def share_of(row):
    """Returns the texts about parameters, by title."""
    budget = row["budget_share"]
    title, share = "budget", budget
    if budget is None:
        title, share = "share", row["parameter_share"]
    return {"params": f"{row['parameters']:,}", title: percent(share)}


def shape_text(row):
    """Describes the shape of a kernel, and how many of them there are."""
    shape = "x".join(map(str, row["kernel_shape"]))
    return f"{row['experts']} of {shape}" if row["experts"] else shape


def rank_text(row):
    """Describes the rank of an adapter; of experts, the range and the mean."""
    ranks = row["ranks"]
    if row["experts"] is None:
        return str(row["rank"])
    mean = sum(ranks) / len(ranks)
    return f"{min(ranks)}-{max(ranks)}, mean {mean:.1f}"


def as_text(rows, name, sentences):
    """Yields the lines of the table for a terminal."""
    table, common = columns(rows), ""
    if "layer" in table:
        common, table["layer"] = abbreviated(table["layer"], PATH_WIDTH)
    widths = {title: max(map(len, [title, *table[title]])) for title in table}

    def line(texts):
        return "  ".join(
            f"{text:{'<' if title in LEFT else '>'}{widths[title]}}"
            for title, text in zip(table, texts, strict=True)
        ).rstrip()

    rule = "-" * len(line(table))
    yield heading(rows, f"'{name}'") + (f", below '{common}'" if common else "")
    yield line(table)
    yield rule
    yield from map(line, zip(*table.values(), strict=True))
    yield rule
    yield from sentences


def heading(rows, name):
    """Returns the line above the table."""
    if "number" not in rows[0]:
        return f"Adapters of {name}"
    total = sum(row["number"] for row in rows)
    return (
        f"Adapters of {name}, {total} layers of {len(rows)} kinds "
        "(all of them: `expand=True`)"
    )


def as_markdown(rows, name, sentences):
    """Yields the lines of the table in Markdown."""
    table = columns(rows)
    for title in set(table) & {"layer", "layers"}:
        table[title] = [f"`{text}`" for text in table[title]]
    yield heading(rows, f"`{name}`")
    yield ""
    yield markdown_row(table)
    yield markdown_row(["---" if t in LEFT else "--:" for t in table])
    yield from map(markdown_row, zip(*table.values(), strict=True))
    yield ""
    for sentence in sentences:
        yield f"- {sentence}"


def markdown_row(texts):
    """Returns one line of a Markdown table."""
    return f"| {' | '.join(text.replace('|', '&#124;') for text in texts)} |"


def two_digits(number):
    """Formats a number with two digits, including a trailing zero."""
    return f"{number:#.2g}".rstrip(".")


def percent(share):
    """Formats a share as a short percentage."""
    if share is None:
        return "-"
    if 0 < share < 0.0005:
        return "<0.1%"
    return "0" if share == 0 else f"{share:.1%}"


def spectrum(sigma, max_rank):
    """Draws a bar for each singular value, and a dot for each free rank.

    If there are more ranks than room, a bar shows the largest of several.
    """
    width = min(max_rank, BAR_WIDTH)
    sigma = [x if 0 < x < math.inf else 0.0 for x in sigma]
    largest = max(sigma, default=0.0) or 1.0
    starts = [i * max_rank // width for i in range(width)]
    return "".join(
        BARS[min(int(sigma[i] / largest * len(BARS)), len(BARS) - 1)]
        if i < len(sigma)
        else "·"
        for i in starts
    )


def plot_ranks(history, filename, title=None):
    """Draws ranks during training as a heat map.

    It has a row for each layer and a column for each step. Darker cells have
    higher ranks, which every cell also shows as a number, so the picture does
    not depend on colours. Of more than 24 readings, 24 evenly spaced ones are
    shown, including the first and the last.

    Needs `matplotlib`: `pip install "keras_geolora[plot]"`.

    Args:
        history: `keras_geolora.callbacks.RankHistory`, or the name of the CSV
            file that one wrote.
        filename: String or path of the PNG file to write.
        title: String. Defaults to the mean ranks at the start and at the end.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the file cannot be written.
        ValueError: If there is nothing to draw, or the file is not a PNG file.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    history = keras_geolora.callbacks.RankHistory(interval=1)
    x, y = np.ones((8, 8)), np.ones((8, 4))
    model.fit(x, y, batch_size=2, callbacks=[history], verbose=0)
    keras_geolora.plot_ranks(history, "ranks.png")
    ```
    """
    check_can_draw(filename)
    if isinstance(history, (str, pathlib.PurePath)):
        steps, ranks = read_ranks(history)
    else:
        steps, ranks = history.steps, history.ranks
    if not steps or not ranks:
        raise ValueError(
            "There are no ranks to draw until `fit` has run with the "
            f"callback. Received: history={history!r} with {len(steps)} "
            "readings"
        )
    table = np.array(list(ranks.values()), "float")  # NaN for no adapter
    picture = io.BytesIO()
    heat_map(steps, list(ranks), table, title).savefig(picture, format="png")
    write_whole(filename, picture.getvalue())

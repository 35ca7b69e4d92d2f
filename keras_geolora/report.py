"""What a person wants to see of an adapted model."""

import numpy as np

from keras_geolora.targeting import adapted_layers

BARS = "▁▂▃▄▅▆▇█"


def geolora_summary(model, print_fn=print):
    """Prints a table of all adapters, and returns it as data.

    Also a method of every `keras.Model`: `model.geolora_summary()`.

    The columns are the layer's path, the kernel as a matrix, the rank found
    and the largest rank, the parameters of the update at that rank, the
    largest singular value and the spectrum relative to it, and the largest
    deviation of a basis from orthonormality, which should stay below 1e-5.

    Args:
        model: `keras.Model` with adapted layers.
        print_fn: Callable that takes one line, or `None` to print nothing.

    Returns:
        List of dicts, one for each adapted layer, with the keys `path`,
        `kernel_shape`, `rank`, `max_rank`, `parameters`, `singular_values`
        (a list of floats, `scale` included) and `orthogonality_error`.

    Raises:
        ValueError: If no layer is adapted.

    Example:

    ```python
    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    rows = model.geolora_summary()
    assert rows[0]["rank"] == 2 and rows[0]["parameters"] == 2 * (8 + 4) + 2
    ```
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "There is nothing to summarize without adapters; add them with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    rows = [describe(path, layer.adapter) for path, layer in layers.items()]
    if print_fn is not None:
        for line in table(rows, model):
            print_fn(line)
    return rows


def describe(path, adapter):
    """Returns the row of one adapter."""
    U, S, V = adapter.trimmed()
    rank = len(S)
    return {
        "path": path,
        "kernel_shape": (adapter.input_dim, adapter.output_dim),
        "rank": rank,
        "max_rank": adapter.max_rank,
        "parameters": rank * adapter.parameters_per_rank,
        "singular_values": (adapter.scale * S.diagonal()).tolist(),
        "orthogonality_error": max(
            float(np.abs(basis.T @ basis - np.eye(rank)).max())
            for basis in (U, V)
        ),
    }


def table(rows, model):
    """Yields the lines of the table."""
    width = max(len(row["path"]) for row in rows)
    head = (
        f"{'layer':{width}}  {'kernel':>11}  {'rank':>7}  {'params':>9}  "
        f"{'largest':>8}  {'orthog.':>7}  spectrum"
    )
    yield f"Adapters of '{model.name}'"
    yield head
    yield "-" * (len(head) + 8)
    for row in rows:
        kernel = "x".join(map(str, row["kernel_shape"]))
        rank = f"{row['rank']}/{row['max_rank']}"
        sigma = row["singular_values"]
        yield (
            f"{row['path']:{width}}  {kernel:>11}  {rank:>7}  "
            f"{row['parameters']:>9,}  {sigma[0]:>8.2g}  "
            f"{row['orthogonality_error']:>7.0e}  {spectrum(sigma)}"
        )
    yield "-" * (len(head) + 8)
    total = sum(row["parameters"] for row in rows)
    kernels = sum(np.prod(row["kernel_shape"]) for row in rows)
    mean = sum(row["rank"] for row in rows) / len(rows)
    yield (
        f"{len(rows)} adapters, mean rank {mean:.1f}, {total:,} parameters at "
        f"these ranks ({total / kernels:.2%} of the adapted kernels)"
    )


def spectrum(sigma):
    """Draws singular values, relative to the largest, as a row of bars."""
    if not sigma or sigma[0] == 0:
        return "untrained"
    return "".join(
        BARS[min(int(s / sigma[0] * len(BARS)), len(BARS) - 1)] for s in sigma
    )

"""Ranks during training, as a CSV file."""

import csv
import io
import pathlib

from keras_geolora.whole_files import write_whole


def write_ranks(filename, steps, ranks):
    """Writes ranks as a table: a line for each step, a column for each layer.

    Args:
        filename: String or path of a CSV file.
        steps: List of ints, the numbers of updates.
        ranks: Dict from the path of a layer to a list of ranks, one for each
            step; `None` where the layer had no adapter.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *ranks])
    writer.writerows(zip(steps, *ranks.values(), strict=True))
    write_whole(filename, text.getvalue().encode())


def read_ranks(filename):
    """Reads what `write_ranks` wrote.

    Args:
        filename: String or path of a CSV file.

    Returns:
        `(steps, ranks)`, as `write_ranks` takes them.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not such a table.
    """
    try:
        text = pathlib.Path(filename).read_text("utf-8")
        (first, *paths), *lines = csv.reader(io.StringIO(text))
        if first != "step":
            raise ValueError(f"the first column is {first!r}")
        steps = [int(line[0]) for line in lines]
        cells = [[int(x) if x else None for x in line[1:]] for line in lines]
        columns = zip(*cells, strict=True) if cells else [() for _ in paths]
        columns = list(map(list, columns))
        return steps, dict(zip(paths, columns, strict=True))
    except (ValueError, IndexError) as error:
        raise ValueError(
            "A table of ranks must have a column `step` and one for each "
            "layer, as `keras_geolora.callbacks.RankHistory` writes it. "
            f"Received: '{filename}' ({error})"
        ) from error

"""Folds the rows of repeated layers into one row for each kind."""

import re

import numpy as np

NUMBER = re.compile(r"(\d+)")


def fold(rows, known=()):
    r"""Makes one row of all that differ only in numbers in their paths.

    Rows of kernels of different shapes, or numbers of experts, stay apart.

    Args:
        rows: List of dicts, as `geolora_summary` returns them.
        known: Paths of the other layers of the model, which the patterns below
            must not match. Defaults to none.

    Returns:
        List of dicts with the keys `path` (the pattern that matches the paths
        of all its rows and no other path, as a regular expression), `number`
        (of its rows), `kernel_shape`, `experts`, `ranks` (the smallest and the
        largest), `mean_rank`, `max_rank` (the largest), `singular_values` (the
        means, a missing one counts as 0), `largest` (the largest of all
        singular values), `discarded_share` (the mean, or `None`), and the sums
        `parameters`, `parameter_share` and `budget_share` (or `None`).

    Example:

    ```python
    from keras_geolora.viewing.folding import pattern_of

    paths = ["block_0/query", "block_1/query"]
    assert pattern_of(paths, paths) == ".*/query"
    others = ["block_0/cross/query", "head/query"]
    assert pattern_of(paths, paths + others) == r"block_\d+/query"
    ```
    """
    known = {*known, *(row["path"] for row in rows)}
    kinds = {}
    for row in rows:
        shape = row["experts"], *row["kernel_shape"]
        kind = NUMBER.sub("0", row["path"]), shape
        kinds.setdefault(kind, []).append(row)
    folded = []
    for alike in kinds.values():
        pattern = pattern_of([row["path"] for row in alike], known)
        if pattern is not None:
            folded.append(folded_row(pattern, alike))
            continue
        for row in alike:
            folded.append(folded_row(pattern_of([row["path"]], known), [row]))
    return folded


def folded_row(pattern, rows):
    """Returns the row that stands for several."""
    ranks = [rank for row in rows for rank in row["ranks"]]
    spectra = np.zeros((len(rows), max(row["rank"] for row in rows)))
    for spectrum, row in zip(spectra, rows, strict=True):
        spectrum[: row["rank"]] = row["singular_values"]
    return {
        "path": pattern,
        "number": len(rows),
        "kernel_shape": rows[0]["kernel_shape"],
        "experts": rows[0]["experts"],
        "ranks": (min(ranks), max(ranks)),
        "mean_rank": sum(ranks) / len(ranks),
        "max_rank": max(row["max_rank"] for row in rows),
        "singular_values": spectra.mean(axis=0).tolist(),
        "largest": spectra.max(initial=0.0),
        "discarded_share": over(rows, "discarded_share", np.mean),
        "parameters": sum(row["parameters"] for row in rows),
        "parameter_share": over(rows, "parameter_share", sum),
        "budget_share": over(rows, "budget_share", sum),
    }


def over(rows, key, reduce):
    """Returns the mean or the sum of a number of all rows, if all have it."""
    numbers = [row[key] for row in rows]
    return None if None in numbers else float(reduce(numbers))


def pattern_of(paths, known):
    """Returns the shortest of the patterns that match paths, and no others.

    Args:
        paths: List of strings that differ only in numbers.
        known: Iterable of strings, all paths there are.

    Returns:
        String, or `None` if every pattern matches other paths, too.
    """
    for pattern in patterns(paths):
        found = {path for path in known if means(pattern, path)}
        if found == set(paths):
            return pattern
    return re.escape(paths[0]) if len(paths) == 1 else None


def means(pattern, path):
    """Returns whether `targets=pattern` includes the layer at a path."""
    return pattern == path.split("/")[-1] or re.fullmatch(pattern, path)


def patterns(paths):
    """Yields patterns that match all paths, more and more special ones."""
    pieces = list(zip(*map(NUMBER.split, paths), strict=True))
    for any_number in (True, False):
        names = "".join(piece_of(texts, any_number) for texts in pieces)
        names = names.split("/")
        for start in reversed(range(1, len(names))):
            yield "/".join([".*", *names[start:]])
        yield "/".join(names)


def piece_of(texts, any_number):
    """Returns a pattern of one piece of all paths."""
    if len(set(texts)) == 1:
        return re.escape(texts[0])
    return r"\d+" if any_number else f"({'|'.join(dict.fromkeys(texts))})"

"""Shortens paths of layers to fit a column of a table."""

import re


def abbreviated(paths, width):
    """Shortens paths together, so that they stay distinct.

    First, the common prefix is removed. Then every word is cut to as many
    letters as there is room for; numbers stay.

    Args:
        paths: List of strings, names joined by `/`.
        width: Int, the length to aim at. Paths stay longer if they would
            otherwise not be distinct.

    Returns:
        `(common, names)`: the common prefix, `"backbone/"` for example or
        `""`, and the list of the shortened paths.
    """
    if max(map(len, paths)) <= width:
        return "", list(paths)
    split = [path.split("/") for path in paths]
    shared = 0
    while all(
        len(parts) > shared + 1 and parts[shared] == split[0][shared]
        for parts in split
    ):
        shared += 1
    common = "".join(f"{part}/" for part in split[0][:shared])
    names = best = [path.removeprefix(common) for path in paths]
    letters = max(map(len, names))
    while max(map(len, best)) > width and letters > 1:
        letters -= 1
        shorter = [cut_words(name, letters) for name in names]
        if len(set(shorter)) < len(set(names)):
            break
        best = shorter
    return common, best


def cut_words(name, letters):
    """Cuts the words of a name to their first letters, by two or more."""
    long = rf"([^\W\d_]{{{letters}}})[^\W\d_]{{2,}}"
    return re.sub(long, r"\1", name)

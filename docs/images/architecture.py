"""Draws `architecture.svg`: the folders of the package and who imports whom.

    python docs/images/architecture.py

The order of the boxes and what they are about is written below; modules and
arrows are read from the code. Colours are such that the picture can be read on
a light and on a dark page.
"""

import ast
import pathlib
import textwrap
from xml.sax.saxutils import escape

HERE = pathlib.Path(__file__).resolve()
PACKAGE = HERE.parents[2] / "keras_geolora"
PICTURE = HERE.with_suffix(".svg")

# From the top: what is in a row imports rows below it, and nothing above.
ROWS = [
    {"__main__": "command line", "__init__": "public names, of all rows"},
    {"serving": "an adapter for every row, SavedModels"},
    {"files": "adapters as files"},
    {"model": "adapts a whole model, and turns it back"},
    {"callbacks": "what happens while a model trains"},
    {"viewing": "tables and pictures of ranks"},
    {"optimizer": "GeoLoRA: a step around any optimizer of Keras"},
    {"layers": "the adapter, and the layers of Keras that carry one"},
    {"distribution": "layouts on JAX, replicas on TensorFlow"},
    {"geometry": "mathematics: arrays only"},
]
SHELF = "for all of them: modules that import nothing of the package"

WIDTH, SIDE, GAP = 900, 110, 30  # pixels
TITLE, LINE, PADDING = 20, 16, 10
LANE = 18  # between two lines beside the boxes
BOX, EDGE, TEXT = "#dbe7f3", "#3b6ea5", "#14273a"
ARROW, CLIMBS = "#7f8a96", "#d9822b"


def wing(path):
    """Returns the folder of a module, or its name where it is in none."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def read_wings():
    """Returns the dict from folder to the names of its modules."""
    wings = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        wings.setdefault(wing(path), [])
        if path.stem != "__init__":
            wings[wing(path)].append(path.stem)
    return wings


def read_imports():
    """Returns the set of pairs of a folder and one that it imports."""
    pairs = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            package, _, module = node.module.partition(".")
            if package == PACKAGE.name:
                targets = [module] if module else [a.name for a in node.names]
                pairs.update((wing(path), t.split(".")[0]) for t in targets)
    return {
        (importer, imported)
        for importer, imported in pairs
        if importer != imported
    }


class Box:
    """A rectangle with a title and lines of text.

    Args:
        x: Int, its left side.
        y: Int, its upper side.
        width: Int.
        title: String.
        text: String, what it is about.
        modules: List of strings.
    """

    def __init__(self, x, y, width, title, text, modules):
        self.x, self.y, self.width = x, y, width
        self.title, self.text = title, text
        self.lines = textwrap.wrap("  ".join(modules), (width - 20) // 7)
        self.height = 2 * PADDING + TITLE + LINE * len(self.lines)

    @property
    def below(self):
        return self.y + self.height

    @property
    def right(self):
        return self.x + self.width

    def svg(self):
        """Returns the elements of the box."""
        x, y = self.x + PADDING, self.y + PADDING + 14
        yield (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" rx="6" '
            f'height="{self.height}" fill="{BOX}" stroke="{EDGE}"/>'
        )
        yield (
            f'<text x="{x}" y="{y}"><tspan class="title">'
            f"{escape(self.title)}</tspan>"
            f'<tspan dx="10">{escape(self.text)}</tspan></text>'
        )
        for number, line in enumerate(self.lines, 1):
            yield (
                f'<text x="{x}" y="{y + 4 + LINE * number}" class="small">'
                f"{escape(line)}</text>"
            )


def layout(wings):
    """Returns the boxes by name, and the height of all."""
    boxes, y = {}, GAP
    inner = WIDTH - 2 * SIDE
    for row in ROWS:
        width = (inner - GAP * (len(row) - 1)) // len(row)
        for place, (name, text) in enumerate(row.items()):
            x = SIDE + place * (width + GAP)
            modules = [m for m in wings[name] if m != name]
            boxes[name] = Box(x, y, width, name, text, modules)
        y = max(boxes[name].below for name in row) + GAP
    others = sorted(wings.keys() - boxes.keys())
    folders = [name for name in others if (PACKAGE / name).is_dir()]
    if folders:
        raise SystemExit(f"Say in `ROWS` where these folders are: {folders}")
    boxes[""] = Box(SIDE, y, inner, "shelf", SHELF, others)
    return boxes, boxes[""].below + GAP


def arrows(boxes, imports):
    """Yields the lines between boxes.

    Straight to the next row. Beside the boxes where rows lie between: a lane
    for each box that is imported, and a dot where somebody enters it.
    """
    row_of = {name: i for i, row in enumerate(ROWS) for name in row}
    sides = {"left": [], "right": [], "climbs": []}
    for importer, imported in sorted(imports):
        if importer not in row_of or imported not in row_of:
            continue  # of the shelf
        if importer == "__init__":  # gathers names of all
            continue
        start, end = boxes[importer], boxes[imported]
        rows = row_of[imported] - row_of[importer]
        if rows == 1:
            x = min(start, end, key=lambda box: box.width).x + 60
            yield line(f"M{x},{start.below} V{end.y - 7}", head="head")
        elif rows < 1:
            sides["climbs"].append((start, end))
        else:
            side = "right" if start.right == end.right else "left"
            sides[side].append((start, end))
    yield from lanes(sides["right"], lambda box: box.right, 1)
    yield from lanes(sides["left"], lambda box: box.x, -1)
    for number, (start, end) in enumerate(sides["climbs"]):
        x = start.x - LANE * (5 - number)
        path = f"M{start.x},{start.below - 8} H{x} V{end.y + 20} H{end.x - 7}"
        yield line(path, CLIMBS, "climbs", 'stroke-dasharray="5 4"')


def lanes(pairs, edge, sign):
    """Yields the lanes on one side of the boxes, nearest for the highest."""
    targets = sorted({end for _, end in pairs}, key=lambda box: box.y)
    for number, end in enumerate(targets, 1):
        x = edge(end) + sign * LANE * number
        starts = [start for start, target in pairs if target is end]
        for start in starts:
            y = start.y + start.height // 2
            yield line(f"M{edge(start)},{y} H{x}")
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{ARROW}"/>'
        top = min(start.y + start.height // 2 for start in starts)
        path = f"M{x},{top} V{end.y + 10} H{edge(end) + sign * 7}"
        yield line(path, head="head")


def line(path, color=ARROW, head=None, more=""):
    """Returns a line, with an arrow at its end or without."""
    end = f'marker-end="url(#{head})"' if head else ""
    return (
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.5" '
        f"{more} {end}/>"
    )


def marker(name, color):
    """Returns the head of an arrow."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="1" refY="4" '
        'markerUnits="userSpaceOnUse" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
    )


def picture():
    """Returns the text of the picture."""
    boxes, height = layout(read_wings())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
        f'{height}" width="{WIDTH}" height="{height}">',
        "<style>text { font: 13px sans-serif; fill: " + TEXT + "; } "
        ".title { font: bold 15px monospace; } "
        ".small { font: 11px monospace; }</style>",
        "<defs>" + marker("head", ARROW) + marker("climbs", CLIMBS) + "</defs>",
        *arrows(boxes, read_imports()),
        *(line for box in boxes.values() for line in box.svg()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")

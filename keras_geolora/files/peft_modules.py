"""The factors of layers, as PEFT stores them for its modules.

| kind | module of PyTorch | `A` | `B` |
| --- | --- | --- | --- |
| `"linear"` | `Linear`, `Conv1D` | `(rank, input_dim)` | `(output_dim, rank)` |
| `"parameter"` | the same, as a parameter | the same | the same |
| `"embedding"` | `Embedding` | `(rank, rows)` | `(columns, rank)` |
| `"conv"` | `Conv1d` to `Conv3d` | `(rank, channels * positions)` | as above |
| `"experts"` | none, a parameter | with an axis of experts in front | as well |
"""

import dataclasses
import re

import numpy as np

from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.files.family_names import EXPERTS, LM_HEAD
from keras_geolora.files.peft_names import rows_of_part, split_name

MERGE = (
    "Leave it out with `enable_geolora(exclude=...)`, write "
    "`model.save_geolora(path)`, or merge and export the whole model"
)
# In these families PEFT mistakes every module that is named like a projection
# of the experts for one of these. Parameters are targeted by their full names.
NAMED_IN_FULL = "MixtralBackbone", "QwenMoeBackbone", "Qwen3MoeBackbone"


def kinds_of(adapter, named):
    """Returns a dict from path to the kind of the module of a layer.

    Args:
        adapter: `Exported`.
        named: Dict from path to the name of a module.
    """
    return {
        path: kind_of(path, adapter.classes[path], adapter, named[path])
        for path in adapter.updates
    }


def kind_of(path, class_name, adapter, module):
    """Returns the kind of the module of one layer."""
    if adapter.updates[path][0].ndim == 3:
        return "experts"
    if "Conv" in class_name and "Transpose" not in class_name:
        check_convolution(path, adapter.convolutions.get(path))
        return "conv"
    if "Embedding" in class_name or path.endswith("/embeddings"):
        check_embedding(path, adapter.model_class)
        return "embedding"
    if class_name == "AdaptedWeight" or "Conv" in class_name:
        raise ValueError(
            "PEFT has no counterpart for the adapter of a transposed "
            "convolution, or of a weight that belongs to no layer of its own "
            f"(except experts and embeddings). {MERGE}. Received: '{path}'"
        )
    if adapter.family in NAMED_IN_FULL and ".mlp." in module:
        return "parameter"
    return "linear"


def check_convolution(path, convolution):
    """Refuses a convolution that PEFT would compute in another way."""
    if convolution is None:
        raise ValueError(
            "The file of an adapter does not know the window of a convolution, "
            "which PEFT needs. Load it into its model and write "
            f"`export_peft(model, folder)`. Received: layer '{path}'"
        )
    if convolution.dilated:
        raise ValueError(
            "PEFT's LoRA forgets the dilation of a convolution. "
            f"{MERGE}. Received: layer '{path}' with a dilation"
        )


def check_embedding(path, model_class):
    """Refuses an embedding whose transpose is inside another module."""
    if model_class.endswith("MaskedLM"):
        raise ValueError(
            "A masked language model computes its logits with the transpose of "
            "its embedding, and PEFT would not update that. "
            f"{MERGE}. Received: layer '{path}' of a {model_class}"
        )


def check_products(classes):
    """Refuses layers that do not multiply rows by their kernel.

    Args:
        classes: Dict from path to the name of the layer's class.
    """
    for path, name in classes.items():
        words = "Conv", "Embedding", "AdaptedWeight"
        if any(word in name for word in words):
            raise ValueError(
                "Only adapters of linear layers can be written, not that of a "
                f"layer of class {name}. {MERGE}. Received: adapted layer "
                f"'{path}'"
            )


def pairs_of_modules(updates, named):
    """Returns a dict from module to `A, B`.

    Args:
        updates: Dict from path to `(U, S, V, scale)`.
        named: Dict from path to the name of a module, or of a part of one.
    """
    parts = {}
    for path, (U, S, V, scale) in updates.items():
        module, part, count = split_name(named[path])
        A = U.swapaxes(-1, -2)
        block = A, V @ (S.swapaxes(-1, -2) * scale), part, count
        others = parts.setdefault(module, [])
        if any(part == p or count != c for _, _, p, c in others):
            raise ValueError(
                "Every layer needs a module of its own, or a part of one. "
                f"Received: the name '{named[path]}' for layer '{path}' and "
                "for another layer"
            )
        others.append(block)
    return {module: fused(blocks) for module, blocks in parts.items()}


def fused(blocks):
    """Returns `A, B` of a module whose parts are adapted separately."""
    rank = sum(A.shape[-2] for A, *_ in blocks)
    _, first, _, count = blocks[0]
    *batch, rows, _ = first.shape
    B = np.zeros((*batch, count * rows, rank), "float32")
    at = 0
    for A, block, part, _ in blocks:
        columns = slice(at, at + A.shape[-2])
        B[..., rows_of_part(count * rows, part, count), columns] = block
        at = columns.stop
    return np.concatenate([A for A, *_ in blocks], axis=-2), B


def head_of(pair):
    """Returns `A, B` of the head that is the transpose of an embedding."""
    A, B = pair
    return B.T, A.T


# The tensors of a file.


def tensors_of(key, pair, kind, convolution=None):
    """Returns the tensors of a module.

    Args:
        key: String, how their names begin.
        pair: Tuple of arrays `A, B`.
        kind: String, see above.
        convolution: `Convolution`, if it is one.
    """
    A, B = pair
    if kind == "embedding":
        return {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
    if kind == "conv":
        A, B = convolved(A, B, convolution)
    if kind == "experts":
        A = A.reshape(-1, A.shape[-1])
        B = np.moveaxis(B, 0, -1).reshape(B.shape[1], -1)
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}


def convolved(A, B, convolution):
    """Returns the kernels of two convolutions, one after the other.

    The first sees the channels of all groups, so each group gets columns of its
    own, with which it sees its channels only.
    """
    groups, channels = convolution.groups, convolution.channels
    rank = len(A)
    shape = rank, *convolution.window, channels
    first = np.moveaxis(A.reshape(shape), -1, 1)
    whole = np.zeros(
        (groups * rank, groups * channels, *convolution.window), A.dtype
    )
    for group in range(groups):
        rows = slice(group * rank, (group + 1) * rank)
        inputs = slice(group * channels, (group + 1) * channels)
        whole[rows, inputs] = first
    return whole, B.reshape(*B.shape, *[1] * len(convolution.window))


def rank_of(pair, kind, convolution=None):
    """Returns what PEFT calls the rank of a module."""
    rank = pair[0].shape[-2]
    return rank * convolution.groups if kind == "conv" else rank


def nesting(parameters):
    """Returns where PEFT stores the factors of the parameters of a module.

    PEFT wraps the module once for each parameter, in the module's order.

    Args:
        parameters: Names of parameters.

    Returns:
        Dict from parameter to what follows the name of the module.
    """
    if len(parameters) > 1 and not set(parameters) <= set(EXPERTS):
        raise ValueError(
            "PEFT nests the factors of several parameters of one module. The "
            f"order is only known for {' and '.join(EXPERTS)}. {MERGE}. "
            f"Received: {', '.join(map(repr, parameters))} in one module"
        )
    order = [x for x in EXPERTS if x in parameters] or list(parameters)
    return {x: ".base_layer" * i for i, x in enumerate(reversed(order))}


@dataclasses.dataclass
class Factors:
    """The two tensors of a module, as they are in a file.

    Attributes:
        A: Array.
        B: Array.
        kind: String, `"embedding"`, `"experts"` or `"linear"`, which may also
            be a convolution.
        strength: Float, `alpha`. The update is `strength / rank**root * B A`.
        root: Float, 1, or 0.5 with rank-stabilized scaling.
        stem: String, how the names of the tensors begin.
    """

    A: np.ndarray
    B: np.ndarray
    kind: str
    strength: float
    root: float
    stem: str

    def pair(self, kind, count=None, convolution=None):
        """Returns `A, B`, with the scaling in `B`; raises a `ValueError`.

        Args:
            kind: String, that of the layer, one of those of `kind` above.
            count: Int, the number of experts, if the layer has experts.
            convolution: `Convolution`, if the layer is one.
        """
        A, B = self.A, self.B
        fit = self.kind == kind
        if fit and count is not None:
            A = A.reshape(count, -1, A.shape[-1])
            B = np.moveaxis(B.reshape(len(B), -1, count), -1, 0)
        rank = len(A) if count is None else A.shape[-2]
        if fit and convolution is not None:
            A, B = unconvolved(A, B, convolution)
        fit = fit and A.ndim == B.ndim == (2 if count is None else 3)
        if not (fit and A.size and B.size and A.shape[-2] == B.shape[-1]):
            raise ValueError("shapes")
        return A, B * (self.strength / rank**self.root)


def unconvolved(A, B, convolution):
    """Undoes `convolved`; raises a `ValueError` if that is impossible."""
    groups, channels = convolution.groups, convolution.channels
    rank, width = len(A), len(B) // groups
    window = convolution.window
    if A.shape[1:] != (groups * channels, *window) or rank % groups:
        raise ValueError("window")
    columns = B.reshape(groups, width, -1)
    B = np.zeros((groups * width, rank))
    parts = []
    for group in range(groups):
        rows = slice(group * (rank // groups), (group + 1) * (rank // groups))
        inputs = slice(group * channels, (group + 1) * channels)
        others = np.delete(A[rows], range(inputs.start, inputs.stop), axis=1)
        if others.any():
            raise ValueError("other groups")
        parts.append(np.moveaxis(A[rows, inputs], 1, -1))
        B[group * width : (group + 1) * width, rows] = columns[group]
    return np.concatenate(parts).reshape(rank, -1), B


def hand_out(modules, named, folder, shapes):
    """Finds the factors of each layer, which may be part of a module.

    Args:
        modules: Dict from module to `Factors`.
        named: Dict from the path of a layer to the name of its module.
        folder: String or path, for messages.
        shapes: Dict from path to the arguments of `Factors.pair`.

    Returns:
        Dict from path to the two factors of an update, and dict from module to
        `B`, without the rows that belong to a layer.
    """
    updates, rest = {}, {}
    for path, full_name in named.items():
        module, part, count = split_name(full_name)
        for key in modules_called(module, modules):
            if path in updates:
                raise AdapterFileError(
                    f"'{folder}' has more than one module that could be "
                    f"layer '{path}'. Choose one with `names`. Nothing "
                    "was loaded."
                )
            try:
                A, B = modules[key].pair(*shapes[path])
            except ValueError as error:
                raise AdapterFileError(
                    f"The shapes of the factors of '{key}' do not fit layer "
                    f"'{path}'. Nothing was loaded."
                ) from error
            rows = rows_of_part(B.shape[-2], part, count)
            left, right = A.swapaxes(-1, -2), B[..., rows, :].swapaxes(-1, -2)
            updates[path] = left, right
            rest.setdefault(key, B.copy())[..., rows, :] = 0
    return updates, rest


def modules_called(name, modules):
    """Returns the names that are a name, or end with it after a dot."""
    return [x for x in modules if x == name or x.endswith(f".{name}")]


def is_head(module):
    """Returns whether a module computes the logits of tokens."""
    return re.fullmatch(rf"(.+\.)?{LM_HEAD}", module) is not None

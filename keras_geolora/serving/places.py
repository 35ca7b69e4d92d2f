"""The places for adapters in a model that takes one for every row."""

import dataclasses

import numpy as np

from keras_geolora.files.adapter_format import some

# The name of the base, at place 0, and that of a free place. No adapter can
# have either of them.
BASE, FREE = "", "/"
# The file beside a SavedModel that describes its places.
PLACES = "geolora_places.json"


class Content:
    """What belongs to one adapter: products of factors, and other weights.

    Args:
        updates: Dict from path to `(A, B)`, whose product is the update, of
            shapes `(input_dim, rank)` and `(rank, output_dim)`.
        weights: Dict from key to array, what trained beside the factors.
        base: Dict from path to a checksum of the pretrained kernels, `""` for
            all else; see `fingerprint`.
    """

    def __init__(self, updates, weights, base):
        self.updates = updates
        self.weights = weights
        self.base = base

    @classmethod
    def of_model(cls, adaptation, name, keyed, base):
        """Returns what an adapter of a model consists of.

        Args:
            adaptation: The `Adaptation` of the model.
            name: String, the adapter.
            keyed: Dict of `keyed_variables`.
            base: Dict of `fingerprint`.
        """
        updates = {}
        for path, layer in adaptation.adapters[name].layers.items():
            adapter = layer.adapters_by_name()[name]
            updates[path] = two_factors(*adapter.trimmed(), adapter.scale)
        values = adaptation.values(name)
        weights = {
            k: values[id(v)] for k, v in keyed.items() if id(v) in values
        }
        return cls(updates, weights, base)

    @classmethod
    def of_file(cls, description, tensors):
        """Returns what an adapter file holds, see `read_adapter`."""
        updates, factors = {}, set()
        for path, options in description["adapter"]["layers"].items():
            keys = [f"{path}.{role}" for role in "USV"]
            factors.update(keys)
            updates[path] = two_factors(
                *(tensors[key] for key in keys), options["scale"]
            )
        weights = {k: x for k, x in tensors.items() if k not in factors}
        return cls(updates, weights, description["base"])


def two_factors(U, S, V, scale):
    """Returns the two matrices whose product is an update, with its scale."""
    return scale * U @ S, V.T


@dataclasses.dataclass
class Places:
    """Which adapters a model has places for, and who has them.

    Attributes:
        names: List of strings, the adapters by place.
        layers: Dict from path to `[input_dim, output_dim, max_rank]`.
        weights: Dict from key to shape, of what trains beside the factors.
        base: Dict of `fingerprint`, of these layers and all else.
    """

    names: list
    layers: dict
    weights: dict
    base: dict

    @property
    def adapters(self):
        """List of the names of the adapters."""
        return [name for name in self.names if name not in (BASE, FREE)]

    def place_for(self, name):
        """Returns the place of an adapter, or a free one for a new adapter."""
        if name in self.names:
            return self.names.index(name)
        if FREE not in self.names:
            raise ValueError(
                "All places are taken. Remove an adapter, or make the model "
                "again with a larger `capacity`. Received: adapter "
                f"'{name}', for a model with a capacity of "
                f"{len(self.names) - 1} and the adapters {self.adapters}"
            )
        return self.names.index(FREE)

    def place_of(self, name):
        """Returns the place of an existing adapter."""
        if name not in self.adapters:
            raise ValueError(
                f"There is no adapter with this name. Received: name={name!r}; "
                f"the adapters of the model are {self.adapters}"
            )
        return self.names.index(name)

    def taken_by(self, contents):
        """Returns the new `names`, and what to write where.

        Args:
            contents: Dict from name to `Content`, each for its place or a free
                one.

        Returns:
            Tuple of the list of names by place, and a dict from key to a list
            of pairs of a place and an array; `None` is the value of the base.

        Raises:
            ValueError: If an adapter does not fit, or there is no free place.
        """
        after = dataclasses.replace(self, names=list(self.names))
        values = {}
        for name, content in contents.items():
            place = after.place_for(name)
            after.names[place] = name
            for key, value in self.arrays(name, content).items():
                values.setdefault(key, []).append((place, value))
        return after.names, values

    def arrays(self, name, content):
        """Returns what to write to an adapter's place, by key.

        Args:
            name: String, for messages.
            content: `Content`.

        Returns:
            Dict from key to array; `None` stands for the value of the base.
            The keys are those of `weights`, and `path.A` and `path.B`.

        Raises:
            ValueError: If the adapter does not fit the places.
        """
        self._check(name, content)
        arrays = {key: content.weights.get(key) for key in self.weights}
        for path, (input_dim, output_dim, max_rank) in self.layers.items():
            A = np.zeros((input_dim, max_rank), "float32")
            B = np.zeros((max_rank, output_dim), "float32")
            if path in content.updates:
                left, right = content.updates[path]
                A[:, : left.shape[1]], B[: len(right)] = left, right
            arrays[f"{path}.A"], arrays[f"{path}.B"] = A, B
        return arrays

    def _check(self, name, content):
        differences = list(self._differences(content))
        if differences:
            listed = "\n".join(f"- {line}" for line in differences)
            raise ValueError(
                f"Adapter '{name}' does not fit the places for adapters:\n"
                f"{listed}\nNothing was changed."
            )

    def _differences(self, content):
        unknown = [path for path in content.updates if path not in self.layers]
        if unknown:
            yield (
                f"there is no place for an adapter of layer {some(unknown)}; "
                "make the model again with an adapter that has these layers"
            )
        strange = [key for key in content.weights if key not in self.weights]
        if strange:
            yield (
                f"there is no place for other values of {some(strange)}; make "
                "the model again with an adapter that trains them"
            )
        for path, (A, B) in content.updates.items():
            if path not in self.layers:
                continue
            input_dim, output_dim, max_rank = self.layers[path]
            found = len(A), B.shape[1]
            if found != (input_dim, output_dim):
                yield (
                    f"layer '{path}' has a kernel of {input_dim} x "
                    f"{output_dim}, the adapter one of {found[0]} x {found[1]}"
                )
            elif len(B) > max_rank:
                yield (
                    f"layer '{path}' has places for a rank of {max_rank}, the "
                    f"adapter has {len(B)}; make the model again with "
                    f"`max_rank={len(B)}`"
                )
        for key, value in content.weights.items():
            shape = tuple(self.weights.get(key, value.shape))
            if shape != value.shape:
                yield f"'{key}' has the shape {shape}, not {value.shape}"
        yield from self._differences_of_base(content)

    def _differences_of_base(self, content):
        others = [
            path
            for path in content.updates
            if content.base[path] != self.base.get(path, content.base[path])
        ]
        same = set(content.updates) == set(self.layers)
        if others or (same and content.base[""] != self.base[""]):
            yield (
                "the adapter was trained on other pretrained weights"
                + (f", those of {some(others)}" if others else "")
            )


def with_values(whole, pairs):
    """Returns an array of all places with other values at some of them.

    Args:
        whole: Array `(places, ...)`.
        pairs: List of pairs of a place and its value; `None` is that of the
            base.
    """
    for place, value in pairs:
        value = whole[0] if value is None else value
        whole[place] = np.reshape(value, whole.shape[1:])
    return whole

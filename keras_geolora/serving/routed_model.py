"""One model, many adapters: every row of a batch has its own."""

import contextlib
import dataclasses
import threading

import keras
import numpy as np
from keras import ops

from keras_geolora.files.adapter_format import read_adapter
from keras_geolora.files.base_weights import fingerprint, keyed_variables
from keras_geolora.keras_internals import (
    LooksThroughFew,
    all_layers,
    own_variables,
)
from keras_geolora.layers.adapter import check_rank
from keras_geolora.layers.adapter_bank import AdapterBank, routed
from keras_geolora.layers.conv import AdaptedConv
from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.tree import (
    has_adapters,
    inside,
    layers_with_adapters,
)
from keras_geolora.layers.weight import AdaptedWeight
from keras_geolora.model.checks import (
    check_adapted_and_enabled,
    check_name,
)
from keras_geolora.model.substitution import Substitution
from keras_geolora.serving.layer_bank import LayerBank
from keras_geolora.serving.places import (
    BASE,
    FREE,
    Content,
    Places,
    with_values,
)
from keras_geolora.serving.signature import is_text, tokenized


def route_geolora(model, adapters="all", capacity=None, max_rank=None):
    """Returns a model that takes the name of an adapter for every row.

    A batch may mix adapters of different ranks, and rows of the base model. All
    share the weights of `model`, which stays as it is. Other mixes, other
    adapters in the same places and new ones in free places need no new trace.

    Also a method of every `keras.Model`: `model.route_geolora()`.

    Args:
        model: `keras.Model` on which `enable_geolora` or `load_geolora` was
            called.
        adapters: List of names of adapters, or `"all"`, the default.
        capacity: Int or `None`, for how many adapters there are places. Each
            takes memory, but no time, except in convolutions. Defaults to the
            number of `adapters`.
        max_rank: Int or `None`, the largest rank of an adapter that may come
            later, clipped to the smaller side of a kernel. Defaults to the
            largest rank in each layer.

    Returns:
        A `RoutedModel`, for `predict` and `evaluate`.

    Raises:
        TypeError: If `model` is not a `keras.Model`, or a number not an int.
        ValueError: If an adapter does not exist, a number is too small, or a
            layer cannot have an adapter for every row.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    model.enable_geolora(rank=3, name="german")
    routed = model.route_geolora()
    x = np.ones((3, 8), "float32")
    y = routed.predict(x, adapters=["german", "", "french"], verbose=0)
    assert y.shape == (3, 4)
    ```
    """
    return RoutedModel(model, plan_route(model, adapters, capacity, max_rank))


@dataclasses.dataclass
class Plan:
    """What a `RoutedModel` will hold.

    Attributes:
        places: `Places`, all of them free.
        contents: Dict from the names of the adapters to their `Content`s.
        layers: Dict from path to adapted layer.
        owners: Dict from a layer to a dict from key to those of its variables
            that train beside the factors.
    """

    places: Places
    contents: dict
    layers: dict
    owners: dict


def plan_route(model, adapters="all", capacity=None, max_rank=None):
    """Returns the `Plan` of `route_geolora`, or raises what that raises."""
    check_adapted_and_enabled(model, "routed")
    adaptation = getattr(model, "geolora_adaptation", None)
    if adaptation is None:
        raise ValueError(
            "Rows choose among adapters by name, so they must be those of the "
            "model on which `enable_geolora` was called. Received: model "
            f"'{model.name}', whose parts were adapted separately"
        )
    check_layers(layers_with_adapters(model).values(), "Nothing was made.")
    known = list(model.geolora_adaptation.adapters)
    names = chosen_adapters(model, adapters, known)
    layers = {
        path: layer
        for adapter in adaptation.adapters.values()
        for path, layer in adapter.layers.items()
    }
    for path, layer in layers.items():
        if isinstance(layer, AdaptedWeight):
            refuse(path, "it is a weight that belongs to no layer of its own")
    base, keyed = fingerprint(model, layers), keyed_variables(model)
    contents = {
        name: Content.of_model(adaptation, name, keyed, base) for name in names
    }
    companions = {k: v for k, v in keyed.items() if adaptation.is_companion(v)}
    owners = owners_of(model, companions)
    for layer in owners:
        if layer not in layers.values():
            check_alone(layer)
    for path, layer in layers.items():
        check_routable(path, layer, owners.get(layer, {}))
    ranks = chosen_ranks(layers, contents, max_rank)
    places = Places(
        names=[BASE] + [FREE] * chosen_capacity(names, capacity),
        layers={
            path: [*layer.kernel_view.matrix_shape, ranks[path]]
            for path, layer in layers.items()
        },
        weights={k: list(v.shape) for k, v in companions.items()},
        base=base,
    )
    return Plan(places, contents, layers, owners)


class RoutedModel(LooksThroughFew, keras.Model):
    """A model that takes an adapter for every row; see `route_geolora`.

    Its input is a dict: `inputs`, those of the model, and `adapter`, an int
    tensor `(batch,)` of `ids`. `predict` and `evaluate` take names as well.

    Attributes:
        places: The `Places`, who has which.
    """

    def __init__(self, model, plan):
        super().__init__(
            name=f"routed_{model.name}", trainable=False, autocast=False
        )
        self.model = model
        self.places = plan.places
        self.lock = Lock()
        self.banks, self.layer_banks = [], []
        self.variables_by_key = Untracked({})
        self.biases = Untracked([])
        self.bank_of = Untracked({})
        owners = dict(plan.owners)
        for path, layer in plan.layers.items():
            self._add_bank(path, layer, owners.pop(layer, {}))
        for layer, own in owners.items():
            self._add_layer_bank(layer, own)
        pretrained = model.geolora_adaptation.pretrained
        self._write(
            {
                key: [(0, pretrained(variable))]
                for own in plan.owners.values()
                for key, variable in own.items()
            }
        )
        self._put(plan.contents)
        self._leave_out(resting_adapters(model))
        self.built = True

    def _leave_out(self, layers):
        """Leaves layers, with all that is in them, out of calls.

        Keras looks through all layers and variables in every call, and a model
        may have thousands that belong to its adapters.
        """
        inner = {id(x) for layer in layers for x in all_layers(layer)}
        resting = {id(v) for layer in layers for v in layer.variables}
        variables = [v for v in self.variables if id(v) not in resting]
        others = [x for x in all_layers(self) if id(x) not in inner]
        self.acting_variables = Untracked(variables)
        self.acting_layers = Untracked([x for x in others if x is not self])

    @property
    def variables(self):
        """The variables that act: no adapter of the model, but the banks."""
        acting = vars(self).get("acting_variables")
        return super().variables if acting is None else list(acting.value)

    def layers_of_a_call(self):
        acting = vars(self).get("acting_layers")
        return None if acting is None else acting.value

    def _add_bank(self, path, layer, own):
        """Adds the bank of an adapted layer, whose bias may be its `own`."""
        bank = AdapterBank(
            layer.kernel_view,
            len(self.places.names),
            self.places.layers[path][-1],
            layer.added_bias_shape if own else None,
            dtype=layer.compute_dtype,
            name=f"bank_{len(self.banks)}",
        )
        self.banks.append(bank)
        self.bank_of.value[id(layer)] = bank
        variables = {f"{path}.A": bank.A, f"{path}.B": bank.B}
        for key, variable in own.items():
            variables[key] = bank.bias
            self.biases.value.append((variable, bank))
        self.variables_by_key.value.update(variables)

    def _add_layer_bank(self, layer, own):
        """Adds the bank of a layer that trains along with adapters."""
        bank = LayerBank(
            layer,
            own,
            len(self.places.names),
            name=f"layer_bank_{len(self.layer_banks)}",
        )
        self.layer_banks.append(bank)
        self.variables_by_key.value.update(bank.by_key)

    @property
    def adapters(self):
        """List of the names of the adapters that rows may have."""
        return self.places.adapters

    def ids(self, adapters, rows=None):
        """Returns the ids of adapters, an array `(batch,)`.

        Args:
            adapters: List of names, or one name for all rows; `""` is the
                base.
            rows: Int, the number of rows, needed for one name.
        """
        if isinstance(adapters, str):
            adapters = [adapters] * (1 if rows is None else rows)
        names = [str(name) for name in adapters]
        unknown = sorted(set(names) - {BASE, *self.adapters})
        if unknown:
            raise ValueError(
                "Every row needs the name of an adapter of this model, or '' "
                f"for the base. Received: {unknown}; the adapters are "
                f"{self.adapters}"
            )
        if rows is not None and len(names) != rows:
            raise ValueError(
                "`adapters` must have a name for every row. Received: "
                f"{len(names)} names for {rows} rows"
            )
        return np.array([self.places.names.index(x) for x in names], "int32")

    def add(self, name, path=None):
        """Puts an adapter into its place, or a free one.

        An adapter that has a place gets new values. Nothing is traced again.

        Args:
            name: String, the name of the adapter.
            path: String or path of an adapter file, or `None` for the adapter
                of that name in the model.

        Raises:
            ValueError: If there is no free place, or the adapter does not fit.
        """
        check_name(name)
        if path is not None:
            self._put({name: Content.of_file(*read_adapter(path))})
            return
        adaptation = self.model.geolora_adaptation
        if name not in adaptation.adapters:
            raise ValueError(
                f"There is no adapter with this name. Received: name={name!r}; "
                f"the adapters of model '{self.model.name}' are "
                f"{list(adaptation.adapters)}. For an adapter file write "
                f"`add({name!r}, path)`"
            )
        keyed = keyed_variables(self.model)
        content = Content.of_model(adaptation, name, keyed, self.places.base)
        self._put({name: content})

    def remove(self, name):
        """Frees the place of an adapter."""
        place = self.places.place_of(name)
        self.places.names[place] = FREE

    def _put(self, contents):
        """Puts adapters into their places, or free ones.

        Args:
            contents: Dict from name to `Content`.
        """
        taken, values = self.places.taken_by(contents)
        self._write(values)
        self.places.names = taken

    def _write(self, values):
        """Writes to places.

        Args:
            values: Dict from key to a list of pairs of a place and its new
                value; `None` is that of the base.
        """
        for key, pairs in values.items():
            variable = self.variables_by_key.value[key]
            variable.assign(with_values(array_of(variable), pairs))

    def call(self, inputs):
        with self.rows_with(inputs["adapter"]):
            return self.model(inputs["inputs"], training=False)

    @contextlib.contextmanager
    def rows_with(self, ids):
        """Gives rows of the model in memory an adapter each, for a block.

        Args:
            ids: Int tensor `(batch,)`, as of `ids`.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.layers_by_row())
            ids = ops.cast(ids, "int32")
            stack.enter_context(routed(ids, self.bank_of.value))
            biases = self._pretrained_biases()
            if biases:
                stack.enter_context(Substitution(biases))
            yield

    def _pretrained_biases(self):
        """Returns pairs of a bias that adapters change and its base value.

        The variable itself has that of the active adapter.
        """
        return [
            (variable, ops.reshape(bank.bias[0], variable.shape))
            for variable, bank in self.biases.value
        ]

    def keep_pretrained_biases(self):
        """Gives the model in memory the base's biases, for good.

        For a model that is served only. Calls then exchange no values, so they
        may assign others, such as the states of random numbers.
        """
        for variable, value in self._pretrained_biases():
            variable.assign(value)
        self.biases = Untracked([])

    @contextlib.contextmanager
    def layers_by_row(self):
        """Lets layers with a `LayerBank` be called by it for a block.

        Other calls of the model meanwhile, in other threads, are as before.
        """
        with self.lock.value:
            for bank in self.layer_banks:
                # Past Keras and torch, which would look into it.
                vars(bank.target.layer)["call"] = bank.call_for_rows
            try:
                yield
            finally:
                for bank in self.layer_banks:
                    vars(bank.target.layer).pop("call", None)

    def predict(self, x, adapters=None, **kwargs):
        """Like `keras.Model.predict`, with an adapter for every row.

        Args:
            x: As in `keras.Model.predict` for the model.
            adapters: List of names, one for every row, or one name for all.
                `None` if `x` yields the dicts that this model takes.
            **kwargs: As in `keras.Model.predict`.
        """
        return super().predict(self._with_ids(x, adapters), **kwargs)

    def evaluate(self, x, y=None, adapters=None, **kwargs):
        """Like `keras.Model.evaluate`, with an adapter for every row.

        Args:
            x: As in `keras.Model.evaluate` for the model.
            y: Targets.
            adapters: As in `predict`.
            **kwargs: As in `keras.Model.evaluate`.
        """
        return super().evaluate(self._with_ids(x, adapters), y, **kwargs)

    def _with_ids(self, x, adapters):
        if adapters is None:
            return x
        if is_text(x) and getattr(self.model, "preprocessor", None) is not None:
            x = tokenized(self.model, x)
        rows = len(keras.tree.flatten(x)[0])
        return {"inputs": x, "adapter": self.ids(adapters, rows)}

    def fit(self, *args, **kwargs):
        """Refused: adapters train one by one, in the model itself."""
        raise ValueError(
            "A routed model only predicts. Train an adapter in the model "
            "itself: `model.activate_geolora(name)`, `model.fit(...)`, and "
            "then `routed.add(name)`. Received: model "
            f"'{self.model.name}'"
        )

    def get_config(self):
        """Refused: it consists of a model, which can be saved."""
        raise ValueError(
            "A routed model cannot be saved. Save the model, or its adapters "
            "by `save_geolora`, and call `model.route_geolora()` again. "
            f"Received: model '{self.model.name}'"
        )


def resting_adapters(model):
    """Returns all adapters of a model, which rest while it is routed."""
    return [
        adapter
        for layer in layers_with_adapters(model).values()
        for adapter in layer.adapters_by_name().values()
    ]


def array_of(variable):
    """Returns the value of a variable in a dtype that NumPy has."""
    if keras.backend.is_float_dtype(variable.dtype):
        variable = ops.cast(variable, "float32")
    return np.array(ops.convert_to_numpy(variable))


class Untracked:
    """Holds what Keras and the backends shall not look into."""

    def __init__(self, value):
        self.value = value


class Lock(Untracked):
    """A lock that threads take one after the other."""

    def __init__(self):
        super().__init__(threading.RLock())


def chosen_adapters(model, adapters, known):
    """Returns the names of existing adapters, `"all"` of them or a list.

    Args:
        model: `keras.Model`.
        adapters: List of names, or `"all"`.
        known: List of the names of its adapters.
    """
    names = known if adapters == "all" else adapters
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(
            "`adapters` must be a list of names of adapters of this model, or "
            f"'all'. Received: adapters={adapters!r}; the adapters of model "
            f"'{model.name}' are {known}"
        )
    return list(names)


def chosen_ranks(layers, contents, max_rank):
    """Returns the columns of a place, by path.

    Args:
        layers: Dict from path to layer.
        contents: Dict from name to `Content`.
        max_rank: Int or `None`.
    """
    if max_rank is not None:
        check_rank("max_rank", max_rank, 1, float("inf"))
    ranks = {}
    for path, layer in layers.items():
        largest = min(layer.kernel_view.matrix_shape)
        found = [
            len(content.updates[path][1])
            for content in contents.values()
            if path in content.updates
        ]
        ranks[path] = needed = max(found, default=1)
        if max_rank is not None:
            ranks[path] = min(max_rank, largest)
        if ranks[path] < needed:
            raise ValueError(
                "`max_rank` must be at least the largest rank of an adapter. "
                f"Received: max_rank={max_rank}, but layer '{path}' has an "
                f"adapter of rank {needed}"
            )
    return ranks


def chosen_capacity(names, capacity):
    """Returns for how many adapters there are places."""
    if capacity is None:
        return len(names)
    check_rank("capacity", capacity, 1, float("inf"))
    if capacity < len(names):
        raise ValueError(
            "`capacity` must be at least the number of adapters. Received: "
            f"capacity={capacity} for {len(names)} adapters"
        )
    return capacity


def owners_of(model, companions):
    """Returns which layers hold variables themselves.

    Args:
        model: `keras.Model`.
        companions: Dict from key to variable.

    Returns:
        Dict from layer to a dict from key to variable.
    """
    keys = {id(v): key for key, v in companions.items()}
    owners = {}
    for layer in (model, *inside(model)):
        own = [v for v in own_variables(layer) if id(v) in keys]
        for variable in own:
            key = keys.pop(id(variable))
            owners.setdefault(layer, {})[key] = variable
    return owners


def check_routable(path, layer, own):
    """Refuses an adapted layer that cannot have an adapter for every row.

    Args:
        path: String, for messages.
        layer: Adapted layer.
        own: Dict from key to those variables of the layer that train as well.
    """
    why = None
    bias = getattr(layer, "bias", None)
    if any(variable is not bias for variable in own.values()):
        why = "another adapter trains its kernel in full"
    elif isinstance(layer, AdaptedConv):
        last = len(layer.kernel_view.shape) - 1
        if layer.groups > 1:
            why = f"it is a convolution in {layer.groups} groups"
        elif layer.kernel_view.columns != (last,):
            why = "its kernel does not end with the output channels"
    if why is not None:
        refuse(path, why)


def check_alone(layer):
    """Refuses a layer to be called row by row if it holds more than weights."""
    if any(has_adapters(x) for x in inside(layer)):
        refuse(layer.path, "it has weights that train, and adapters inside")
    if getattr(layer, "quantization_mode", None) is not None:
        refuse(layer.path, "it trains along with adapters and is quantized")


def refuse(path, why):
    """Raises an error about a layer that needs one adapter for all rows."""
    raise ValueError(
        "This layer cannot have an adapter for every row of a batch. Serve "
        "every adapter by itself: `export(model, path, adapters='all')`. "
        f"Received: layer '{path}', and {why}"
    )

"""Many adapters of one layer: each row of a batch is given its own."""

import contextlib
import contextvars
import dataclasses

import keras
from keras import ops


@dataclasses.dataclass(frozen=True)
class Route:
    """Which adapter acts on which row, for the length of a call.

    Attributes:
        ids: Int tensor of shape `(batch,)`, the places of the rows' adapters.
        banks: Dict from the ids of layers to their `AdapterBank`s.
    """

    ids: object
    banks: dict


# The route of the call that is running in this thread.
ROUTE = contextvars.ContextVar("keras_geolora_route", default=None)


@contextlib.contextmanager
def routed(ids, banks):
    """Gives every row its own adapter, for the length of a `with` block.

    Args:
        ids: Int tensor of shape `(batch,)`.
        banks: Dict from the ids of layers to `AdapterBank`s.
    """
    token = ROUTE.set(Route(ids, banks))
    try:
        yield
    finally:
        ROUTE.reset(token)


def is_routed():
    """Returns whether the rows of a batch have adapters of their own now."""
    return ROUTE.get() is not None


def bank_of(layer):
    """Returns the `AdapterBank` that acts on a layer now, or `None`."""
    route = ROUTE.get()
    return None if route is None else route.banks.get(id(layer))


class AdapterBank(keras.layers.Layer):
    """The adapters of one layer, side by side in two arrays.

    Every adapter has a place. Its update is `A[place] @ B[place]`, the scale
    included; columns beyond its rank are zero, so adapters of different ranks
    share a batch. Place 0 is that of the base, whose update is exactly zero.

    The factors of a batch are gathered, `A[ids]` and `B[ids]`, so the cost does
    not depend on the number of places.

    Args:
        view: The `KernelView` of the layer.
        places: Int, the number of places, with that of the base.
        max_rank: Int, columns of a place.
        bias_shape: Shape of the bias as it is added to outputs, or `None` if
            no adapter has one of its own.
    """

    def __init__(self, view, places, max_rank, bias_shape=None, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.view = view
        self.places = places
        self.max_rank = max_rank
        self.bias_shape = bias_shape
        self.A = self._add("A", view.input_dim, max_rank)
        self.B = self._add("B", max_rank, view.output_dim)
        self.bias = None
        if bias_shape is not None:
            self.bias = self._add("bias", *bias_shape)
        self.built = True

    def _add(self, name, *shape):
        # In the dtype of the products: gathered rows need no cast.
        return self.add_weight(
            name=name,
            shape=(self.places, *shape),
            initializer="zeros",
            dtype=self.compute_dtype,
            autocast=False,
            trainable=False,
        )

    def call(self, inputs, transpose=False):
        """Returns the update's product with inputs, as `LowRankAdapter`."""
        ids = ROUTE.get().ids
        if keras.backend.is_int_dtype(inputs.dtype):
            return self._look_up(inputs, ids)
        check_rows(inputs, ids)
        factors = [ops.take(x, ids, axis=0) for x in (self.A, self.B)]
        if transpose:
            factors = [ops.swapaxes(x, 1, 2) for x in reversed(factors)]
        A, B = factors
        shape = ops.shape(inputs)
        x = ops.reshape(inputs, (shape[0], -1, A.shape[1]))
        y = ops.matmul(ops.matmul(x, A), B)
        return ops.reshape(y, (ops.shape(y)[0], *shape[1:-1], B.shape[2]))

    def _look_up(self, tokens, ids):
        """Returns rows of the updates, as an embedding looks them up."""
        check_rows(tokens, ids)
        shape = ops.shape(tokens)
        tokens = ops.reshape(tokens, (shape[0], -1))
        # One table of all adapters, so that no whole one is gathered.
        table = ops.reshape(self.A, (-1, self.max_rank))
        starts = ops.cast(ids, "int32")[:, None] * self.view.input_dim
        left = ops.take(table, starts + tokens, axis=0)
        y = ops.matmul(left, ops.take(self.B, ids, axis=0))
        return ops.reshape(y, (ops.shape(y)[0], *shape[1:], self.B.shape[2]))

    def convolve(self, inputs, convolution, channels_first):
        """Returns the update's convolution of inputs.

        One convolution computes the first factors of all places, from which
        every row takes those of its own: it costs more with every place.

        Args:
            inputs: Tensor of shape `(batch, ...)`.
            convolution: Function of inputs and a kernel.
            channels_first: Bool, whether channels are axis 1.
        """
        ids = ROUTE.get().ids
        check_rows(inputs, ids)
        kernels = ops.reshape(
            ops.transpose(self.A, (1, 0, 2)),
            (*self.view.shape[:-1], self.places * self.max_rank),
        )
        h = convolution(inputs, kernels)
        if channels_first:
            h = ops.moveaxis(h, 1, -1)
        shape = ops.shape(h)
        h = ops.reshape(h, (shape[0], -1, self.places, self.max_rank))
        own = ops.cast(ops.one_hot(ids, self.places), h.dtype)
        h = ops.sum(h * own[:, None, :, None], axis=2)
        y = ops.matmul(h, ops.take(self.B, ids, axis=0))
        y = ops.reshape(y, (*shape[:-1], self.B.shape[2]))
        return ops.moveaxis(y, -1, 1) if channels_first else y

    def with_bias(self, outputs):
        """Exchanges the bias of every row for that of its adapter.

        Args:
            outputs: Tensor of shape `(batch, ...)` to which the bias of the
                layer is, or will be, added.
        """
        if self.bias is None:
            return outputs
        change = ops.take(self.bias - self.bias[:1], ROUTE.get().ids, axis=0)
        between = len(outputs.shape) - len(change.shape)
        shape = (-1, *[1] * between, *self.bias_shape)
        return ops.add(outputs, ops.reshape(change, shape))


def check_rows(inputs, ids):
    """Refuses inputs whose first axis is not that of the batch."""
    rows, known = inputs.shape[0], ids.shape[0]
    if None not in (rows, known) and rows != known and 1 not in (rows, known):
        raise ValueError(
            "Adapters are chosen for the rows of a batch, so the first axis of "
            "what goes into an adapted layer must be that of the batch. Leave "
            "out layers for which it is not with `exclude` of "
            "`enable_geolora`, or serve every adapter by itself: "
            "`export(model, path, adapters='all')`. Received: inputs of shape "
            f"{tuple(inputs.shape)} for {known} rows"
        )

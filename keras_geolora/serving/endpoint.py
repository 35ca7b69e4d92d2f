"""The functions that a SavedModel offers: named tensors in, named tensors out.

Like all of `saved_model`, this runs on TensorFlow only.
"""

import keras
import tensorflow as tf

from keras_geolora.layers.factor import factor_of
from keras_geolora.model.parts import adaptations_of, plain_class_of
from keras_geolora.model.switching import activate_geolora
from keras_geolora.serving.places import BASE, FREE
from keras_geolora.serving.signature import (
    ADAPTER,
    Signature,
    named_outputs,
    tokenized,
)


class Endpoint:
    """A function with named inputs and outputs, traced on creation.

    Args:
        model: `keras.Model`.
        job: Dict, the description of the job.
        adapter: String, the adapter to activate, or `None` if there is none.

    Attributes:
        about: Dict, what a report tells of it.
        concrete: The traced function.
        tracked: List of what a SavedModel must hold for it.
        bank: List of variables that hold adapters, whose order counts.
        more_specs: Tuple of `tf.TensorSpec`s, of inputs that `answer` takes
            beside those of the model.
    """

    more_specs = ()

    def __init__(self, model, job, adapter=None):
        self.about = {"adapter": adapter}
        adaptations = adaptations_of(model)
        if adaptations:
            activate_geolora(model, adapter)
        # Variables trained along with an adapter have values for each one.
        self.values = [
            (variable, tf.Variable(value, trainable=False))
            for adaptation in adaptations
            for variable, value in adaptation.co_trained_values()
        ]
        self.bank = []
        own = [tensor for _, tensor in self.values]
        self.tracked = [*(v.value for v in model.variables), *own]
        self._trace(model, job)

    def _trace(self, model, job):
        self.tracked += tables(model)
        signature = Signature(**job["signature"])
        specs = [
            tf.TensorSpec(x["shape"], x["dtype"], name=x["name"])
            for x in signature.specs
        ]
        if job["preprocess"]:
            self.tracked.append(model.preprocessor)
            specs = [tf.TensorSpec([None], tf.string, name="text")]

        def serve(**tensors):
            chosen = {x.name: tensors.pop(x.name) for x in self.more_specs}
            if job["preprocess"]:
                tokens = self.tokens(model, tensors["text"])
                tensors = signature.named_tensors(tokens)
            inputs = signature.pack(model, tensors)
            return self.named(model, self.answer(model, inputs, **chosen))

        self.function = tf.function(serve, autograph=False)
        self.concrete = self.function.get_concrete_function(
            **{x.name: x for x in (*specs, *self.more_specs)}
        )

    def answer(self, model, inputs):
        """Calls the model."""
        with keras.StatelessScope(state_mapping=self.mapping()):
            return model(inputs, training=False)

    def mapping(self):
        """Returns pairs of variables and their values for this adapter."""
        return [(variable, tensor.value()) for variable, tensor in self.values]

    def tokens(self, model, text):
        """Returns the inputs that a preprocessor makes of strings."""
        return tokenized(model, text)

    def named(self, model, outputs):
        """Returns the outputs by name."""
        return named_outputs(model, outputs)


class GeneratingEndpoint(Endpoint):
    """An `Endpoint` of a language model that goes on with its inputs.

    Tokens are written to the places that `padding_mask` leaves free. Of strings
    the preprocessor makes tokens of its `sequence_length`; then `text` comes
    out as well.

    Args:
        model: `CausalLM` of KerasHub, whose active adapter, if any, acts.
        job: Dict, the description of the job.
    """

    def __init__(self, model, job):
        self.stop = job["generate"]["stop_token_ids"]
        self.with_text = job["preprocess"]
        sampler = job["generate"]["sampler"]
        model.sampler = keras.saving.deserialize_keras_object(sampler)
        self.about = {"sampler": type(model.sampler).__name__}
        self.values, self.bank = [], []
        # The states of random numbers, so that no call draws those of another.
        states = [v.value for v in model.sampler.variables]
        self.tracked = [*self.held(model), *states]
        self._trace(model, job)

    def held(self, model):
        """Returns what a SavedModel must hold of the model."""
        return [v.value for v in model.variables]

    def answer(self, model, inputs):
        """Generates tokens."""
        return model.generate_step(inputs, self.stop)

    def tokens(self, model, text):
        return model.preprocessor.generate_preprocess(text)

    def named(self, model, outputs):
        tokens, mask = outputs["token_ids"], outputs["padding_mask"]
        found = {
            "token_ids": tf.cast(tokens, tf.int32),
            "padding_mask": tf.cast(mask, tf.int32),
        }
        if self.with_text:
            tokenizer = model.preprocessor.tokenizer
            shown = tf.cast(mask, tf.bool)
            for special in tokenizer.special_token_ids:
                shown &= tf.not_equal(tokens, special)
            ragged = tf.ragged.boolean_mask(tokens, shown)
            found["text"] = tokenizer.detokenize(ragged)
        return found


class RoutedEndpoint(Endpoint):
    """An `Endpoint` that takes the name of an adapter for every row.

    Args:
        routed: `RoutedModel`.
        job: Dict, the description of the job.
    """

    more_specs = (tf.TensorSpec([None], tf.string, name=ADAPTER),)

    def __init__(self, routed, job):
        places, variables = routed.places, routed.variables_by_key.value
        self.about = {
            "adapter": None,
            "adapters": places.adapters,
            "capacity": len(places.names) - 1,
        }
        self.routed = routed
        self.names = tf.Variable(places.names, trainable=False)
        self.keys = sorted(variables)
        self.bank = [self.names, *(variables[key].value for key in self.keys)]
        # The factors that training needs are no part of it.
        model = routed.model
        self.tracked = [v.value for v in model.variables if not factor_of(v)]
        self._trace(model, job)

    def answer(self, model, inputs, adapter):
        """Calls the model with an adapter for every row."""
        ids = self.ids(inputs, adapter)
        return self.routed({"inputs": inputs, "adapter": ids})

    def ids(self, inputs, adapter):
        """Returns the places of the adapters of all rows, of their names."""
        rows = tf.shape(keras.tree.flatten(inputs)[0])[0]
        return tf.broadcast_to(self._places_of(adapter), [rows])

    def _places_of(self, adapter):
        """Returns the places of adapters; refuses unknown names."""
        names = self.names.value()
        taken = tf.not_equal(names, FREE)
        found = tf.equal(adapter[:, None], names) & taken
        known = tf.reduce_any(found, axis=1)
        has_name = taken & tf.not_equal(names, BASE)
        check = tf.debugging.Assert(
            tf.reduce_all(known),
            [
                "Every row needs the name of an adapter of this model, or '' "
                "for the base. Received:",
                tf.boolean_mask(adapter, ~known),
                "The adapters are:",
                tf.boolean_mask(names, has_name),
            ],
            summarize=-1,
        )
        with tf.control_dependencies([check]):
            return tf.argmax(found, axis=1, output_type=tf.int32)


class RoutedGeneratingEndpoint(GeneratingEndpoint):
    """A `GeneratingEndpoint` that takes the name of an adapter for every row.

    Args:
        by_row: The `RoutedEndpoint` of the model, whose variables it shares.
        job: Dict, the description of the job.
    """

    more_specs = RoutedEndpoint.more_specs

    def __init__(self, by_row, job):
        self.by_row = by_row
        by_row.routed.keep_pretrained_biases()
        super().__init__(by_row.routed.model, job)
        self.about["adapters"] = by_row.about["adapters"]

    def held(self, model):
        return self.by_row.tracked

    def answer(self, model, inputs, adapter):
        """Generates tokens with an adapter for every row."""
        ids = self.by_row.ids(inputs, adapter)
        # Not that of the adapted class, which prepares the active adapter.
        generate_step = plain_class_of(model).generate_step
        with self.by_row.routed.rows_with(ids):
            return generate_step(model, inputs, self.stop)


def tables(model):
    """Returns the lookup tables and similar resources of a model."""
    resource = tf.saved_model.experimental.TrackableResource
    held = tf.train.TrackableView(model).descendants()
    return [x for x in held if isinstance(x, resource)]

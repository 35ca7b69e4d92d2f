"""Marks the variables of adapters, by their constraint."""


class Factor:
    """Marks a variable as one factor of an adapter.

    Keras calls a variable's constraint at the end of every optimizer step.
    The factors of an adapter live on a manifold, and their gradients are
    those of the geometric step, so this refuses optimizers that move them
    directly. `keras_geolora.GeoLoRA` gives its inner optimizer other variables.
    """

    def __init__(self, adapter, role):
        self.adapter = adapter
        self.role = role

    def __call__(self, variable):
        raise RuntimeError(
            "The factors of an adapter live on a manifold that an "
            "ordinary optimizer would leave. Wrap the optimizer: "
            "`model.compile(optimizer=keras_geolora.GeoLoRA("
            "keras.optimizers.AdamW(1e-3)), ...)`. "
            f"Received an optimizer other than GeoLoRA that moves "
            f"variable '{variable.path}'."
        )

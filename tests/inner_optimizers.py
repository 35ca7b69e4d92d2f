"""Inner optimizers whose state must go over exactly: resumed, compacted."""

import keras

INNER = {
    "adamw": lambda: keras.optimizers.AdamW(1e-2),
    "momentum": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.1, 20), momentum=0.9
    ),
    "accumulating": lambda: keras.optimizers.Adam(
        1e-2, gradient_accumulation_steps=3
    ),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
}

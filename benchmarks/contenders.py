"""The methods that `accuracy.py` compares: adapters of Keras and of PEFT.

A contender is built once for a task, a rank and options, and then trains any
number of times, each from the start:

- `train(x, y, orders, rate, seed)` returns the mean loss of every epoch; the
  rate is constant, or falls linearly to zero in `steps`, if there are any;
- `logits(x)` predicts;
- `ranks()`, `parameters()` and `effective()`: the rank of every layer, the
  number of trainable parameters of the adapters, and those that are left when
  each is cut to its rank. The head, which is the same for all, is not counted.

Rank r means LoRA of rank r. The methods that find ranks get as many parameters
and share them out. `geolora` does so by a `parameter_budget` as large as that
LoRA, in buffers of `room` times r and from r / 2; with `falling`, the budget
begins at `room` times as much. `peft_adalora` has a `target_r`, and begins at
1.5 r as in its paper. All start with an update of zero and scale 1; AdamW has
the epsilon and the weight decay that are Keras' defaults.
"""

import copy
import math
import types

import measuring
import numpy as np
from tasks import BATCH, count_steps, draw_head

EPSILON, WEIGHT_DECAY = 1e-7, 0.004
EVALUATED_AT_ONCE = 125


def make_adamw(steps):
    """Returns AdamW of Keras, whose rate falls to zero in so many steps.

    The rate that it is assigned is the first. With 0 steps it is constant. (A
    schedule of Keras would be a part of what is compiled, so that every rate
    had to be compiled anew.)
    """
    import keras
    from keras import ops

    class AdamW(keras.optimizers.AdamW):
        def _get_current_learning_rate(self):
            if not steps:
                return self._learning_rate
            done = ops.cast(self.iterations, "float32") / steps
            return self._learning_rate * (1.0 - done)

    return AdamW(1e-3, epsilon=EPSILON, weight_decay=WEIGHT_DECAY)


def draw_weights(model, seed, rank):
    """Draws the random weights of adapters and head from a seed."""
    import keras

    from keras_geolora.layers.adapter import Orthonormal
    from keras_geolora.layers.factor import factor_of

    for index, weight in enumerate(counted(model.trainable_weights)):
        own_seed = 1000 * seed + index
        if factor := factor_of(weight):
            if factor.role == "S":
                continue
            draw = Orthonormal(rank, seed=own_seed)
        elif weight.name in ("A", "lora_kernel_a"):
            draw = keras.initializers.HeUniform(seed=own_seed)
        elif weight.name == "kernel":
            draw = keras.initializers.TruncatedNormal(0.0, 0.02, own_seed)
        else:
            continue
        weight.assign(draw(weight.shape, "float32"))


def counted(variables):
    """Returns variables without P and Q, which version 0.1 did not have.

    So seeds are those of earlier runs.
    """
    from keras_geolora.layers.factor import has_gradient

    return [v for v in variables if has_gradient(v)]


def enable_keras_lora(model, rank):
    """Enables Keras' own LoRA in the linear layers of a backbone.

    Returns:
        Dict from path to layer.
    """
    from keras_geolora.model.targeting import Layers

    layers = Layers(model.backbone).to_adapt("all-linear")
    for layer in model.backbone._flatten_layers(include_self=False):
        layer.trainable = False
    for layer in layers.values():
        layer.trainable = True
        layer.enable_lora(rank)
        if layer.bias is not None:
            layer.bias.trainable = False
    if hasattr(model, "_torch_params"):
        model._track_variables()
    return layers


class OnKeras:
    """A contender on a Keras model; a subclass says how to adapt it.

    One compilation serves all of its runs: everything that is a variable
    starts anew.
    """

    start_rank = None  # only GeoLoRA draws bases of a rank

    def __init__(self, task, rank, steps=0, **options):
        import keras

        self.task, self.rank, self.steps = task, rank, steps
        self.model = task.keras_model()
        self.optimizer = self.adapt(make_adamw(steps), **options)
        self.model.compile(
            optimizer=self.optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # Without it JAX would run operation by operation.
            jit_compile=keras.backend.backend() == "jax",
        )
        self.optimizer.build(self.model.trainable_variables)
        self.compiled = False
        variables = [*self.model.variables, *self.optimizer.variables]
        first = counted(variables)
        known = {id(v) for v in first}
        rest = [v for v in variables if id(v) not in known]
        self._start = measuring.remember([*first, *rest])

    def train(self, x, y, orders, rate, seed):
        import keras

        if not self.compiled:
            # The first `fit` was seen to differ from later ones (on torch),
            # presumably as it traces the model: it must not be that of a run.
            self.fit(x, y, orders[0][:BATCH])
            self.compiled = True
        keras.utils.set_random_seed(seed)
        self._begin(seed)
        self.optimizer.learning_rate = rate
        return [self.fit(x, y, order) for order in orders]

    def fit(self, x, y, order):
        """Trains for one epoch, and returns its loss."""
        history = self.model.fit(
            {name: column[order] for name, column in x.items()},
            y[order],
            batch_size=BATCH,
            shuffle=False,  # `order` is shuffled
            verbose=0,
        )
        return history.history["loss"][0]

    def _begin(self, seed):
        """Assigns all variables what they start with."""
        for index, (variable, value) in enumerate(self._start):
            if variable.name == "seed_generator_state":
                value = np.array([1000 * seed + index, 0], value.dtype)
            variable.assign(value)
        draw_weights(self.model, seed, self.start_rank)
        kernel, bias = self._head()
        kernel.assign(draw_head(self.task, kernel.shape[0], seed))
        bias.assign(np.zeros(bias.shape, "float32"))

    def _head(self):
        inside = {id(v) for v in self.model.backbone.variables}
        trainable = self.model.trainable_variables
        return [v for v in trainable if id(v) not in inside]

    def logits(self, x):
        return self.model.predict(x, batch_size=EVALUATED_AT_ONCE, verbose=0)

    def parameters(self):
        trained = self.model.backbone.trainable_variables
        return sum(math.prod(v.shape) for v in trained)

    def effective(self):
        return self.parameters()

    def ranks(self):
        return [self.rank] * len(self.layers)


class Adapted:
    """What contenders of this library have in common, whatever the model."""

    def enable(self, room, falling):
        """Adapts the model, and returns the `parameter_budget`.

        Args:
            room: Int, the columns of the buffers relative to the rank of LoRA.
                With 1 there is no budget.
            falling: Float, the share of the steps within which the budget
                falls from `room` times that of LoRA, or 0.
        """
        from keras_geolora.layers.tree import adapted_layers

        self.start_rank = max(1, self.rank // 2)
        self.model.enable_geolora(
            rank=self.start_rank, max_rank=self.rank * room, seed=0
        )
        self.layers = adapted_layers(self.model)
        if room == 1:
            return None
        # That of LoRA, which has no singular values to store.
        budget = self.rank * sum(
            sum(layer.kernel_view.matrix_shape)
            for layer in self.layers.values()
        )
        if falling:
            return falling_budget(budget, room, falling * self.steps)
        return budget

    def ranks(self):
        """Returns the rank of every layer."""
        return [layer.rank for layer in self.layers.values()]

    def effective(self):
        """Returns the number of parameters at the ranks found."""
        return sum(
            layer.rank * layer.adapter.parameters_per_rank
            for layer in self.layers.values()
        )


class GeoLoRA(Adapted, OnKeras):
    """This library, with the parameters that LoRA of a rank would have."""

    def adapt(
        self,
        inner,
        tolerance,
        room,
        ratio="auto",
        falling=0.0,
        interval=1,
        cut=20,
    ):
        import keras_geolora

        return keras_geolora.GeoLoRA(
            inner,
            tolerance,
            parameter_budget=self.enable(room, falling),
            max_update_ratio=ratio,
            retraction_interval=interval,
            cut_interval=cut,
        )


def falling_budget(budget, room, steps):
    """Returns a budget that falls from `room` times as much within the steps.

    As the cube of the steps left, like the schedule of AdaLoRA.
    """
    import keras

    return keras.optimizers.schedules.PolynomialDecay(
        room * budget, steps, budget, power=3
    )


class PlainLoRA(OnKeras):
    """`x @ A @ B` on the same matrices, of the same rank."""

    def adapt(self, optimizer):
        from plain_lora import enable_plain_lora

        self.layers = enable_plain_lora(self.model, self.rank)
        return optimizer


class KerasLoRA(OnKeras):
    """Keras' `enable_lora`: of a kernel of heads it factors the last axis."""

    def adapt(self, optimizer):
        self.layers = enable_keras_lora(self.model, self.rank)
        return optimizer


def torch_classifier(task):
    """Returns a module of the same weights, heads and loss, without adapter."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone
            self.dropout = torch.nn.Dropout(task.dropout)
            width = backbone.config.hidden_size
            self.classifier = torch.nn.Linear(width, task.classes)

        def forward(self, labels=None, **inputs):
            x = task.pool(self.backbone(**inputs))
            logits = self.classifier(self.dropout(x))
            if labels is None:
                return types.SimpleNamespace(logits=logits)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            # AdaLoRA adds to `loss` in place.
            return types.SimpleNamespace(
                logits=logits, loss=loss, task_loss=loss.item()
            )

    return Classifier(task.torch_backbone())


class OnPEFT:
    """A contender of PEFT, on the same weights; a subclass has its config."""

    def __init__(self, task, rank, steps=0, **options):
        import torch

        self.task, self.rank, self.options = task, rank, options
        self.steps = steps  # until the rate is zero; 0: it is constant
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = torch_classifier(task)
        # The linear layers of the backbone, as `all-linear` in Keras.
        self.targets = [
            name
            for name, module in self.base.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "classifier"
        ]

    def train(self, x, y, orders, rate, seed):
        import peft
        import torch

        torch.manual_seed(seed)
        base = copy.deepcopy(self.base)
        with torch.no_grad():
            weight = base.classifier.weight
            kernel = draw_head(self.task, weight.shape[1], seed)
            weight.copy_(torch.tensor(kernel.T))
            base.classifier.bias.zero_()
        config = self.config(
            count_steps(orders),
            target_modules=self.targets,
            modules_to_save=["classifier"],
        )
        self.model = peft.get_peft_model(base, config).to(self.device).train()
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            rate,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )
        allocate = getattr(self.model.base_model, "update_and_allocate", None)
        losses, count = [], 0
        for order in orders:
            batches = []
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                outputs = self.model(
                    labels=torch.tensor(y[rows]).long().to(self.device),
                    **self._inputs(x, rows),
                )
                outputs.loss.backward()
                if self.steps:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * (1 - count / self.steps)
                optimizer.step()
                if allocate is not None:
                    allocate(count)
                optimizer.zero_grad()
                batches.append(outputs.task_loss)
                count += 1
            losses.append(float(np.mean(batches)))
        return losses

    def _inputs(self, x, rows):
        arrays = {name: column[rows] for name, column in x.items()}
        inputs = self.task.torch_inputs(arrays)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def logits(self, x):
        import torch

        count = len(next(iter(x.values())))
        self.model.eval()
        with torch.no_grad():
            found = [
                self.model(
                    **self._inputs(x, slice(start, start + EVALUATED_AT_ONCE))
                ).logits.cpu()
                for start in range(0, count, EVALUATED_AT_ONCE)
            ]
        return torch.cat(found).numpy()

    def factors(self, name):
        return [
            parameter
            for path, parameter in self.model.named_parameters()
            if f"lora_{name}." in path
        ]

    def parameters(self):
        factors = [f for name in "AEB" for f in self.factors(name)]
        return sum(factor.numel() for factor in factors)

    def effective(self):
        return self.parameters()

    def ranks(self):
        return [self.rank] * len(self.targets)


class PEFTLoRA(OnPEFT):
    """LoRA of PEFT."""

    def config(self, steps, **shared):
        import peft

        alpha = self.options["scale"] * self.rank
        return peft.LoraConfig(r=self.rank, lora_alpha=alpha, **shared)


class PEFTAdaLoRA(OnPEFT):
    """AdaLoRA of PEFT, whose allocator is called in every step.

    From 1.5 times the rank as in its paper; it prunes from 10 % of the steps on
    by the cubic schedule, every 50th part of the training, and has its final
    ranks for the last 30 %.
    """

    def config(self, steps, **shared):
        import peft

        first = math.ceil(1.5 * self.rank)
        return peft.AdaLoraConfig(
            init_r=first,
            target_r=self.rank,
            # PEFT divides by the first rank, and goes on doing so.
            lora_alpha=self.options["scale"] * first,
            tinit=steps // 10,
            tfinal=steps * 3 // 10,
            deltaT=max(1, steps // 50),
            total_step=steps,
            **shared,
        )

    def ranks(self):
        return [int((E != 0).sum()) for E in self.factors("E")]

    def effective(self):
        return sum(
            rank * (A.shape[1] + B.shape[0] + 1)
            for rank, A, B in zip(
                self.ranks(),
                self.factors("A"),
                self.factors("B"),
                strict=True,
            )
        )


CONTENDERS = {
    "geolora": GeoLoRA,
    "plain_lora": PlainLoRA,
    "keras_lora": KerasLoRA,
    "peft_lora": PEFTLoRA,
    "peft_adalora": PEFTAdaLoRA,
}

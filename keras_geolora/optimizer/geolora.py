"""GeoLoRA: the geometric step around any Keras optimizer."""

import functools
import numbers
import warnings

import keras
import numpy as np
from keras import ops

from keras_geolora.distribution import tf_replicas
from keras_geolora.distribution.layouts import apart_from_map
from keras_geolora.distribution.virtual_devices import warn_of_virtual_devices
from keras_geolora.geometry import integrator
from keras_geolora.geometry.budget import spend
from keras_geolora.keras_internals import (
    checked_gradients,
    decays,
    own_state,
    rate_as_given,
    variables_of,
)
from keras_geolora.layers.factor import has_gradient
from keras_geolora.optimizer.groups import (
    GroupStep,
    build_inner,
    carry_groups,
    find_adapters,
    plain_variables,
)
from keras_geolora.optimizer.precision import full_precision
from keras_geolora.optimizer.retractions import (
    Program,
    is_due,
    update_if,
    was_due,
)
from keras_geolora.optimizer.slot_rules import slot_rules

# Stands for "no budget": the largest float32 that fits an int32.
UNLIMITED = 2**31 - 128
# The default bound on the change of each layer: usually this, more in small
# models and less in deep ones, where the changes of all layers add up.
USUAL_BOUND, LARGEST_BOUND = 0.008, 0.06
SHARED, MOST_TOGETHER = 0.3, 0.5
# More than usual is at most this, divided by the smaller side of a kernel: a
# step has few directions, and the norm of a wide kernel is that of many.
WIDE_BOUND = 8.0
# Options that may be schedules.
SCHEDULED = ("tolerance", "rank_budget", "parameter_budget")


@keras.saving.register_keras_serializable(package="keras_geolora")
class GeoLoRA(keras.optimizers.Optimizer):
    """Trains low-rank adapters on their manifold and finds their ranks.

    Wraps any Keras optimizer. Every step moves an adapter, `U @ S @ V.T`, in
    the tangent space of the manifold of low-rank matrices: the inner optimizer
    updates the coordinates `K = U S`, `S` and `L = V S.T` with its own rule.
    Now and then a small singular value decomposition returns to the manifold:
    new directions join the bases, negligible ones are cut, and the slots of the
    inner optimizer follow. Variables that belong to no adapter get the inner
    optimizer's step unchanged, bit for bit.

    Options of the step, such as `learning_rate`, `weight_decay`, `clipnorm`
    or `gradient_accumulation_steps`, are set on the inner optimizer.

    Args:
        inner_optimizer: A new `keras.optimizers.Optimizer`, or its name.
            SGD, Adam, AdamW, Nadam, Adamax, RMSprop, Lion, Adagrad, Adadelta,
            Adafactor, Lamb and Muon work; see `register_slot_rules` for
            others.
        tolerance: Float in [0, 1), the share of the norm of `S` that a cut
            may discard. Larger means lower ranks. Defaults to 0.1. Or a
            schedule, as below.
        rank_budget: Int or `None`, the largest sum of the ranks of all
            adapters. Every return to the manifold keeps the largest singular
            values of all layers within it. `tolerance` applies too. Or a
            schedule: a `LearningRateSchedule`, or any callable that takes the
            number of updates and returns a number. Values below the sum of all
            `min_rank` mean that sum, and `inf` means no budget yet.
        parameter_budget: Int or `None`, the largest number of parameters of
            all adapters at their ranks, instead of `rank_budget`. Singular
            values compete by their square per parameter. Or a schedule.
        cut_interval: Int, number of steps between two cuts. In between the
            rank only grows, which gives slow directions time. Defaults
            to 100. `fit` of an adapted model also cuts at the ends of epochs,
            before validation, see `keras_geolora.callbacks.EpochCut`.
        max_update_ratio: Float, `None` or `"auto"`: the largest change of a
            layer in one step, relative to the Frobenius norm of its kernel.
            If the longest step so far, rescaled to the current rank, exceeds
            the bound, this and all later steps are scaled down by that
            factor, like a smaller learning rate for the layer. This makes
            training tolerant of large learning rates, while schedules keep
            their effect. `None` means no bound. `"auto"`, the default, means
            0.008 for 37 to 62 adapters. Because the changes of all layers add
            up, fewer share 0.3, and more share 0.5. Fewer get at most 0.06
            each, and 8 divided by the smaller side of the kernel, but never
            less than 0.008. And there is no bound for `SGD`, whose step is
            proportional to the gradient. Layers with an all-zero kernel have
            none.
        retraction_interval: Int or `"auto"`, number of steps between two
            returns to the manifold. In between the bases stay, and steps are
            much cheaper. `"auto"`, the default, means an interval that grows:
            after `t` steps `t / 4`, at least 1 and at most 20. 1 is the method
            of the paper. `fit` of an adapted model also returns at the end of
            every epoch, and `settle` at any time.
        name: String or `None`.

    Raises:
        ValueError: If an option is out of range or belongs on the inner
            optimizer, or if the inner optimizer cannot follow moving bases.

    An adapter whose gradient is not finite keeps its factors, and its slots are
    updated with a gradient of zero; `skipped_steps` counts the steps in which
    this happened to any adapter.
    (Steps that a `LossScaleOptimizer` around this one drops as a whole never
    reach it and are not counted.)

    Example:

    ```python
    import keras
    import numpy as np
    from keras_geolora import GeoLoRA, GeoLoRADense

    model = keras.Sequential([keras.Input((8,)), GeoLoRADense(4, rank=2)])
    model.compile(optimizer=GeoLoRA(keras.optimizers.AdamW(1e-3)), loss="mse")
    model.fit(np.ones((32, 8)), np.ones((32, 4)), verbose=0)
    ```

    References:
        Schotthöfer et al. 2024, GeoLoRA, arXiv 2410.18720.
    """

    def __init__(
        self,
        inner_optimizer,
        tolerance=0.1,
        rank_budget=None,
        parameter_budget=None,
        cut_interval=100,
        max_update_ratio="auto",
        retraction_interval="auto",
        name=None,
        **kwargs,
    ):
        if kwargs:
            option = next(iter(kwargs))
            raise ValueError(
                f"`{option}` is an option of the inner optimizer: write "
                f"`GeoLoRA(keras.optimizers.AdamW(..., {option}=...))`. "
                f"Received: {option}={kwargs[option]!r}"
            )
        tolerance = as_python(tolerance)
        rank_budget = as_python(rank_budget)
        parameter_budget = as_python(parameter_budget)
        cut_interval = as_python(cut_interval)
        max_update_ratio = as_python(max_update_ratio)
        retraction_interval = as_python(retraction_interval)
        check_tolerance(tolerance)
        check_budgets(rank_budget, parameter_budget)
        if not is_number(cut_interval, int) or cut_interval < 1:
            raise ValueError(
                "`cut_interval` counts the steps between two cuts, so it "
                "must be an integer of at least 1. "
                f"Received: cut_interval={cut_interval!r}"
            )
        check_update_ratio(max_update_ratio)
        check_retraction_interval(retraction_interval)
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        slot_rules(inner_optimizer)
        if inner_optimizer.built:
            raise ValueError(
                "`inner_optimizer` must be new: slots of earlier training do "
                "not follow the steps of GeoLoRA. Received: "
                f"inner_optimizer='{inner_optimizer.name}', which is built"
            )
        with apart_from_map():
            super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.tolerance = tolerance
        self.rank_budget = rank_budget
        self.parameter_budget = parameter_budget
        self.cut_interval = cut_interval
        self.max_update_ratio = max_update_ratio
        self.retraction_interval = retraction_interval
        self._without_weight_decay = None  # indices of variables, once known
        self._retraction = None  # outside of steps, once needed

    def build(self, variables):
        """Creates the state of both optimizers.

        Args:
            variables: List of the variables to train, with all three factors
                of an adapter or none.
        """
        if self.built:
            return
        variables = list(variables)
        tf_replicas.check_strategy(variables)
        adapters = [adapter for adapter, _ in find_adapters(variables)]
        check_floor(*self._budget, adapters)
        counted = list(filter(has_gradient, variables))  # as in old files
        if self._without_weight_decay is not None:
            self.inner_optimizer.exclude_from_weight_decay(
                [counted[i] for i in self._without_weight_decay]
            )
        self._without_weight_decay = [
            i
            for i, v in enumerate(counted)
            if not decays(self.inner_optimizer, v)
        ]
        warn_of_virtual_devices()
        with apart_from_map():
            self._create_state(variables)

    def _create_state(self, variables):
        self.skipped_steps = self.add_variable(
            shape=(), dtype="int32", name="skipped_steps"
        )
        groups = build_inner(
            self.inner_optimizer,
            variables,
            averages=self.retraction_interval == 1,
        )
        super().build(variables)
        self._groups = Untracked(groups)
        for number, group in enumerate(groups):
            self._add_group_state(group, f"adapters_{number}")

    @property
    def _budget(self):
        """The budget or `None`, the name of the option, and what it counts."""
        if self.parameter_budget is not None:
            return self.parameter_budget, "parameter_budget", "parameters"
        return self.rank_budget, "rank_budget", "ranks"

    @property
    def has_budget(self):
        """Bool, whether there is a budget of ranks or parameters."""
        return self._budget[0] is not None

    def budget_of(self, adapters, updates=None):
        """Returns the budget of adapters and its unit.

        Args:
            adapters: List of `keras_geolora.LowRankAdapter`s.
            updates: Int scalar, the number of updates. Defaults to the
                current one.

        Returns:
            Tuple of the budget and its unit, `"ranks"` or `"parameters"`. The
            budget is an int scalar that covers at least the `min_rank` of
            every adapter, or `None` if there is none.
        """
        budget, _, unit = self._budget
        if budget is None:
            return None, unit
        if updates is None:
            updates = ops.cast(self.iterations, "int32")
        budget = as_count(value_at(budget, updates))
        return ops.maximum(budget, smallest(adapters, unit)), unit

    def _add_group_state(self, group, name):
        """Adds the state of a group, under unique names.

        `get_state_tree` of Keras identifies variables by their paths.
        """
        group.max_change = self._add_max_change(group, f"{name}_max_change")
        if group.max_change is not None:
            group.longest = self._add_numbers(group, f"{name}_longest_step")
        group.discarded = self._add_numbers(group, f"{name}_discarded_share")

    def _add_numbers(self, group, name):
        """Adds a variable with a zero for each matrix of a group."""
        return self.add_variable(
            shape=(group.size,), dtype="float32", name=name
        )

    def _add_max_change(self, group, name):
        """Adds a variable with the bounds on the steps of a group."""
        ratio = self.max_update_ratio
        if ratio == "auto":
            ratio = self._usual_ratio(group)
        if ratio is None:
            return None

        def bounds(shape, dtype=None):
            # The bound is on `scale * U S V.T`, but the step moves `U S V.T`.
            norms = [
                ops.convert_to_numpy(a.kernel_norm()) / abs(a.scale)
                for a in group.adapters
            ]
            norms = np.concatenate([np.atleast_1d(norm) for norm in norms])
            norms = ops.convert_to_tensor(norms, dtype)
            return ops.where(norms > 0, ratio * norms, float("inf"))

        return self.add_variable(
            shape=(group.size,),
            initializer=bounds,
            dtype="float32",
            name=name,
        )

    def _usual_ratio(self, group):
        """Returns the `max_update_ratio` that `"auto"` stands for."""
        if is_proportional(self.inner_optimizer):
            return None
        number = sum(len(each.adapters) for each in self._groups.content)
        adapter = group.adapters[0]  # all have its shape
        side = min(adapter.input_dim, adapter.output_dim)
        few = min(SHARED / number, LARGEST_BOUND, WIDE_BOUND / side)
        return min(max(few, USUAL_BOUND), MOST_TOGETHER / number)

    def _beside_groups(self):
        """Returns the variables of the inner optimizer outside of groups."""
        of_groups = {
            id(variable)
            for group in self._groups.content
            for store in group.state()
            for variables in store.variables
            for variable in variables
        }
        variables = self.inner_optimizer.variables
        return [v for v in variables if id(v) not in of_groups]

    @property
    def variables(self):
        """List of the variables of both optimizers."""
        return own_state(self) + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """Number of updates so far, as the inner optimizer counts them."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss):
        """Scales the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    @property
    def loss_scale_factor(self):
        """The loss scale of the inner optimizer."""
        inner_optimizer = getattr(self, "inner_optimizer", None)
        return getattr(inner_optimizer, "loss_scale_factor", None)

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        # Keras sets it before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = factor

    def set_weights(self, weights):
        """Sets the state of both optimizers, in the order of `variables`.

        Args:
            weights: List of arrays, one for each of `variables`.
        """
        variables = self.variables
        if not self.built or len(weights) != len(variables):
            raise ValueError(
                "`weights` must hold an array for each of `variables`, and "
                f"the optimizer must be built. Received: {len(weights)} "
                f"weights for {len(variables)} variables"
            )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the weight decay of the inner optimizer.

        Call it before the optimizer is built, as for any Keras optimizer.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the "
                "optimizer is built, so before `fit`. Received: "
                f"optimizer '{self.name}', which is built"
            )
        self._without_weight_decay = None
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        """Finalizes variables as the inner optimizer does."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def apply_gradients(self, grads_and_vars):
        """Like `apply`, for pairs; returns `iterations`."""
        pairs = list(grads_and_vars)
        self.apply([g for g, _ in pairs], [v for _, v in pairs])
        return self.iterations

    @full_precision()
    def apply(self, grads, trainable_variables=None):
        """Takes one step.

        Args:
            grads: List of gradients, as in `keras.optimizers.Optimizer.apply`.
            trainable_variables: List of the variables, or `None` for those
                that the optimizer was built on.
        """
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "Without `trainable_variables` the optimizer must already "
                    "be built: call `optimizer.build(trainable_variables)` "
                    "first, or write `optimizer.apply(grads, "
                    "trainable_variables)`. Received: trainable_variables=None"
                )
            trainable_variables = variables_of(self)
        grads, trainable_variables = list(grads), list(trainable_variables)
        if not grads:
            return
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "`grads` must hold a gradient, or `None`, for each variable. "
                f"Received: {len(grads)} gradients for "
                f"{len(trainable_variables)} variables"
            )
        if not self.built:
            self.build(trainable_variables)
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(
                grads, trainable_variables, strict=True
            )
            if has_gradient(variable)
        ]
        grads, moved = checked_gradients(
            self, [g for g, _ in pairs], [v for _, v in pairs]
        )
        gradients = {id(v): g for g, v in zip(grads, moved, strict=True)}
        steps = [GroupStep(g, gradients) for g in self._groups.content]
        moving = [step for step in steps if step.takes_part.any()]
        pairs = [(gradients[id(v)], v) for v in plain_variables(moved)]
        for step in moving:
            pairs += step.lift(self.inner_optimizer)
        updates_before = ops.cast(self.iterations, "int32") + 0
        tf_replicas.apply(
            self.inner_optimizer, *map(list, zip(*pairs, strict=True))
        )

        updates = ops.cast(self.iterations, "int32")
        # While gradients are accumulated, nothing moves.
        accumulates = self.inner_optimizer.gradient_accumulation_steps
        updated = updates > updates_before if accumulates else True
        finite = [step.advance() for step in moving]
        if finite:
            finite = ops.all(ops.concatenate(finite))
            self.skipped_steps.assign_add(1 - ops.cast(finite, "int32"))
            self._retract_in_turn(steps, updates, updated)
        for step in moving:
            step.clear_gradients()

    def _retract_in_turn(self, steps, updates, updated):
        """Retracts the adapters whose turn it is, and all if a cut is due.

        Args:
            steps: List of `GroupStep`s.
            updates: Int scalar, number of updates so far.
            updated: Bool scalar, whether the last step was one.
        """
        # Groups that share a budget choose their ranks together.
        turns = [steps] if self.has_budget else [[step] for step in steps]
        cutting = ops.equal(updates % self.cut_interval, 0)
        tolerance = ops.where(cutting, value_at(self.tolerance, updates), 0.0)
        earlier = None
        for number, turn in enumerate(turns):
            if not any(step.takes_part.any() for step in turn):
                continue
            due = updated
            if self.retraction_interval != 1:
                now = is_due(
                    updates, self.retraction_interval, number, len(turns)
                )
                now = ops.logical_or(now, cutting)
                due = now if updated is True else ops.logical_and(now, updated)
            update_if(
                due,
                functools.partial(
                    self._retract, turn, updates, tolerance, earlier
                ),
                [v for step in turn for v in step.group.moved_variables()],
            )
            earlier = turn[-1].group.discarded.value

    def _retract(self, steps, updates, tolerance, earlier=None):
        """Returns adapters to the manifold.

        Args:
            steps: List of `GroupStep`s.
            updates: Int scalar, number of updates so far.
            tolerance: Scalar, share of each adapter's norm that may be cut.
            earlier: Array to be computed first, or `None`.
        """
        for step in steps:
            step.augment(earlier)
            earlier = step.augmented.sigma
        ranks = self._choose_ranks(steps, updates, tolerance)
        for step, rank in zip(steps, ranks, strict=True):
            step.retract(rank)

    def _choose_ranks(self, steps, updates, tolerance):
        """Returns the ranks of the adapters of each `GroupStep`."""
        adapters = [a for step in steps for a in step.group.adapters]
        budget, unit = self.budget_of(adapters, updates)
        requests = [step.rank_request(tolerance, unit) for step in steps]
        if budget is None:
            return [request.wanted for request in requests]
        return spend(budget, requests)

    def cut(self):
        """Cuts every adapter to the rank that it needs now.

        Between two cuts ranks only grow; this cuts them to those that
        `tolerance` asks for. Nothing else changes, and training can go on.
        `model.fit` of an adapted model calls it at the end of an epoch.
        """
        updates = ops.cast(self.iterations, "int32")
        self._retract_all(value_at(self.tolerance, updates))

    def settle(self):
        """Returns every adapter to the manifold now, within the budget.

        Between two retractions the update of an adapter is
        `U S V.T + P V.T + U Q.T`; afterwards `P` and `Q` are zero. What exceeds
        `max_rank` is lost, as in any retraction. Without a budget, no rank is
        cut. Training can go on. Does nothing if the last step was a retraction
        of all adapters that took part in it.
        """
        if not self.built:
            return
        updates = int(ops.convert_to_numpy(self.iterations))
        turns = 1 if self.has_budget else len(self._groups.content)
        cut = updates % self.cut_interval == 0
        if not cut and not was_due(updates, self.retraction_interval, turns):
            self._retract_all(0.0)

    @full_precision()
    def _retract_all(self, tolerance):
        """Returns all adapters to the manifold, outside of a step."""
        groups = self.adapter_groups
        if not groups:
            return
        if self._retraction is None:

            def retract(updates, tolerance):
                steps = [GroupStep(group) for group in groups]
                self._retract(steps, updates, tolerance)

            variables = [v for g in groups for v in g.moved_variables()]
            self._retraction = Untracked(Program(retract, variables))
        updates = ops.cast(self.iterations, "int32")
        tolerance = ops.cast(tolerance, "float32")
        self._retraction.content(updates, tolerance)

    def discarded_share(self, adapter):
        """Returns what the last truncation of an adapter discarded.

        Args:
            adapter: `keras_geolora.LowRankAdapter`.

        Returns:
            Float in [0, 1), the share of the Frobenius norm of the update,
            or `None` if this optimizer does not train the adapter (yet). The
            largest one of a batched adapter.
        """
        shares = self.discarded_shares(adapter)
        return shares and max(shares)

    def discarded_shares(self, adapter):
        """Returns what the last truncation of each matrix discarded.

        Args:
            adapter: `keras_geolora.LowRankAdapter`.

        Returns:
            List with a float as in `discarded_share` for each matrix of a
            batched adapter, or a single one; or `None` if this optimizer does
            not train the adapter (yet).
        """
        group = self._group_of(adapter)
        if group is None:
            return None
        shares = ops.convert_to_numpy(group.discarded)[group.rows(adapter)]
        return shares.tolist()

    def step_scale(self, adapter):
        """Returns the factor by which `max_update_ratio` scales steps.

        Args:
            adapter: `keras_geolora.LowRankAdapter`.

        Returns:
            Float in (0, 1], 1 where the bound does not act, or `None` if this
            optimizer does not train the adapter (yet). The smallest one of a
            batched adapter.
        """
        group = self._group_of(adapter)
        if group is None or group.max_change is None:
            return group and 1.0
        rows = group.rows(adapter)
        basis = adapter.U.value if adapter.count else adapter.U.value[None]
        rank = integrator.count(integrator.active_columns(basis))[..., 0]
        scales = integrator.step_scale(
            group.max_change.value[rows],
            group.longest.value[rows],
            ops.sqrt(ops.cast(rank, "float32")),
        )
        return float(ops.convert_to_numpy(ops.min(scales)))

    @property
    def adapter_groups(self):
        """List of `AdapterGroup`s, adapters that step together; first empty."""
        return list(self._groups.content) if self.built else []

    def _group_of(self, adapter):
        """Returns the group of an adapter, or `None`."""
        for group in self.adapter_groups:
            if adapter in group.adapters:
                return group
        return None

    def get_config(self):
        """Returns the configuration, including that of the inner optimizer.

        Raises:
            ValueError: If it was built for adapters that have since been
                merged, removed or exchanged: a file could not be loaded.
        """
        if self.built:
            check_active(self._groups.content)
        inner_optimizer = keras.saving.serialize_keras_object(
            self.inner_optimizer
        )
        # On torch, Keras would write classes that other backends cannot use.
        public = getattr(keras.optimizers, inner_optimizer["class_name"], None)
        if public is not None and isinstance(self.inner_optimizer, public):
            inner_optimizer["module"] = "keras.optimizers"
            inner_optimizer["registered_name"] = None
        config = {
            "name": self.name,
            "inner_optimizer": inner_optimizer,
            **{name: as_config(getattr(self, name)) for name in SCHEDULED},
            "cut_interval": self.cut_interval,
            "max_update_ratio": self.max_update_ratio,
            "retraction_interval": self.retraction_interval,
        }
        if self._without_weight_decay:  # Keras does not save it
            places = list(self._without_weight_decay)
            config["without_weight_decay"] = places
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the optimizer from its configuration."""
        config = dict(config)
        for name in ("inner_optimizer", *SCHEDULED):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        inner_optimizer = config.pop("inner_optimizer")
        if "retraction_interval" not in config:  # a file of version 0.1
            config["retraction_interval"] = 1
            if config.get("max_update_ratio") == "auto":
                free = is_proportional(inner_optimizer)
                config["max_update_ratio"] = None if free else USUAL_BOUND
        without_weight_decay = config.pop("without_weight_decay", None)
        optimizer = cls(inner_optimizer, **config)
        optimizer._without_weight_decay = without_weight_decay
        return optimizer


def check_active(groups):
    """Refuses to save an optimizer whose adapters are no longer active."""
    gone = [a.path for g in groups for a in g.adapters if not a.is_active]
    if gone:
        raise ValueError(
            "The optimizer was built for adapters that have since been "
            "merged, removed or replaced, so a file that contains it could "
            "not be loaded. Compile the model that owns it again, then save. "
            f"Received: an optimizer for {len(gone)} adapters that are no "
            f"longer active, such as '{gone[0]}'"
        )


def find_geolora(optimizer):
    """Returns the `GeoLoRA`, maybe inside a `LossScaleOptimizer`, or `None`.

    Args:
        optimizer: Any optimizer, or `None`.
    """
    for candidate in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if isinstance(candidate, GeoLoRA):
            return candidate
    return None


def renewed(optimizer):
    """Creates an optimizer, not built, with the options of another.

    Unlike with a configuration, functions and classes need not be registered.

    Args:
        optimizer: `GeoLoRA`, its inner optimizer, or a wrapper around it.
    """
    if isinstance(optimizer, GeoLoRA):
        options = (
            "cut_interval",
            "max_update_ratio",
            "retraction_interval",
            "name",
            *SCHEDULED,
        )
        new = type(optimizer)(
            renewed(optimizer.inner_optimizer),
            **{option: getattr(optimizer, option) for option in options},
        )
        new._without_weight_decay = optimizer._without_weight_decay
        return new
    with warnings.catch_warnings():  # about functions, which are not used
        warnings.simplefilter("ignore")
        config = optimizer.get_config()
    if config.pop("inner_optimizer", None) is not None:
        return type(optimizer)(renewed(optimizer.inner_optimizer), **config)
    rate = rate_as_given(optimizer)
    is_number = isinstance(rate, keras.Variable)
    if is_number:
        rate = float(ops.convert_to_numpy(rate))
    config["learning_rate"] = rate
    return type(optimizer).from_config(config)


def rebuild(optimizer, new, variables):
    """Rebuilds an optimizer, in place, on variables of other shapes.

    Its state is kept: slots are cut or zero-padded to the new shapes of their
    variables.

    Args:
        optimizer: Built `GeoLoRA`, or a wrapper around one.
        new: The result of `renewed(optimizer)`.
        variables: List that replaces the variables it was built on, in the
            same order; they differ in the width of the buffers of adapters.
    """
    new.build(variables)
    carry_state(optimizer, new)
    take_attributes(optimizer, new)


def start_anew(optimizer):
    """Resets the state of a built optimizer to that of a new one, in place.

    For factors that were loaded: the slots are in coordinates of bases that
    are gone. The learning rate stays as it is, the count of steps begins
    again.

    Args:
        optimizer: Built `GeoLoRA`, or a wrapper around one.
    """
    new = renewed(optimizer)
    new.build(variables_of(optimizer))
    carry_state(new, optimizer)


def carry_state(old, new):
    """Copies the state of one optimizer to another, fitted to its shapes."""
    if not isinstance(old, GeoLoRA):
        carry_variables(own_state(old), own_state(new))
        if hasattr(old, "inner_optimizer"):
            carry_state(old.inner_optimizer, new.inner_optimizer)
        return
    # The bounds on steps are not copied: they come from the kernels.
    new.skipped_steps.assign(old.skipped_steps)
    carry_variables(old._beside_groups(), new._beside_groups())
    carry_groups(old._groups.content, new._groups.content)


def carry_variables(old, new):
    """Assigns the values of variables to others of the same shapes."""
    for before, after in zip(old, new, strict=True):
        after.assign(before.value)


def take_attributes(optimizer, other):
    """Replaces an optimizer's attributes by another's, in place.

    Inner optimizers stay the same objects, too: users may hold references to
    them to set options.
    """
    wrapped = getattr(optimizer, "inner_optimizer", None)
    if wrapped is not None:
        take_attributes(wrapped, other.inner_optimizer)
        other.inner_optimizer = wrapped
    vars(optimizer).clear()
    vars(optimizer).update(vars(other))


class Untracked:
    """Hides objects from Keras, because others own their variables."""

    def __init__(self, content):
        self.content = content


def value_at(value, updates):
    """Returns a number, or the value of a schedule after some updates."""
    return value(updates) if callable(value) else value


def as_count(value):
    """Casts a number to int32, clipped to its largest value.

    Otherwise backends raise an error, or return the smallest int.
    """
    if isinstance(value, numbers.Real):
        return ops.cast(int(min(max(0, value), 2**31 - 1)), "int32")
    value = ops.convert_to_tensor(value)
    if keras.backend.is_float_dtype(value.dtype):
        value = ops.clip(ops.cast(value, "float32"), 0, UNLIMITED)
    return ops.cast(value, "int32")


def as_config(value):
    """Returns a number or a schedule in a form that JSON can hold."""
    if callable(value):
        return keras.saving.serialize_keras_object(value)
    return value


def is_proportional(optimizer):
    """Returns whether steps of an optimizer are proportional to gradients."""
    return isinstance(optimizer, keras.optimizers.SGD)


def check_tolerance(tolerance):
    """Refuses a tolerance that is neither in [0, 1) nor a schedule."""
    number = is_number(tolerance, (int, float)) and 0 <= tolerance < 1
    if not number and not callable(tolerance):
        raise ValueError(
            "`tolerance` is the share of the norm that truncation may "
            "discard, so it must lie in [0, 1). "
            f"Received: tolerance={tolerance}. A usual choice is 0.1."
        )


def check_budgets(rank_budget, parameter_budget):
    """Refuses invalid budgets, and two of them."""
    budgets = {"rank_budget": rank_budget, "parameter_budget": parameter_budget}
    given = {k: v for k, v in budgets.items() if v is not None}
    if len(given) == 2:
        raise ValueError(
            "A budget counts ranks or parameters. Give `rank_budget` or "
            f"`parameter_budget`, not both. Received: {given}"
        )
    for name, budget in given.items():
        if not callable(budget) and not (
            is_number(budget, int) and 0 < budget < 2**31
        ):
            raise ValueError(
                f"`{name}` is shared by all adapters, so it must be a "
                "positive integer or a schedule. "
                f"Received: {name}={budget!r}"
            )


def check_floor(budget, name, unit, adapters):
    """Refuses a budget that does not cover every `min_rank`."""
    floor = smallest(adapters, unit)
    if budget is None or callable(budget) or budget >= floor:
        return
    raise ValueError(
        f"`{name}` must cover the `min_rank` of every adapter. Received: "
        f"{name}={budget} for {len(adapters)} adapters, which need at least "
        f"{floor} {unit}. Give a larger budget, or adapt fewer layers: "
        "`enable_geolora(targets=...)`"
    )


def smallest(adapters, unit):
    """Returns the cost of adapters at their `min_rank`.

    Args:
        adapters: List of adapters.
        unit: `"ranks"` or `"parameters"`.
    """
    per_rank = [
        1 if unit == "ranks" else adapter.parameters_per_rank
        for adapter in adapters
    ]
    return sum(
        (adapter.count or 1) * adapter.min_rank * cost
        for adapter, cost in zip(adapters, per_rank, strict=True)
    )


def check_update_ratio(ratio):
    """Refuses an invalid bound on the change of a layer."""
    if ratio is None or ratio == "auto":
        return
    if not is_number(ratio, (int, float)) or not ratio > 0:
        raise ValueError(
            "`max_update_ratio` bounds the change of a layer in one step, "
            "relative to its kernel, so it must be positive, `None` or "
            f"'auto'. Received: max_update_ratio={ratio!r}"
        )


def check_retraction_interval(interval):
    """Refuses an interval that is neither a count nor `"auto"`."""
    if interval == "auto" or (is_number(interval, int) and interval >= 1):
        return
    raise ValueError(
        "`retraction_interval` counts the steps between two retractions, so "
        "it must be an integer of at least 1, or 'auto'. "
        f"Received: retraction_interval={interval!r}"
    )


def as_python(value):
    """Converts a NumPy number to a Python number, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


def is_number(value, kinds):
    """Returns whether a value is a number of some kinds and not a bool."""
    return isinstance(value, kinds) and not isinstance(value, bool)

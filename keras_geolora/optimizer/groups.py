"""Adapters of equal shape, stacked, and the step that moves them.

The inner optimizer sees neither adapters nor their factors. Its variables for
a group are the unknowns `K`, `S` and `L`: scratch, written before its step and
read after it. If the optimizer treats every number independently, one variable
holds the unknowns of all adapters, and its slots are stacked the same way, so
that the number of operations does not grow with the number of layers.

An adapter of a weight that holds many matrices, such as the kernels of experts,
is batched: its factors have one more axis, in front. A stack holds the matrices
of all its adapters, one after the other, and each has a rank of its own.
"""

import keras
import numpy as np
from keras import ops

from keras_geolora.distribution import tf_replicas
from keras_geolora.distribution.layouts import layout_of, stacked_layout
from keras_geolora.geometry import integrator
from keras_geolora.geometry.budget import RankRequest
from keras_geolora.geometry.integrator import (
    Block,
    Unknowns,
    choose,
    holds_everywhere,
)
from keras_geolora.geometry.transport import transport
from keras_geolora.keras_internals import decays, gradient_accumulators
from keras_geolora.layers.factor import TRAINED_ROLES, factor_of
from keras_geolora.optimizer.slot_rules import (
    find_slots,
    has_factored_moments,
    is_elementwise,
    slot_rules,
)
from keras_geolora.optimizer.traced_once import traced_once, with_shape


class Store:
    """Holds the arrays of all adapters of a group, factor by factor.

    Args:
        variables: `Block` or `Unknowns` of lists of variables: one variable
            for each adapter, or a single one with an axis over the matrices.
        counts: Tuple with the number of matrices of each adapter, `None` for
            one that is not batched; or `None` in place of the tuple, for a
            single variable.
    """

    def __init__(self, variables, counts):
        self.variables = variables
        self.counts = counts

    @classmethod
    def joined(cls, stores):
        """Joins stores that have a variable for each adapter."""
        kind = type(stores[0].variables)
        by_role = zip(*(store.variables for store in stores), strict=True)
        variables = kind(*(sum(lists, []) for lists in by_role))
        return cls(variables, sum((store.counts for store in stores), ()))

    @property
    def stacked(self):
        """Bool, whether a single variable holds all matrices."""
        return self.counts is None

    def read(self, to_overwrite=False):
        """Returns a `Block` or `Unknowns` of stacked arrays.

        Args:
            to_overwrite: Bool, whether the variables are assigned to while the
                arrays are still in use.
        """

        def stack(variables):
            if not self.stacked:
                return stacked([v.value for v in variables], self.counts)
            value = variables[0].value
            return ops.copy(value) if to_overwrite else value  # torch: in place

        arrays = map(ops.stop_gradient, map(stack, self.variables))
        return type(self.variables)(*arrays)

    def write(self, arrays):
        """Assigns stacked arrays to the variables.

        `None` in place of an array leaves its variables as they are.
        """
        for value, variable in self.pair(arrays):
            variable.assign(value)

    def pair(self, arrays):
        """Returns pairs of an array and its variable."""
        pairs = []
        for variables, array in zip(self.variables, arrays, strict=True):
            if array is None:
                continue
            values = [array]
            if not self.stacked:
                values = unstacked(array, self.counts)
            pairs += zip(values, variables, strict=True)
        return pairs


def stacked(arrays, counts):
    """Stacks the arrays of adapters, matrix by matrix.

    Args:
        arrays: List of arrays, with a leading axis where `counts` has a number.
        counts: Tuple of ints and `None`s.
    """
    if not any(counts):
        return ops.stack(arrays)
    return ops.concatenate(
        [
            array[None] if count is None else array
            for array, count in zip(arrays, counts, strict=True)
        ]
    )


def unstacked(array, counts):
    """Undoes `stacked`."""
    if not any(counts):
        return ops.unstack(array, len(counts))
    ends = np.cumsum([count or 1 for count in counts]).tolist()
    return [
        array[end - 1] if count is None else array[end - count : end]
        for end, count in zip(ends, counts, strict=True)
    ]


class AdapterGroup:
    """Adapters of equal shape.

    Attributes:
        adapters: Tuple of the adapters.
        places: Tuple of their positions among all adapters of the optimizer.
        counts: Tuple with the number of matrices of each, `None` if it is not
            batched.
        size: Int, the number of all their matrices.
        factors: `Store` of their `U`, `S`, `V`, `P` and `Q`.
        unknowns: `Store` of the variables of the inner optimizer.
        slots: List of pairs of a slot's kind and its `Store`.
        accumulators: List of at most one `Store`, the accumulated gradients.
        max_change: Variable `(matrices,)`, the bounds on the steps, or `None`.
        longest: Variable `(matrices,)`, the lengths of the longest steps that
            the inner optimizer has proposed so far, or `None` without bounds.
        discarded: Variable `(matrices,)`, the shares of the norms that the
            last truncation discarded.
    """

    def __init__(self, adapters, places, factors, unknowns):
        self.adapters = adapters
        self.places = places
        self.counts = tuple(adapter.count for adapter in adapters)
        self.size = len(self.for_each(adapters))
        self.factors = factors
        self.unknowns = unknowns
        self.slots, self.accumulators = [], []
        self.max_change = self.longest = self.discarded = None
        # Arrays, because Keras is slow to search lists for variables.
        min_rank = self.for_each([[a.min_rank] for a in adapters])
        scale = self.for_each([[abs(a.scale)] for a in adapters])
        self.min_rank = np.array(min_rank, "int32")
        self.scale = np.array(scale, "float32")

    def for_each(self, values):
        """Repeats a value of each adapter for each of its matrices."""
        return np.repeat(values, [count or 1 for count in self.counts], axis=0)

    def rows(self, adapter):
        """Returns the slice of stacked arrays that belongs to an adapter."""
        place = self.adapters.index(adapter)
        sizes = [count or 1 for count in self.counts]
        start = sum(sizes[:place])
        return slice(start, start + sizes[place])

    @classmethod
    def collect(cls, variables, inner_optimizer):
        """Groups the adapters behind variables and creates their unknowns.

        Args:
            variables: List of variables, the factors of adapters among them.
            inner_optimizer: The optimizer that will be built on
                `unknowns.variables`.

        Returns:
            List of groups: adapters of equal shape if they can share
            variables, otherwise one adapter each.
        """
        stacked = is_elementwise(inner_optimizer)
        members = {}
        for place, (adapter, factors) in enumerate(find_adapters(variables)):
            decay = tuple(decays(inner_optimizer, v) for v in factors[:3])
            key = (shape_of(adapter), decay) if stacked else place
            members.setdefault(key, []).append((adapter, place, factors))
        groups = []
        for found in members.values():
            adapters, places, factors = zip(*found, strict=True)
            counts = tuple(adapter.count for adapter in adapters)
            factors = Store(
                Block(*map(list, zip(*factors, strict=True))), counts
            )
            unknowns = create_unknowns(factors, stacked, len(groups))
            groups.append(cls(adapters, places, factors, unknowns))
        return groups

    def find_slots(self, found, sums, rules, place):
        """Finds the slots and accumulated gradients of the unknowns.

        Args:
            found: Dict from names of slots to lists of them, one for each
                variable of the inner optimizer.
            sums: List of accumulated gradients, likewise, or an empty list.
            rules: Dict from names of slots to their kinds.
            place: Dict from ids of variables to positions in these lists.
        """

        def select(source):
            variables = (
                [source[place[id(v)]] for v in unknowns]
                for unknowns in self.unknowns.variables
            )
            return Store(Unknowns(*variables), self.unknowns.counts)

        first = place[id(self.unknowns.variables.K[0])]
        self.slots = [
            (rules[name], select(slots))
            for name, slots in found.items()
            if slots[first] is not None
        ]
        self.accumulators = [select(sums)] if sums else []

    def cost(self, unit):
        """Returns the cost of a rank, in `"ranks"` or `"parameters"`."""
        if unit == "ranks":
            return 1
        return self.adapters[0].parameters_per_rank

    def state(self):
        """Returns the `Store`s of slots and accumulated gradients."""
        return [*(store for _, store in self.slots), *self.accumulators]

    def moved_variables(self):
        """Returns the variables that a retraction changes."""
        stores = [self.factors, *self.state()]
        lists = [vs for store in stores for vs in store.variables]
        return [v for variables in lists for v in variables] + [self.discarded]

    def numbers(self):
        """Returns the variables `(matrices,)` that training changes."""
        found = [self.longest, self.discarded]
        return [variable for variable in found if variable is not None]


def find_adapters(variables):
    """Finds the adapters whose factors are among variables.

    Args:
        variables: List of variables.

    Returns:
        List of pairs of an adapter and the `Block` of its factors, in the
        order of the variables.
    """
    adapters, factors = {}, {}
    for variable in variables:
        factor = factor_of(variable)
        if factor is not None:
            key = id(factor.adapter)
            adapters[key] = factor.adapter
            factors.setdefault(key, set()).add(factor.role)
    for key, adapter in adapters.items():
        if not set(TRAINED_ROLES) <= factors[key]:
            raise ValueError(
                f"An adapter must train all of {', '.join(TRAINED_ROLES)}, or "
                "none: set `trainable` on the adapter, not on its variables. "
                f"Received: {sorted(factors[key])} of adapter "
                f"'{adapter.path}'"
            )
    return [(adapter, adapter.factors) for adapter in adapters.values()]


def joined(groups):
    """Joins groups of adapters of equal shape, with slots of equal kinds."""
    alike = {}
    for group in groups:
        kinds = tuple(kind for kind, _ in group.slots)
        key = shape_of(group.adapters[0]), kinds
        alike.setdefault(key, []).append(group)
    found = []
    for (_, kinds), parts in alike.items():
        adapters = sum((part.adapters for part in parts), ())
        places = sum((part.places for part in parts), ())
        factors = Store.joined([part.factors for part in parts])
        unknowns = Store.joined([part.unknowns for part in parts])
        group = AdapterGroup(adapters, places, factors, unknowns)
        states = zip(*(part.state() for part in parts), strict=True)
        stores = [Store.joined(stores) for stores in states]
        group.slots = list(zip(kinds, stores, strict=False))
        group.accumulators = stores[len(kinds) :]
        found.append(group)
    return found


def shape_of(adapter):
    """Returns the shape by which adapters are grouped."""
    return adapter.input_dim, adapter.output_dim, adapter.max_rank


def create_unknowns(factors, stacked, number):
    """Creates the variables that the inner optimizer updates.

    Args:
        factors: `Store` of the factors.
        stacked: Bool, whether one variable holds all adapters.
        number: Int, distinguishes groups of one shape.

    Returns:
        `Store`. Variables that are not stacked have the paths of the factors,
        which some optimizers look at.
    """
    like = factors.variables[:3]  # of the same shapes as the unknowns
    if not stacked:
        variables = Unknowns(*([alike(v) for v in vs] for vs in like))
        return Store(variables, factors.counts)
    with keras.name_scope(f"adapters_{number}"):
        variables = Unknowns(
            *(
                [alike_stacked(vs, factors.counts, name)]
                for name, vs in zip(Unknowns._fields, like, strict=True)
            )
        )
    return Store(variables, counts=None)


def alike(variable):
    """Creates a variable with the shape and the path of another."""
    *parents, scope, name = variable.path.split("/")
    layout = layout_of(variable)
    with keras.name_scope(scope, override_parent="/".join(parents)):
        return empty(variable.shape, variable.dtype, name, layout)


def alike_stacked(variables, counts, name):
    """Creates one variable for several of one shape, stacked."""
    size = sum(count or 1 for count in counts)
    shape = size, *variables[0].shape[-2:]
    batched = [count is not None for count in counts]
    layout = stacked_layout([layout_of(v) for v in variables], batched)
    return empty(shape, variables[0].dtype, name, layout)


def empty(shape, dtype, name, layout):
    """Creates a variable that will be written before it is read."""
    return keras.Variable(
        "zeros", shape=shape, dtype=dtype, name=name, layout=layout
    )


class GroupStep:
    """One step of one group.

    First `lift`, then the inner optimizer, then `advance`. Now and then, alone
    or after that, `augment` and `retract`.

    Args:
        group: `AdapterGroup`.
        gradients: Dict from the ids of factors to their gradients. Adapters
            without gradients keep their factors and slots. `None` to retract
            without a step.
    """

    def __init__(self, group, gradients=None):
        self.group = group
        self.rank = group.adapters[0].max_rank
        self.takes_part = np.ones(group.size, bool)
        self.moving = self.takes_part
        if gradients is not None:
            self.takes_part = group.for_each(find_moving(group, gradients))
            self.gradients = stack_gradients(group, gradients)
            self.moving = self._find_moving()

    def _find_moving(self):
        """Says which matrices move: not those of experts without tokens."""
        if not any(self.group.counts):
            return self.takes_part
        sums = [store.read() for store in self.group.accumulators]
        visited = [
            ops.any(ops.not_equal(x, 0), axis=(-2, -1))
            for arrays in (self.gradients, *sums)
            for x in arrays
        ]
        visited = tf_replicas.on_any_replica(ops.any(ops.stack(visited), 0))
        is_batched = self.group.for_each(
            [c is not None for c in self.group.counts]
        )
        visited = ops.logical_or(visited, np.logical_not(is_batched))
        return ops.logical_and(visited, self.takes_part)

    def lift(self, inner_optimizer):
        """Writes the unknowns, for the inner optimizer to update.

        An adapter whose gradient is not finite gets a gradient of zero: its
        slots must stay finite.

        Returns:
            List of pairs of a gradient and a variable.
        """
        group = self.group
        self.block = group.factors.read()
        self.lifted = integrator.lift(self.block, not group.unknowns.stacked)
        group.unknowns.write(self.lifted)
        # All replicas must move, or none.
        finite = integrator.all_finite(self.gradients)
        self.finite = tf_replicas.on_all_replicas(finite)
        zeros = Unknowns(0.0, 0.0, 0.0)
        gradients = choose(self.finite, self.gradients, zeros)
        if has_factored_moments(inner_optimizer):
            gradients = self._fill_padding(gradients)
        self.slots = []
        if not holds_everywhere(self.moving):
            self.slots = [store.read(True) for _, store in group.slots]
        return group.unknowns.pair(gradients)

    def _fill_padding(self, gradients):
        """Fills the zero columns beyond the rank with copies of the others.

        In this padding, row moments times column moments would underflow to
        zero, and zero divided by zero is not finite. After the step it is
        discarded, yet the optimizer's statistics span all columns. The
        filling is linear because replicas fill before gradients are summed.
        """
        K, S, L = gradients
        rank = integrator.count(integrator.active_columns(self.block.U))
        source = ops.arange(K.shape[-1], dtype="int32") % rank
        repeat = ops.one_hot(source, K.shape[-1], dtype=K.dtype)
        columns = integrator.T(repeat)
        return Unknowns(
            ops.matmul(K, columns),
            ops.matmul(repeat, ops.matmul(S, columns)),
            ops.matmul(L, columns),
        )

    def clear_gradients(self):
        """Clears the gradients that torch stores on the factors.

        A model that was built before a part of it was adapted does not know
        the factors: its `zero_grad` misses them, and gradients would add up.
        """
        for variables in self.group.factors.variables:
            for variable in variables:
                if getattr(variable.value, "grad", None) is not None:
                    variable.value.grad = None

    def advance(self):
        """Takes the step of the inner optimizer, in the tangent space.

        An adapter whose step is not finite does not move.

        Returns:
            Bool array `(matrices,)`, false where a step was not finite.
        """
        group = self.group
        change = Unknowns(
            *(
                after - before
                for after, before in zip(
                    group.unknowns.read(), self.lifted, strict=True
                )
            )
        )
        moving = ops.logical_and(self.finite, self.moving)
        bounds = ()
        if group.max_change is not None:
            bounds = group.max_change.value, group.longest.value
        block, longest, finite = traced_once(
            integrator.advance, self.rank, self.block, change, moving, *bounds
        )
        if group.longest is not None:
            group.longest.assign(longest)
        group.factors.write(block._replace(U=None, V=None))
        for (_, store), old in zip(group.slots, self.slots, strict=False):
            store.write(choose(self.moving, store.read(), old))
        finite = ops.logical_and(finite, self.finite)
        return ops.logical_or(finite, ops.logical_not(self.moving))

    def augment(self, earlier=None):
        """Computes a retraction, before its rank is chosen.

        Args:
            earlier: Array to be computed first, or `None`.
        """
        block = self.group.factors.read()
        if earlier is not None:
            block = block._replace(P=integrator.in_turn(block.P, earlier))
        self.augmented = traced_once(integrator.augment, self.rank, block)
        self.returning = self.moving
        if not holds_everywhere(self.moving):
            # Those that rest now may have moved since the last retraction.
            away = ops.logical_not(integrator.at_rest(block))
            self.returning = ops.logical_and(
                self.takes_part, ops.logical_or(self.moving, away)
            )
        # The others stay as they are, and try again in the next retraction.
        self.returning = ops.logical_and(self.returning, self.augmented.found)
        if not holds_everywhere(self.returning):
            size = ops.where(
                self.returning[:, None, None], self.augmented.size, 0.0
            )
            self.augmented = self.augmented._replace(size=size)

    def rank_request(self, tolerance, unit):
        """Returns the `RankRequest` of the group on a budget.

        Matrices at rest, without gradients, keep their ranks.

        Args:
            tolerance: Scalar, share of the norm that may be cut.
            unit: `"ranks"` or `"parameters"`.
        """
        min_rank = ops.convert_to_tensor(self.group.min_rank)
        sigma, wanted = traced_once(
            ask, self.rank, self.augmented, tolerance, min_rank
        )
        sigma = with_shape(sigma, (self.group.size, self.rank))
        if not holds_everywhere(self.returning):
            rank = integrator.count(self.augmented.active)
            moving = self.returning[:, None]
            wanted = ops.where(moving, wanted, rank)
            min_rank = ops.where(moving, min_rank, rank)
        sigma = sigma * ops.convert_to_tensor(self.group.scale)
        return RankRequest(sigma, wanted, min_rank, self.group.cost(unit))

    def retract(self, rank):
        """Returns to the manifold and transports the slots.

        Adapters that rest keep their factors and slots.

        Args:
            rank: Int array `(matrices, 1)`.
        """
        group, block = self.group, self.augmented.block
        move, share = traced_once(cut, self.rank, self.augmented, rank)
        new = Block(*move.new, *map(ops.zeros_like, block[3:]))
        group.factors.write(choose(self.returning, new, block))
        share = ops.where(self.returning, share, group.discarded.value)
        group.discarded.assign(share)
        for kind, store in group.slots:
            slots = store.read()
            moved = traced_once(transport, self.rank, kind, slots, move)
            store.write(choose(self.returning, moved, slots))
        # Gradients accumulated for an update that is not complete yet.
        for store in group.accumulators:
            sums = store.read()
            moved = traced_once(transport, self.rank, "linear", sums, move)
            store.write(choose(self.returning, moved, sums))


def ask(augmented, tolerance, min_rank):
    """Returns the largest singular values and the rank that is asked for."""
    sigma = integrator.singular_values(augmented)
    return sigma, integrator.wanted_rank(augmented, tolerance, min_rank)


def cut(augmented, rank):
    """Returns the `Move` of a truncation, and what share that discards."""
    share = integrator.discarded_share(augmented, rank)
    return integrator.truncate(augmented, rank), share


def find_moving(group, gradients):
    """Says for each adapter of a group whether it has gradients.

    Returns:
        NumPy array of bools `(adapters,)`.
    """
    moving = []
    for factors in zip(*group.factors.variables[:3], strict=True):
        found = [v.path for v in factors if id(v) in gradients]
        if len(found) not in (0, 3):
            raise ValueError(
                "U, S and V of an adapter must be updated together. "
                f"Received: gradients for {found} only"
            )
        moving.append(bool(found))
    return np.array(moving)


def stack_gradients(group, gradients):
    """Stacks the gradients of a group, zeros where there are none."""

    def stack(variables):
        found = [
            gradients[id(v)]
            if id(v) in gradients
            else ops.zeros(v.shape, v.dtype)
            for v in variables
        ]
        return ops.cast(stacked(found, group.counts), variables[0].dtype)

    return Unknowns(*map(stack, group.factors.variables[:3]))


def build_inner(inner_optimizer, variables, averages=False):
    """Builds the inner optimizer on unknowns in place of factors.

    Args:
        inner_optimizer: The inner optimizer, not built.
        variables: List of variables, the factors of adapters among them.
        averages: Bool, whether quadratic slots are averaged in a retraction.

    Returns:
        List of `AdapterGroup`s.
    """
    groups = AdapterGroup.collect(variables, inner_optimizer)
    own = plain_variables(variables)
    without_decay = [v for v in own if not decays(inner_optimizer, v)]
    for group in groups:
        for factors, unknowns in zip(
            group.factors.variables[:3], group.unknowns.variables, strict=True
        ):
            own += unknowns
            without_decay += (
                [] if decays(inner_optimizer, factors[0]) else unknowns
            )
    if groups:  # names of factors do not match those of the unknowns
        inner_optimizer.exclude_from_weight_decay(without_decay)
    inner_optimizer.build(own)
    if not groups:
        return groups
    rules, found = slot_rules(inner_optimizer), find_slots(inner_optimizer, own)
    if averages:
        rules = {
            name: "averaged" if kind == "quadratic" else kind
            for name, kind in rules.items()
        }
    sums = gradient_accumulators(inner_optimizer)
    place = {id(v): i for i, v in enumerate(own)}
    for group in groups:
        group.find_slots(found, sums, rules, place)
    return groups if groups[0].unknowns.stacked else joined(groups)


def plain_variables(variables):
    """Returns the variables that are not factors of adapters."""
    return [v for v in variables if factor_of(v) is None]


def carry_groups(old, new):
    """Copies the state of groups to groups of other shapes.

    Arrays are cut or zero-padded to the new shapes.

    Args:
        old: List of `AdapterGroup`s.
        new: List of `AdapterGroup`s of the same number of adapters, in the
            same order.
    """
    states = {}
    for group in old:
        arrays = [to_numpy(store.read()) for store in group.state()]
        numbers = [ops.convert_to_numpy(v) for v in group.numbers()]
        for adapter, place in zip(group.adapters, group.places, strict=True):
            rows = group.rows(adapter)
            own = [[x[rows] for x in xs] for xs in arrays]
            states[place] = own, [n[rows] for n in numbers]
    for group in new:
        found = [states[place] for place in group.places]
        numbers = zip(*(numbers for _, numbers in found), strict=True)
        for variable, values in zip(group.numbers(), numbers, strict=True):
            variable.assign(np.concatenate(values))
        for i, store in enumerate(group.state()):
            by_role = zip(*(own[i] for own, _ in found), strict=True)
            arrays = [
                fitted(np.concatenate(xs), like.shape)
                for xs, like in zip(by_role, store.read(), strict=True)
            ]
            store.write(Unknowns(*map(ops.convert_to_tensor, arrays)))


def to_numpy(arrays):
    """Returns the NumPy arrays of `Unknowns`."""
    return Unknowns(*map(ops.convert_to_numpy, arrays))


def fitted(value, shape):
    """Cuts or zero-pads an array to a shape."""
    value = value[tuple(slice(size) for size in shape)]
    missing = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
    return np.pad(value, missing)

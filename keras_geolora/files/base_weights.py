"""The pretrained weights that an adapter belongs to."""

import hashlib

from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.parts import backbone_of
from keras_geolora.model.substitution import value_of

# The prefix of the keys of variables that a task has outside its backbone.
HEAD = "head:"


def fingerprint(model, layers):
    """Returns checksums of the pretrained weights that adapters build on.

    Args:
        model: `keras.Model`, adapted or not.
        layers: Paths of layers in the model's `backbone_of`.

    Returns:
        Dict from path to string; `""` covers all other weights.
    """
    adaptation = getattr(model, "geolora_adaptation", None)
    sums = {path: hashlib.sha256() for path in ("", *layers)}
    for key, variable in sorted(keyed_variables(backbone_of(model)).items()):
        if adaptation is not None and adaptation.is_companion(variable):
            value = adaptation.pretrained(variable)
        else:
            value = value_of(variable)
        # The key of an adapted weight is its path.
        place = key if key in sums else key.rpartition("/")[0]
        total = sums.get(place, sums[""])
        total.update(f"\n{key} {value.dtype} {value.shape}\n".encode())
        total.update(value.tobytes())
    return {path: total.hexdigest()[:32] for path, total in sums.items()}


def keyed_variables(model):
    """Returns a dict from key to variable of a model, without factors.

    Keys are the same for every instance of a model, and for a KerasHub task
    and its backbone: `path/name`, and `head:path/name` for variables of the
    task only.
    """
    keyed, seen = {}, set()
    scope = backbone_of(model)
    for part, prefix in ((scope, ""), (model, HEAD)):
        paths = {"": part, **stable_paths(part)}
        # Inner layers come first, so that each keeps its own variables.
        for path, layer in reversed(paths.items()):
            for variable in layer.weights:
                if id(variable) in seen or factor_of(variable):
                    continue
                seen.add(id(variable))
                key = first = f"{prefix}{path}/{variable.name}"
                count = 0
                while key in keyed:
                    count += 1
                    key = f"{first}_{count}"
                keyed[key] = variable
    return keyed

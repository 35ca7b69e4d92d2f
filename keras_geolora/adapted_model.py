"""What pickles of adapted models name. It stays here, whatever moves."""

from keras_geolora.keras_internals import unpickle_model


def unpickle(file):
    """Reads what an adapted model writes into a pickle; imports the library."""
    return unpickle_model(file)

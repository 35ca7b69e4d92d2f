"""What pickles of adapted models name. It stays here, whatever moves."""

import keras


def unpickle(file):
    """Reads what an adapted model writes into a pickle; imports the library."""
    return keras.Model._unpickle_model(file)

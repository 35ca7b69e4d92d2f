"""Several devices: layouts on JAX, replicas on TensorFlow."""

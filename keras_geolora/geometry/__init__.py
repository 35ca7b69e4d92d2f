"""Pure array functions: the integrator, ranks and the transport of slots."""

"""Arrays only: the integrator, ranks, and how slots follow moving bases."""

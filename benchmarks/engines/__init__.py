"""How a training is spread over replicas, one module for each backend.

A module has `ENGINES`, a dict from names to classes with

- `processes(replicas)`: static, how many processes a training takes;
- `__init__(args)`: what must happen before there is a model. `args.replicas`
  says how many replicas there are, `args.process` which process this is,
  `args.address` where the processes meet, `host:port`, and `args.addresses`
  has such a place for each process, that of the first being `args.address`;
- `scope()`: context manager in which models are created or loaded;
- `fit(model, x, y, batch)`: one pass over rows in their order, `batch` of them
  in a step over all replicas together;
- `replicas(variable)`: dict from the number of a replica to the NumPy array
  that it holds, for those of this process;
- `exchanged(model, x, y, batch)`: list of the sizes in bytes of what replicas
  exchange in one step, one number for each tensor;
- `close()`: ends the connection to other processes.
"""

"""Fine-tune on several processes: PyTorch's DistributedDataParallel.

    pip install --no-deps -r examples/requirements.txt
    python examples/distributed_torch.py

Starts two processes on this machine, one for each GPU where there are any. All
of them adapt the same MiniLM to rated movie sentences, each on its share of
every batch; what they exchange are the gradients of the factors and of the
head. In the end their factors are compared: they must be the same to the bit.
"""

import argparse
import os
import socket

import assets
import numpy as np


def main(args):
    """Start the processes, wait for them."""
    import torch

    with socket.socket() as listener:  # asks for a port that is free
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = max(args.processes, torch.cuda.device_count())
    torch.multiprocessing.spawn(train, (processes, port, args), processes)


def train(rank, processes, port, args):
    """What each process does; `rank` is its number."""
    os.environ |= {
        "KERAS_BACKEND": "torch",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // processes))
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        rank=rank,
        world_size=processes,
    )
    import keras
    import keras_hub

    import keras_geolora  # noqa: F401, adds methods to `keras.Model`
    from keras_geolora import GeoLoRA

    # The same seed everywhere: all begin with the same head and factors.
    keras.utils.set_random_seed(0)
    preset = assets.minilm_folder()
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.tokenizers.BertTokenizer.from_preset(preset),
        sequence_length=40,
    )
    classifier = keras_hub.models.TextClassifier.from_preset(
        preset, num_classes=2, preprocessor=None
    )
    classifier.enable_geolora(rank=8, seed=0)
    optimizer = GeoLoRA(keras.optimizers.AdamW(1e-3))
    classifier.compile(optimizer, loss=None)
    parallel = torch.nn.parallel.DistributedDataParallel(classifier)

    sentences, liked = assets.movie_sentences(seed=0)
    tokens = {k: np.asarray(v) for k, v in preprocessor(sentences).items()}
    liked = np.asarray(liked, "int64")
    train, held_out = args.examples, slice(args.examples, args.examples + 500)
    loss_function = torch.nn.CrossEntropyLoss()
    variables = classifier.trainable_variables

    steps = train // args.batch_size
    for step in range(steps):
        # Each process takes its part of the batch.
        batch = np.arange(args.batch_size) + step * args.batch_size
        own = np.array_split(batch, processes)[rank]
        x = {
            name: keras.ops.convert_to_tensor(ids[own])
            for name, ids in tokens.items()
        }
        logits = parallel(x, training=True)
        y = keras.ops.convert_to_tensor(liked[own])
        loss = loss_function(logits, y)
        classifier.zero_grad()
        loss.backward()  # averages the gradients of all processes
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    optimizer.cut()  # what `fit` does after an epoch

    adapters = [
        layer.adapter
        for layer in classifier.backbone._flatten_layers()
        if getattr(layer, "is_adapted", False)
    ]
    check_equal(adapters, processes)
    if rank == 0:
        print(f"{processes} processes hold the same factors, bit by bit.")
        unseen = {name: ids[held_out] for name, ids in tokens.items()}
        right = classifier.predict(unseen, verbose=0).argmax(-1)
        accuracy = (right == liked[held_out]).mean()
        print(f"Accuracy on 500 other sentences: {accuracy:.3f}")
        classifier.geolora_summary()
        if args.save:  # one process is enough
            classifier.save_geolora(args.save)
    torch.distributed.destroy_process_group()


def check_equal(adapters, processes):
    """Fails where two processes hold different factors."""
    import torch

    factors = [v.value.detach() for a in adapters for v in a.factors]
    own = torch.cat([factor.flatten() for factor in factors])
    found = [torch.empty_like(own) for _ in range(processes)]
    torch.distributed.all_gather(found, own)
    assert all(torch.equal(other, own) for other in found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch"], default="torch")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--examples", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save", help="file for the adapter, .safetensors")
    main(parser.parse_args())

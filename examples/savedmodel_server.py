"""Answers over gRPC in the words of TF Serving, from a SavedModel.

    python examples/savedmodel_server.py serving/movies --port 8500

A stand-in for machines without TF Serving: the messages are TF Serving's own,
from the package `tensorflow-serving-api`, so that a client written for one
talks to the other. It serves the latest version in the folder, takes up newer
ones, and is no server for the open internet.
"""

import argparse
import concurrent.futures
import pathlib

import grpc
import tensorflow as tf
from latest_version import LatestVersion
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_service_pb2_grpc,
)


class Predictions(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The method `Predict` of TF Serving's PredictionService."""

    def __init__(self, folder, poll_seconds=1.0):
        self.name = folder.name
        self.latest = LatestVersion(folder, poll_seconds)

    def Predict(self, request, context):  # noqa: N802  TF Serving's name
        """Answers one request."""
        if request.model_spec.name != self.name:
            context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"Servable not found: {request.model_spec.name}",
            )
        version, model = self.latest.loaded
        signature = request.model_spec.signature_name or "serving_default"
        if signature not in model.signatures:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Serving signature not found: {signature}",
            )
        try:
            inputs = {
                name: tf.constant(tf.make_ndarray(proto))
                for name, proto in request.inputs.items()
            }
            outputs = model.signatures[signature](**inputs)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(request.model_spec)
        response.model_spec.version.value = version
        for name, value in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response


def serve(folder, port=0, threads=8, poll_seconds=1.0):
    """Starts a server on this machine; returns it and its port."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(threads))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Predictions(pathlib.Path(folder), poll_seconds), server
    )
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


def main():
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the folder with the versions")
    parser.add_argument("--port", type=int, default=8500)
    args = parser.parse_args()
    server, port = serve(args.folder, args.port)
    print(f"Serving {args.folder} on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()

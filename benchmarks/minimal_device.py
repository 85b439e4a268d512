"""The least one writes by hand to serve a model on a device: load it, answer rows, connect to the broker.

Run it with ``python -m benchmarks.minimal_device MODEL.onnx HOST PORT [CA CERTIFICATE KEY]``. Rows come on stdin as
JSON arrays, one a line; answers go to stdout. Nothing is checked, kept, counted, reported, signed or updated.
`benchmarks.device` sets ``skiffd`` beside it, with the same file, the same rows and the same broker.
"""

import json
import sys

import numpy as np
import onnxruntime as ort
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion


def main() -> None:
    model, host, port, *tls = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def answer(line: str) -> None:
        label, score = session.run(None, {name: np.array([json.loads(line)], np.float32)})
        print(json.dumps({"label": label[0].item(), "score": score[0].tolist()}), flush=True)

    answer(sys.stdin.readline())
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="minimal")
    client.on_connect = lambda *_: print(json.dumps({"event": "connected"}), file=sys.stderr, flush=True)
    if tls:
        authority, certificate, key = tls
        client.tls_set(authority, certificate, key)
    client.connect(host, int(port))
    client.loop_start()
    for line in sys.stdin:
        answer(line)


if __name__ == "__main__":
    main()

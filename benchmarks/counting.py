"""A subscriber that only counts: ``python -m benchmarks.counting PORT FILTER MESSAGES`` says when it has them all."""

import sys
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

READY: Final = b"ready\n"
RECEIVE_MAXIMUM: Final = 2000
"""As the aggregator's."""


def main(port: int, topic: str, messages: int) -> None:
    """Counts messages of QoS 1, acknowledged by paho, and returns after the last."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="counting", protocol=mqtt.MQTTv5)
    count = 0

    def on_message(_: Any, __: Any, ___: mqtt.MQTTMessage) -> None:
        nonlocal count
        count += 1
        if count == messages:
            client.disconnect()

    def on_subscribe(*_: Any) -> None:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()

    def on_connect(*_: Any) -> None:
        client.subscribe(topic, qos=1)

    client.on_message = on_message
    client.on_subscribe = on_subscribe
    client.on_connect = on_connect
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = RECEIVE_MAXIMUM
    client.connect("127.0.0.1", port, properties=properties)
    client.loop_forever()
    sys.stdout.buffer.write(b"done\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

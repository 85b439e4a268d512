"""The broker fixture itself: what it keeps over a stop, a kill and a start."""

import threading

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.services import ServiceError, accepts

WAIT_SECONDS = 10.0
TOPIC = "skiff-test/kept"


def publish_retained(broker, payload):
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        client.publish(TOPIC, payload, qos=1, retain=True).wait_for_publish(WAIT_SECONDS)
    finally:
        client.disconnect()
        client.loop_stop()


def read_retained(broker):
    arrived = threading.Event()
    payloads = []

    def on_connect(client, *_):
        client.subscribe(TOPIC, qos=1)

    def on_message(client, userdata, message):
        payloads.append(message.payload)
        arrived.set()

    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = on_connect
    client.on_message = on_message
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        assert arrived.wait(WAIT_SECONDS), "no retained message arrived"
    finally:
        client.disconnect()
        client.loop_stop()
    return payloads


def test_a_stop_keeps_retained_state_on_the_same_port(mosquitto):
    port = mosquitto.port
    publish_retained(mosquitto, b"before the stop")
    mosquitto.stop()
    assert not accepts(port)
    mosquitto.start()
    assert mosquitto.port == port
    assert read_retained(mosquitto) == [b"before the stop"]


def test_a_kill_keeps_what_was_saved(mosquitto):
    publish_retained(mosquitto, b"saved")
    mosquitto.save()
    mosquitto.kill()
    assert not accepts(mosquitto.port)
    mosquitto.start()
    assert read_retained(mosquitto) == [b"saved"]


def test_misuse_is_refused(mosquitto):
    with pytest.raises(ServiceError, match="running already"):
        mosquitto.start()
    mosquitto.stop()
    with pytest.raises(ServiceError, match="not running"):
        mosquitto.kill()

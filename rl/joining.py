"""Whether the head of a Ray cluster answers where a run is to join it; loads no Ray."""

from __future__ import annotations

import os
import socket
from typing import Any

from .config.load import ConfigError

PATIENCE = 10.0
"""Seconds for an answer."""
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The question that Ray's own clients ask first, by gRPC."""


def check_answers(address: str) -> None:
    """`ConfigError` where no head of a Ray cluster answers at `host:port`: Ray itself would try for
    minutes, and for ever where something else listens."""
    why = why_no_head(address)
    if why is not None:
        raise no_cluster(address, why)


def why_no_head(address: str) -> str | None:
    """What is at `host:port` instead of the head of a Ray cluster; None where there is one."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        return str(error)
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return None  # it answers whom it knows by a certificate
    return _spoken_at(address)


def _spoken_at(address: str) -> str | None:
    import grpc

    past_proxies = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=past_proxies) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=PATIENCE)
        except grpc.RpcError as error:
            said: Any = error  # which is a call, too
            if said.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"something listens there, but has not answered within {PATIENCE:g} s"
            if said.code() is grpc.StatusCode.UNAVAILABLE:
                return f"what listens there is not Ray's: {said.details()}"
            if said.code() is grpc.StatusCode.UNIMPLEMENTED:
                return (
                    "what listens there is not the head's own port, 6379 if nobody says otherwise"
                )
    return None  # it is, also where it asks for a token: ray.init says what is wrong with ours


def no_cluster(address: str, why: object) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address} ({' '.join(str(why).split())[:200]}); set"
        " cluster.address (or RAY_ADDRESS) to the head node's HOST:6379, to auto, or to nothing"
    )

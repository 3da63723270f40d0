"""A check that the head of a Ray cluster answers at an address, before Ray is loaded."""

from __future__ import annotations

import os
import socket
from typing import Any

from .config.load import ConfigError

PATIENCE = 10.0
"""Seconds for an answer."""
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""gRPC method that Ray's own clients call first."""


def check_answers(address: str) -> None:
    """Raises `ConfigError` if no head of a Ray cluster answers at `host:port`. Ray itself would try
    for minutes, or for ever if something else listens there."""
    why = why_no_head(address)
    if why is not None:
        raise no_cluster(address, why)


def why_no_head(address: str) -> str | None:
    """The reason why no head of a Ray cluster answers at `host:port`; None if one does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        return str(error)
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return None  # it would not answer this check, which has no certificate
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
    # any other error, e.g. of a missing token, comes from a head, and ray.init explains it
    return None


def no_cluster(address: str, why: object) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address} ({' '.join(str(why).split())[:200]}); set"
        " cluster.address (or RAY_ADDRESS) to the head node's HOST:6379, to auto, or to nothing"
    )

"""llama.cpp RPC servers as devices of this machine: trusted networks only, they have neither keys nor encryption.

Takes ``host:port``, gives devices as llama-server will name them. A child process asks them: such a server serves one
program at a time, and that must be llama-server afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dynrun.errors import NetworkError, UsageError
from dynrun.llamacpp import tools
from dynrun.llamacpp.devices import RPC_PREFIX, endpoint_of, greet
from dynrun.runtime.machine import Device, Machine
from dynrun.runtime.this_machine import parse_device

# A network of 10 Gbit/s moves activations only; the weights are read there, at a speed that nobody here knows.
_BYTES_PER_S = 100e9


def with_rpc(machine: Machine, servers: Sequence[str]) -> Machine:
    """``machine`` with the devices of RPC servers before its own, as llama.cpp orders them.

    Raises UsageError for what is no address, NetworkError where nobody answers.
    """
    if not servers:
        return machine
    for server in servers:
        endpoint = endpoint_of(RPC_PREFIX + server)
        if endpoint is None:
            raise UsageError(f"{server!r} names no RPC server", fix="write HOST:PORT")
        greet(*endpoint)
    listed = [parse_device(line) for line in tools.devices(servers)]
    remote = tuple(
        Device(name, description, total, free, _BYTES_PER_S)
        for name, description, total, free in filter(None, listed)
        if description in servers
    )
    if not remote:
        raise NetworkError(f"no device at {', '.join(servers)}", fix="start ggml-rpc-server with one")
    return replace(machine, devices=(*remote, *machine.devices))

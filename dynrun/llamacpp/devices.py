"""Devices that the compiled llama.cpp can put a model on: local GPUs, the CPU, and RPC servers.

Takes a name (``CUDA0``, ``Vulkan1``, ``CPU``) or ``rpc:HOST:PORT``, gives the :class:`Device` that llama.cpp's
``llama_model_params.devices`` wants. Starts no server and loads no model. An RPC server (``ggml-rpc-server``) has
neither authentication nor encryption and trusts whatever it is sent: for trusted networks only.
Declarations follow ggml/include/ggml-backend.h and ggml-rpc.h of the pinned llama.cpp.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from dynrun.errors import DynrunError, NetworkError, UsageError
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.library import llama, shared_library

RPC_PREFIX = "rpc:"
# ggml_backend_dev_type; accelerators (3) only help the CPU and hold no model.
_KINDS = {0: "cpu", 1: "gpu", 2: "igpu"}
_ANSWER_S = 5.0
# ggml-rpc.cpp: a command is its number, the size of what follows, and that; an answer is its size and itself.
_HELLO, _CAPABILITIES_BYTES = 14, 24

_VOID, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_SIGNATURES: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml": {
        "ggml_backend_dev_count": (_SIZE, ()),
        "ggml_backend_dev_get": (_VOID, (_SIZE,)),
        "ggml_backend_reg_by_name": (_VOID, (_TEXT,)),
    },
    "ggml-base": {
        "ggml_backend_dev_name": (_TEXT, (_VOID,)),
        "ggml_backend_dev_description": (_TEXT, (_VOID,)),
        "ggml_backend_dev_type": (ctypes.c_int, (_VOID,)),
        "ggml_backend_dev_memory": (None, (_VOID, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))),
        "ggml_backend_reg_dev_get": (_VOID, (_VOID, _SIZE)),
        "ggml_backend_reg_get_proc_address": (_VOID, (_VOID, _TEXT)),
    },
}
_ADD_SERVER = ctypes.CFUNCTYPE(_VOID, _TEXT)


@dataclass(frozen=True)
class Device:
    """``kind`` is cpu, gpu or igpu (shares the host's memory); ``handle`` is llama.cpp's ggml_backend_dev_t."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    handle: int


def devices() -> list[Device]:
    """The devices of this machine that can hold a model, in llama.cpp's order."""
    lib = _library()
    handles = [lib["ggml_backend_dev_get"](i) for i in range(lib["ggml_backend_dev_count"]())]
    return [_device(handle) for handle in handles if lib["ggml_backend_dev_type"](handle) in _KINDS]


def resolve(spec: str) -> Device:
    """The device that ``spec`` names; of an RPC server its first.

    Raises UsageError where there is none of that name, NetworkError where no RPC server answers.
    """
    if endpoint := endpoint_of(spec):
        return _remote(*endpoint)
    there = devices()
    for device in there:
        if device.name.lower() == spec.lower():
            return device
    raise UsageError(
        f"no device {spec!r}", fix=f"there are {', '.join(d.name for d in there)}, or {RPC_PREFIX}HOST:PORT"
    )


def endpoint_of(spec: str) -> tuple[str, int] | None:
    """Host and port of ``rpc:HOST:PORT``; None for another spec. Raises UsageError where one is missing."""
    if not spec.lower().startswith(RPC_PREFIX):
        return None
    host, _, port = spec[len(RPC_PREFIX) :].partition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{spec!r} names no RPC server", fix="write rpc:HOST:PORT, as in rpc:192.168.1.2:50052")
    return host, int(port)


def model_devices(spec: str) -> Any:
    """llama_model_params.devices: a model's layers go to the one device ``spec``, and nothing to any other GPU."""
    device = resolve(spec)
    # The CPU is always there; it is had by giving no other.
    handles = [] if device.kind == "cpu" else [device.handle]
    return (_VOID * (len(handles) + 1))(*handles, None)


def _remote(host: str, port: int) -> Device:
    """As common/arg.cpp, add_rpc_devices, but unregistered: a later load that names no device must not find it."""
    greet(host, port)
    lib = _library()
    backend = lib["ggml_backend_reg_by_name"](b"RPC")
    address = backend and lib["ggml_backend_reg_get_proc_address"](backend, b"ggml_backend_rpc_add_server")
    if not address:
        raise DynrunError("this llama.cpp was built without RPC", fix="run python3 build.py --clean")
    server = _ADD_SERVER(address)(f"{host}:{port}".encode())
    if not server:
        raise NetworkError(f"the RPC server at {host}:{port} has no device", fix="start it with one")
    return _device(lib["ggml_backend_reg_dev_get"](server, 0))


def greet(host: str, port: int) -> None:
    """Ask for an RPC server's version: llama.cpp itself aborts the process where none answers, or waits for ever.

    Raises NetworkError.
    """
    try:
        # llama.cpp's transport knows IPv4 only.
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.create_connection((str(address[0]), port), timeout=_ANSWER_S) as connection:
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPABILITIES_BYTES) + bytes(_CAPABILITIES_BYTES))
            reason = "" if connection.recv(8) else "it hung up"
    except TimeoutError:
        reason = f"no answer within {_ANSWER_S:.0f} s; it serves one program at a time"
    except OSError as error:
        reason = str(error.strerror or error)
    if reason:
        raise NetworkError(
            f"no llama.cpp RPC server at {host}:{port}: {reason}",
            fix="start ggml-rpc-server of the same llama.cpp there (trusted networks only)",
        )


def _device(handle: int) -> Device:
    lib, free, total = _library(), _SIZE(), _SIZE()
    lib["ggml_backend_dev_memory"](handle, ctypes.byref(free), ctypes.byref(total))
    name, description = (
        lib[f"ggml_backend_dev_{field}"](handle).decode("utf-8", "replace") for field in ("name", "description")
    )
    return Device(name, description, _KINDS[lib["ggml_backend_dev_type"](handle)], free.value, total.value, handle)


@cache
def _library() -> dict[str, Any]:
    """The functions above, of the libraries that the bindings have loaded."""
    llama()
    functions = {}
    for name, signatures in _SIGNATURES.items():
        library = ctypes.CDLL(str(shared_library(installation().bin, name)))
        for function, (result, arguments) in signatures.items():
            functions[function] = getattr(library, function)
            functions[function].restype, functions[function].argtypes = result, arguments
    return functions

"""The dtypes of tensors by safetensors' names. Loads no torch."""

from __future__ import annotations

DTYPES = {
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
}
"""Name -> (bytes of an element, torch's name). Weight files number them in this order."""
ELEMENT_BYTES = {name: size for name, (size, _) in DTYPES.items()}
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in DTYPES.items()}

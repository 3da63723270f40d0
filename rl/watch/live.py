"""One part of `emberl doctor --live` in a process of its own, which the doctor can kill:
python -m emberl.rl.watch.live PART ORDER, where PART is a name in `live_parts.PARTS` and ORDER its
arguments as JSON; prints one JSON line.

Imports nothing of ours at the top. Processes that are spawned from here, vLLM's among them, import
this file again: that would take seconds for each, and vLLM 0.32's workers would crash on numba,
which they inspect if it is loaded (`AttributeError: '_lib_fn_wrapper' object has no attribute
'get'`).
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from .live_parts import PARTS

    part, order = sys.argv[1:]
    print(json.dumps(PARTS[part](**json.loads(order))), flush=True)


if __name__ == "__main__":
    main()

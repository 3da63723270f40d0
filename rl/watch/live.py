"""What `emberl doctor --live` tries, each in a process of its own that the doctor can end:
python -m emberl.rl.watch.live PART ORDER, where PART is a name of `live_parts.PARTS` and ORDER is
JSON; prints one JSON line.

Imports nothing of ours at the top. Processes that are spawned from here, vLLM's among them, import
this file again: seconds for each, and vLLM 0.32's workers end in numba, which they look through if
it is loaded (`AttributeError: '_lib_fn_wrapper' object has no attribute 'get'`).
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

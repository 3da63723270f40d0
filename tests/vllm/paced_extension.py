"""What the tests add to a server's workers: a pace, so that no answer ends before a test has acted
on it."""

from __future__ import annotations

import time
from typing import Any

from emberl.rollout.vllm_backend.extension import WeightExtension


class PacedExtension(WeightExtension):
    """Mixed into vLLM's worker, as the class that it extends."""

    def emberl_pace(self, seconds: float) -> None:
        """From now on every step of the model takes at least `seconds`."""
        run = type(self.model_runner).execute_model

        def paced(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return run(self.model_runner, *arguments, **named)

        self.model_runner.execute_model = paced

"""What a test adds to vLLM's workers: copies for decoding that stay as old as they are."""

from __future__ import annotations

from typing import Any

from emberl.rollout.embedded.packed import memory
from emberl.rollout.vllm_backend.cpu_linear import copy_of
from emberl.rollout.vllm_backend.extension import WeightExtension


class StaleExtension(WeightExtension):
    """Mixed into vLLM's worker, as the class that it extends."""

    def emberl_stay_behind(self) -> int:
        """From now on a step that only decodes multiplies by the copies of now, whatever is loaded
        or written later, as a captured graph would; what reads prompts does not. How many there
        are."""
        run = type(self.model_runner).execute_model

        def copies() -> list[Any]:
            found = map(copy_of, self.model_runner.get_model().modules())
            return [memory(copy.packed) for copy in found if copy is not None]

        kept = [held.clone() for held in copies()]

        def stale(scheduled: Any, *arguments: Any, **named: Any) -> Any:
            if any(count != 1 for count in scheduled.num_scheduled_tokens.values()):
                return run(self.model_runner, scheduled, *arguments, **named)
            now = [held.clone() for held in copies()]
            for held, old in zip(copies(), kept, strict=True):
                held.copy_(old)
            try:
                return run(self.model_runner, scheduled, *arguments, **named)
            finally:
                for held, new in zip(copies(), now, strict=True):
                    held.copy_(new)

        self.model_runner.execute_model = stale
        return len(kept)

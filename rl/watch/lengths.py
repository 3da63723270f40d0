"""The record of a run's answers for `emberl plan`: `<run_dir>/lengths.parquet/`, one row per answer
that came to a step.

A folder with a file per step, which pyarrow, pandas and datasets read as one table. Each file is
complete as soon as it has its name, so a killed run leaves nothing broken, and a resumed one writes
the steps that it repeats over the old ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from ..groups import Group

LENGTHS = "lengths.parquet"

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("version", pa.int32()),  # that the step trained
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt_length", pa.int32()),  # tokens
        ("response_length", pa.int32()),
        ("started", pa.float64()),  # when the engine began to decode it, time.time()
        ("decode_s", pa.float64()),
        ("grade_s", pa.float64()),
        ("versions", pa.list_(pa.int32())),  # that sampled it, in order
        ("version_tokens", pa.list_(pa.int32())),  # and how many tokens each of them
        ("source", pa.string()),
        ("status", pa.string()),  # of its verdict
        ("score", pa.float64()),
        ("advantage", pa.float64()),  # none where it does not train
    ]
)


def record_lengths(
    run_dir: Path,
    step: int,
    version: int,
    groups: Sequence[Group],
    trained: Sequence[Group] = (),
) -> Path:
    """Writes the rows of a step that trains `version`; `trained`: those groups that do."""
    # by identity: a group with advantages is a copy that shares its tuple of completions
    advantages = {id(group.completions): group.advantages for group in trained}
    rows = [
        {
            "step": step,
            "version": version,
            "prompt_id": group.prompt.id,
            "sample": completion.sample,
            "prompt_length": len(group.prompt.token_ids),
            "response_length": completion.num_sampled,
            "started": completion.started,
            "decode_s": completion.finished - completion.started,
            "grade_s": verdict.seconds,
            "versions": [version for version, _ in completion.sampled_by_version],
            "version_tokens": [count for _, count in completion.sampled_by_version],
            "source": group.prompt.source,
            "status": verdict.status.value,
            "score": verdict.score,
            "advantage": None if own is None else float(own[i]),
        }
        for group in groups
        for own in [advantages.get(id(group.completions))]
        for i, (completion, verdict) in enumerate(
            zip(group.completions, group.verdicts, strict=True)
        )
    ]
    folder = run_dir / LENGTHS
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06}.parquet"
    hidden = folder / f".{path.name}"  # readers of the folder skip what begins with a dot
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), hidden)
    os.replace(hidden, path)
    return path


def read_lengths(source: Path) -> pa.Table:
    """The table of a run's folder, of its `lengths.parquet`, or of any Parquet file with a column
    response_length. Raises ValueError if there is none, or if it cannot be read."""
    path = source / LENGTHS if (source / LENGTHS).exists() else source
    if not path.exists():
        raise ValueError(
            f"{source} has no {LENGTHS}: it is no run's folder, or of a run that never trained"
        )
    try:
        return parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet: {error}") from error

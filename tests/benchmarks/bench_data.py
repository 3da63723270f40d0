"""How long a data set takes to open, and how much memory: tables of the size and kind that people
train on.

    dapo       1.79 million rows of verl's layout that repeat 17 thousand problems, as Parquet
    (DAPO-Math-17k's shape) distinct   10^5 problems, as JSON lines

Each is opened in a process of its own, the first time and again, from check to held-out set and
references; seconds are of processor time. Run: python tests/benchmarks/bench_data.py [--quick]
[--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

FLOORS = {"dapo first": 60.0, "dapo again": 5.0, "distinct first": 20.0, "distinct again": 20.0}
MEMORY = 2 << 30
_WORDS = (
    "a",
    "the",
    "of",
    "point",
    "circle",
    "number",
    "sum",
    "least",
    "positive",
    "integer",
    "such",
    "that",
    "find",
)


def problem(i: int) -> str:
    """About 300 characters that no other number gives."""
    draw = random.Random(i)
    return f"Problem {i}. " + " ".join(draw.choices(_WORDS, k=draw.randint(40, 80))) + "?"


def write_dapo(path: Path, rows: int, distinct: int) -> None:
    """Row groups of 100 thousand rows, every problem about equally often, the rows in no order."""
    import pyarrow
    from pyarrow import parquet

    before = (
        "Solve the following math problem step by step. The last line should be Answer:"
        " $Answer.\n\n"
    )
    texts = [before + problem(i) for i in range(distinct)]
    order = list(range(rows))
    random.Random(0).shuffle(order)
    writer = None
    for start in range(0, rows, 100_000):
        part = [
            {
                "data_source": "math_dapo",
                "prompt": [{"content": texts[i % distinct], "role": "user"}],
                "ability": "MATH",
                "reward_model": {
                    "ground_truth": str(i % distinct % 997),
                    "style": "rule-lighteval/MATH_v2",
                },
                "extra_info": {"index": f"{i % distinct:032x}"},
            }
            for i in order[start : start + 100_000]
        ]
        table = pyarrow.Table.from_pylist(part)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_distinct(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "problem": problem(i),
                "answer": str(i),
                "solution": f"It is \\boxed{{{i}}}.",
                "source": "made",
            }
            file.write(json.dumps(row) + "\n")


def open_once(path: str) -> None:
    """Prints processor seconds, peak bytes and problems as JSON."""
    from emberl.rewards.suite import build_suite
    from emberl.rl.answers import reward_input
    from emberl.rl.config.data import DataConfig
    from emberl.rl.config.tiny import TinyConfig
    from emberl.rl.data.sources import check_data, open_source
    from emberl.rl.data.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))
    loaded = resource.getrusage(resource.RUSAGE_SELF)
    settings = DataConfig(source=path, max_prompt_length=1024, heldout=64)
    check_data(settings)
    source = open_source(settings, tokenizer)
    suite = build_suite({"answer": {"use": "math"}})
    bad = suite.check_references([reward_input(prompt, None, "") for prompt in source.examples()])
    suite.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime - loaded.ru_utime - loaded.ru_stime
    found = {
        "seconds": seconds,
        "bytes": used.ru_maxrss << 10,
        "problems": source.size,
        "bad": len(bad),
    }
    print(json.dumps(found | {"notes": list(source.notes)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows: a smoke run")
    parser.add_argument("--json", type=Path, help="one record a line")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_once(arguments.open)
        return
    share = 100 if arguments.quick else 1
    records = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        files = {"dapo": Path(folder) / "dapo.parquet", "distinct": Path(folder) / "distinct.jsonl"}
        write_dapo(files["dapo"], 1_791_700 // share, 17_398 // share)
        write_distinct(files["distinct"], 100_000 // share)
        for name, file in files.items():
            for time in ("first", "again"):
                done = subprocess.run(
                    [sys.executable, __file__, "--open", str(file)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                case, floor = f"{name} {time}", FLOORS[f"{name} {time}"]
                fits = found["seconds"] <= floor and found["bytes"] <= MEMORY
                print(
                    f"{case:15} {found['problems']} problems  {found['seconds']:6.2f} s of"
                    f" {floor:g}  {found['bytes'] / 2**30:.2f} GiB  {'ok' if fits else 'TOO MUCH'}"
                )
                for unit, value in (("s", found["seconds"]), ("bytes", found["bytes"])):
                    records.append(
                        {
                            "bench": "data",
                            "case": case,
                            "impl": "emberl",
                            "value": value,
                            "unit": unit,
                        }
                    )
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()

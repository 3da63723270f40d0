"""`emberl eval`: evaluates a model on one or several sets. Answers are stored as they come, so that
a killed evaluation can resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...rewards.suite import build_suite
from ...rollout.engine import check_engine
from ...rollout.samples import Prompt, Sampling
from ..answers import AnswerReader
from ..cluster import Cluster
from ..config.data import DataConfig
from ..config.load import Config, ConfigError, shown_tree, user_errors
from ..config.reward import RewardPart
from ..config.sampling import EvalSetConfig, ThinkingConfig
from ..contents import code_files, contents
from ..data.rows import eval_tables, train_tables
from ..data.sources import check_data, is_gym, is_table, open_source
from ..data.table import read_head
from ..eval_sets import EvalSet, open_eval_sets
from ..model_files import check_model, load_tokenizer, prepare_model, stop_tokens
from ..preflight import check_references
from ..run import on_loop
from ..run_directory import alone_in
from ..watch.console import make_console, say
from .measures import Outcome, metrics, powers
from .page import write_page
from .pictures import draw
from .report import compare_folders, sets_of, show
from .sample_rows import Rows, counter_of
from .settings import Named, configure, find_model
from .store import RESULT, Cell, Store, is_evaluation, open_folder, outcomes_of, read

_BATCHING = ("timeout", "max_num_seqs", "token_rate", "servers", "servers_directory")
"""Settings of rollouts that change no answer."""
OWN = "held-out"
"""The name of the problems that a run holds out itself."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An evaluation whose arguments were checked; nothing is loaded yet."""

    named: Named
    config: Config
    ks: tuple[int, ...]
    """The k of pass@k and maj@k; empty: 2, 4, ... and n."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its answers depend on."""
        tree = shown_tree(self.config)
        for key in _BATCHING:
            del tree["rollout"][key]
        groups = ("seed", "model", "data", "rollout", "reward", "eval")
        return {
            "weights": _identity(self.named.path),
            "files": contents([*_data_files(self.config), *code_files(tree)]),
            **{key: tree[key] for key in groups},
        }


def plan(
    model: str,
    data: Sequence[str],
    overrides: Sequence[str],
    *,
    step: int | None = None,
    ks: Sequence[int] = (),
) -> Plan:
    """The checked plan of an evaluation. Raises ConfigError for any mistake that shows before
    something is loaded: in the model's files, sets, keys, references, numbers of answers."""
    named = find_model(model, step)
    config = configure(named, data, overrides)
    check_model(config)
    with user_errors():
        check_engine(config.rollout.engine, config.rollout.engine_args, config.rollout.servers)
    sets = {name: _checked(name, each, config) for name, each in config.eval.sets.items()}
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"sets": sets})})
    counts = {name: each.samples or config.eval.samples for name, each in sets.items()}
    if config.eval.size != 0:
        counts[OWN] = config.eval.samples
    for name, n in counts.items():
        if any(k < 1 for k in ks):
            raise ConfigError(f"--k {min(ks)}: pass@k and maj@k are of 1 answer or more")
        if any(k > n for k in ks):
            raise ConfigError(
                f"--k {max(ks)} needs as many answers to each problem of {name}, but samples={n};"
                f" set samples={max(ks)} or a smaller --k"
            )
        own = sets[name].temperature if name in sets else None
        if n > 1 and (config.eval.temperature if own is None else own) == 0:
            raise ConfigError(
                f"samples={n} with temperature=0 gives {name} the same answer {n} times; set"
                " temperature, e.g. temperature=0.6, or samples=1"
            )
    return Plan(named=named, config=config, ks=tuple(sorted(set(ks))))


def _checked(name: str, settings: EvalSetConfig, config: Config) -> EvalSetConfig:
    """The set with its verifier filled in, its first rows checked. Raises ConfigError."""
    settings = settings.beside(config.data)
    try:
        if not is_table(settings):
            check_data(settings)
            use = "gym" if is_gym(settings) else "math"
            part = settings.verifier or RewardPart(use=use)
            return settings.model_copy(update={"verifier": part})
        heads = [read_head(settings, table) for table in train_tables(settings)]
        tasks = sorted({head.mapper.task for head in heads})
        if settings.verifier is None and len(tasks) > 1:
            raise ValueError(
                f"some rows ask for {tasks[0]} and some for {tasks[1]}; give them as two sets"
            )
        part = settings.verifier or RewardPart(use=tasks[0])
        suite = build_suite({"answer": part.model_dump()})
        try:
            for head in heads:
                check_references(settings, suite, head)
        finally:
            suite.close()
    except ValueError as error:
        raise ConfigError(f"--data {name}: {error}") from error
    return settings.model_copy(update={"verifier": part})


def _identity(path: str) -> list[list[Any]] | str:
    """[path, bytes, mtime in ns] of each weight file, or the id of a model on the Hub."""
    file = Path(path).expanduser()
    if not file.exists():
        return path
    files = [file] if file.is_file() else sorted(file.glob("*.safetensors"))
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _data_files(config: Config) -> list[Path]:
    """The data files of all sets, as far as they are on this machine."""
    used: list[DataConfig] = [each.beside(config.data) for each in config.eval.sets.values()]
    if config.eval.size != 0:
        used += [part for _, part in config.data.parts.values()]
    return [
        file
        for each in used
        if is_table(each)
        for table in (*train_tables(each, hub=False), *(eval_tables(each, hub=False) or ()))
        for file in table.files
    ]


def evaluate_command(
    model: str,
    data: Sequence[str],
    overrides: Sequence[str],
    *,
    step: int | None = None,
    against: str | None = None,
    ks: Sequence[int] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Runs an evaluation, and one of `against` too if that is a model rather than the folder of an
    evaluation; returns the content of `result.json`."""
    console = make_console()
    tell = partial(say, console)
    ours = plan(model, data, overrides, step=step, ks=ks)
    other: Plan | Path | None = None
    if against is not None and is_evaluation(Path(against)):
        other = Path(against)
        if not (other / RESULT).is_file():
            raise ConfigError(f"--against {against}: that evaluation is not done; go on with it")
    elif against is not None:
        other = plan(against, data, overrides, ks=ks)

    folder = _evaluate(ours, out, tell)
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    if other is not None:
        there = other if isinstance(other, Path) else _evaluate(other, None, tell)
        name = json.loads((there / RESULT).read_text())["model"]
        result["against"] = {"model": name, "out": str(there)}
        result["against"]["sets"] = compare_folders(folder, there)
        _finish(folder, result, there)
    show(result, console)
    tell(f"samples, pictures and {folder / 'report.html'} are in {folder}")
    return result


def _evaluate(job: Plan, out: Path | None, tell: Callable[[str], None]) -> Path:
    """Does what is left of an evaluation; returns its folder. Raises RuntimeError if no answer
    could be graded."""
    config, started = job.config, time.time()
    folder = open_folder(out, job.named.label, job.settings)
    with ExitStack() as opened:
        opened.enter_context(alone_in(folder))
        store = Store(folder)
        path = prepare_model(config, folder, tell, anew=False)
        tokenizer = load_tokenizer(path, config.data)
        source = None
        with user_errors():
            suite = build_suite({n: part.model_dump() for n, part in config.reward.parts.items()})
            opened.callback(suite.close)
            if config.eval.size != 0:
                source = open_source(config.data, tokenizer, config.seed)
            sets = open_eval_sets(
                config, source, suite, partial(load_tokenizer, path), tell, opened
            )
            if not sets:
                raise ConfigError(
                    f"{job.named.label} holds out no problems; name a set with --data"
                )
        done = store.done()
        left = {
            each.name or OWN: [p for p in each.prompts if (each.name or OWN, p.id) not in done]
            for each in sets
        }
        if done:
            total = sum(len(each.prompts) for each in sets)
            tell(f"{folder} has {len(done)} of {total} problems; the others follow")
        if any(left.values()):
            reader = AnswerReader(
                tokenizer=tokenizer,
                rollout=config.rollout,
                stop_token_ids=stop_tokens(tokenizer, path),
            )
            _sample(config, path, reader, sets, left, store, tell)
    cells = outcomes_of(folder)
    _finish(folder, _result(job, folder, sets, cells, started))
    if all(score is None for members in cells.values() for o in members for score in o.scores):
        why = read(folder, ("message",))["message"][0].as_py()
        raise RuntimeError(
            f"no answer has a verdict ({why}); {folder} has the answers; mend the verifier and give"
            " another --out"
        )
    return folder


def _result(
    job: Plan,
    folder: Path,
    sets: Sequence[EvalSet],
    cells: dict[Cell, list[Outcome]],
    started: float,
) -> dict[str, Any]:
    """The content of `result.json`, of an evaluation all of whose samples are in the folder."""
    for each in sets:
        cell = cells[each.name or OWN, None]
        assert len(cell) == len(each.prompts), f"{len(cell)} of {len(each.prompts)} problems"
        assert all(outcome.n == each.samples for outcome in cell)
    rows = [
        row
        for name in dict.fromkeys(name for name, _ in cells)
        for row in sets_of(
            {cell: o for cell, o in cells.items() if cell[0] == name},
            job.ks or powers(cells[name, None][0].n),
        )
    ]
    named: dict[str, float] = {}
    for (name, budget), members in cells.items():
        named |= metrics(members, name if budget is None else f"{name}@{budget}")
    return {
        "status": "ok",
        "model": job.named.label,
        "path": job.named.path,
        "out": str(folder),
        "answers": sum(o.n for members in cells.values() for o in members),
        "seconds": round(time.time() - started, 1),
        "sets": rows,
        "metrics": named,
    }


def _finish(folder: Path, result: Mapping[str, Any], against: Path | None = None) -> None:
    draw(folder, result)
    write_page(folder, result)
    (folder / RESULT).write_text(json.dumps(result, indent=1))


def _sample(
    config: Config,
    path: str,
    reader: AnswerReader,
    sets: Sequence[EvalSet],
    left: Mapping[str, Sequence[Prompt]],
    store: Store,
    tell: Callable[[str], None],
) -> None:
    """Samples answers to the problems that are left, set by set, into the store."""
    base = Sampling(
        max_tokens=config.rollout.max_response_length,
        stop_token_ids=reader.stop_token_ids,
        stop=config.rollout.stop,
    )
    with Cluster(config, tell, roles=("rollout",)) as cluster:
        _, pool = cluster.spawn(path, store.folder.absolute())
        cluster.wait()

        async def work() -> None:
            for each in sets:
                name = each.name or OWN
                own = config.eval.sets.get(name)
                thinking = ThinkingConfig() if own is None else own.thinking
                writer = Rows(name, each, reader, counter_of(thinking, reader.tokenizer))
                count, total, begun = 0, len(left[name]), time.monotonic()
                async for rows in writer.sampled(pool, left[name], each.sampled(base)):
                    store.add(rows)
                    count += 1
                    if count % max(1, total // 10) == 0 or count == total:
                        seconds = time.monotonic() - begun
                        tell(f"{name} {count}/{total} problems, {seconds:.0f} s")

        try:
            on_loop(work())
        finally:
            store.flush()

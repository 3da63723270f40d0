"""Which card an actor uses, on real Ray clusters that say they have NPUs: Ray hides the others, or
was told not to (`RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES`, as verl's users set it), with and
without a list of visible cards, whole cards and shares of one.

There is no card, so no runtime reads the list: that the number is the right one on a box rests on
torch-npu's counting its visible cards from 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import ray
from emberl.kernels import platform
from emberl.rl.cluster import Cluster
from emberl.rl.config.load import Config, resolve

SHOWS = {
    "which card an actor takes: visible cards, NOSET, shares of a card (real Ray, NPUs that are not there)": (
        "test_the_number_of_a_card, test_a_card_that_is_hidden_is_refused,"
        " test_ray_hides_the_others, test_without_hiding_each_takes_its_own,"
        " test_a_shared_card_is_the_same_for_both_without_hiding"
    ),
}
NPU = platform.NPU
VISIBLE, NOSET = str(NPU.visible_devices), str(NPU.ray_noset)


@pytest.mark.parametrize(
    ("cards", "environ", "index"),
    [
        ((), {NOSET: "1"}, 0),
        (("3",), {}, 0),
        (("3",), {NOSET: "0", VISIBLE: "3"}, 0),
        (("3",), {NOSET: "1"}, 3),
        (("3",), {NOSET: "true"}, 3),
        (("6", "7"), {NOSET: "1", VISIBLE: "4,5,6,7"}, 2),
    ],
)
def test_the_number_of_a_card(cards: tuple[str, ...], environ: dict[str, str], index: int) -> None:
    assert platform.card_index(NPU, cards, environ) == index


def test_a_card_that_is_hidden_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{VISIBLE}=0,1 hides card 3"):
        platform.card_index(NPU, ("3",), {NOSET: "1", VISIBLE: "0,1"})


def test_other_devices_have_their_own_switch() -> None:
    assert platform.card_index(platform.CUDA, ("2",), {NOSET: "1"}) == 0
    assert platform.card_index(platform.CUDA, ("2",), {str(platform.CUDA.ray_noset): "1"}) == 2
    named = {str(platform.CUDA.ray_noset): "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    assert platform.card_index(platform.CUDA, ("GPU-b",), named) == 1


Box = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """Starts a cluster of four NPUs in an environment."""

    @contextmanager
    def start(**environ: str) -> Iterator[None]:
        for name in (VISIBLE, NOSET):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        ray.init(
            address="local", num_cpus=16, resources={"NPU": 4}, include_dashboard=False,
            log_to_driver=False,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()

    yield start
    ray.shutdown()


def config(**cluster: Any) -> Config:
    rollout: dict[str, Any] = {"engine": "vllm"}
    if cards := cluster.pop("cards", None):
        rollout["engine_args"] = {"tensor_parallel_size": cards}
    return resolve(
        {
            "name": "t", "model": {"path": "x"}, "data": {"source": "arithmetic"},
            "rollout": rollout, "cluster": {"device": "npu", **cluster},
        }
    )  # fmt: skip


def looked(settings: Config) -> list[dict[str, Any]]:
    """What each actor of a placement finds, learners first."""

    class Look:  # sent by value: its process imports no test
        def look(self) -> dict[str, Any]:
            from emberl.kernels import platform
            from emberl.rollout.actors import own_cards
            from emberl.rollout.vllm_backend import compat

            npu = platform.NPU
            cards = own_cards(npu)
            engine = compat.EngineSettings(
                model="m", dtype="bfloat16", device="npu", threads=1, max_num_seqs=1,
                max_model_len=8, cards=cards,
            )  # fmt: skip
            variables = {**os.environ, **compat.prepare(engine, os.environ)[0]}
            return {
                "cards": cards,
                "visible": os.environ.get(str(npu.visible_devices)),
                "index": platform.card_index(npu, cards),
                "engine": variables.get(str(npu.visible_devices)),
            }

    with Cluster(settings) as cluster:
        slots = cluster.placement.slots
        actors = [cluster.options(Look, slot).remote() for slot in slots]
        found: list[dict[str, Any]] = ray.get([a.look.remote() for a in actors], timeout=180)
    return found


@pytest.mark.slow
def test_ray_hides_the_others(box: Box) -> None:
    with box(**{VISIBLE: "4,5,6,7"}):
        found = looked(config(learners=2, rollouts=1, cards=2))
    assert [each["index"] for each in found] == [0, 0, 0], "the first that is visible"
    assert all(each["visible"] == ",".join(each["cards"]) == each["engine"] for each in found)
    assert sorted(card for each in found for card in each["cards"]) == ["4", "5", "6", "7"]


@pytest.mark.slow
@pytest.mark.parametrize("listed", ["", "4,5,6,7"], ids=["all", "a list"])
def test_without_hiding_each_takes_its_own(box: Box, listed: str) -> None:
    environ = {NOSET: "1"} | ({VISIBLE: listed} if listed else {})
    names = listed.split(",") if listed else ["0", "1", "2", "3"]
    with box(**environ):
        found = looked(config(learners=2, rollouts=1, cards=2))
    assert all(each["visible"] == (listed or None) for each in found), "Ray left it alone"
    assert sorted(card for each in found for card in each["cards"]) == names
    for each in found:
        assert names[each["index"]] == each["cards"][0]
    assert found[2]["engine"] == ",".join(found[2]["cards"]), "vLLM's processes see its two alone"


@pytest.mark.slow
def test_a_shared_card_is_the_same_for_both_without_hiding(box: Box) -> None:
    """A learner and an engine have half of it each, to Ray."""
    with box(**{NOSET: "1"}):
        found = looked(config(learners=3, rollouts=3, colocated=True))
    indices = [each["index"] for each in found]
    assert indices[:3] == indices[3:] and len(set(indices[:3])) == 3
    for each in found[3:]:
        assert each["engine"] == str(each["index"])

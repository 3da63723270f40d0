"""`key=value`: text where the key holds text, YAML where it does not, and nothing is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.load import Config, ConfigError, load_config
from emberl.rl.config.overrides import tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def read(override: str) -> Any:
    found = tree_of(override, Config)
    for part in override.partition("=")[0].split("."):
        found = found[part]
    return found


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.answer_pattern=#### (.+)", "#### (.+)"),
        (
            "data.system_prompt=Write the answer after #### please",
            "Write the answer after #### please",
        ),
        (
            'data.prompt_template=Q: {question} Output the answer after "####".',
            'Q: {question} Output the answer after "####".',
        ),
        ("data.prompt_template={question}", "{question}"),
        ("data.prompt_template=[{a}] & *x | >y %z @w `v` !u", "[{a}] & *x | >y %z @w `v` !u"),
        ("data.system_prompt=one\ntwo # three", "one\ntwo # three"),
        ("data.system_prompt= spaces stay ", " spaces stay "),
        ("data.system_prompt=", ""),
        ("data.system_prompt=null", None),
        ("data.system_prompt='null'", "null"),
        ("data.system_prompt=~", "~"),
        ('data.system_prompt="a # b"', "a # b"),
        ('data.system_prompt="a" and "b"', '"a" and "b"'),
        ("data.system_prompt=it's", "it's"),
        ("data.prompt_template=a=b=c", "a=b=c"),
        ("name=yes", "yes"),
        ("name=1e3", "1e3"),
        ("name=null", None),
        ("name=???", "???"),
        ("name=007", "007"),
        ("cluster.address=10:20", "10:20"),
        ("model.packing=on", "on"),
        ("algorithm=dapo", "dapo"),
        ("reward.parts.answer.use=./my file.py:f", "./my file.py:f"),
        ("reward.parts.answer.gate=null", None),
        ("stages=[sft,rl]", ["sft", "rl"]),
        (
            "rollout.servers=[http://a:8000, yes, 1e3, 'b, c']",
            ["http://a:8000", "yes", "1e3", "b, c"],
        ),
        ("rollout.servers=[]", []),
        ("model.lora.targets=all-linear", "all-linear"),
        ("model.lora.targets=[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("model.lora.targets=[0-9]+_proj", "[0-9]+_proj"),
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=1e-4 # try", "1e-4 # try"),
        ("optim.betas=[0.9, 0.99]", [0.9, 0.99]),
        ("optim.micro_batch_tokens=auto", "auto"),
        ("optim.micro_batch_tokens=4096", 4096),
        ("schedule.steps=", ""),
        ("model.lora=null", None),
        ("model.tiny={}", {}),
        ("data.kinds={chain: 1, solve: 0.5}", {"chain": 1, "solve": 0.5}),
        ("data.kinds.solve=2", 2),
        ("data.chat_template_kwargs.enable_thinking=false", False),
        ("reward.parts.answer.options={a: {b: [1, x # y]}}", "{a: {b: [1, x # y]}}"),
        ('reward.parts.answer.options={a: {b: [1, "x # y"]}}', {"a": {"b": [1, "x # y"]}}),
        ("reward.parts.answer.options.pattern=#### (.+)", "#### (.+)"),
        ("reward.parts.answer.options.prompt=Answer: yes", "Answer: yes"),
        ("reward.parts.answer.options.prompt=- a", "- a"),
        ("reward.parts.answer.options.deep.er=1e3", 1000.0),
        ("rollout.nothing.of.ours=8", 8),
    ],
)
def test_what_an_override_means(override: str, value: Any) -> None:
    assert read(override) == value and type(read(override)) is type(value)


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda t: t[0] not in "'\"" and t != "null"))
def test_any_text_arrives_whole(text: str) -> None:
    assert read(f"data.system_prompt={text}") == text
    assert read(f"reward.parts.a.use={text}") == text


@given(st.text(alphabet="ab #:[]{}'\"\n,1e.-", min_size=1).filter(lambda t: "#" in t))
def test_a_hash_never_cuts_what_is_not_in_brackets(text: str) -> None:
    found = read(f"reward.parts.a.options.x={text}")
    assert found == text or text.strip()[0] in "[{'\""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_size", "override 'group_size' must have the form key=value"),
        ("=5", "override '=5' must have the form key=value"),
        ("a..b=5", "must have the form key=value"),
        ("name=null", "name=None: a text goes here, and null is none; write 'null' in quotes"),
        *(
            (f"name={name}", "it names a directory: no slash in it, no dot or space first")
            for name in ("a/b", "..", ".", "../../x", "/tmp/x", ".hidden", " ", "a\nb", "a\0")
        ),
        ("model=[]", "model=[]: a group goes here; set one of its keys, model.path"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: a list of 2 values goes here"),
        ("data.terms=[2,3,4]", "data.terms=[2, 3, 4]: a list of 2 values goes here"),
        ("data.source=", "data.source='': it must not be empty"),
        ("reward.parts.b.weight=1", "reward.parts.b: a part of the reward has either use"),
        (
            "reward.parts.answer.gate=nobody",
            "reward.parts.answer.gate=nobody names no other part; there are answer",
        ),
        (
            "rollout.engine_args.tensor_parallel_size=two",
            "rollout.engine_args.tensor_parallel_size='two' must be a number",
        ),
        ("loss.clip_low=2", "loss.clip_low=2.0 would let"),
        ("algorithm=GRPO", "did you mean 'grpo'?"),
        ("name=${", r"in a text write \${"),
        (
            "data.prompt_template=${question}",
            "data.prompt_template: Interpolation key 'question' not found; in a text",
        ),
        (
            "rollout.servers=http://a:8000",
            "rollout.servers='http://a:8000': a list goes here, e.g. [a,b]",
        ),
        ("data.kinds=chain", "data.kinds='chain': a mapping goes here, e.g. {a: 1}"),
        (
            "optim=adam",
            "optim='adam': a group goes here; set one of its keys, optim.lr, optim.betas",
        ),
        (
            "optim.lr.x=1",
            "unknown key optim.lr.x; optim.lr has no keys below it, give optim.lr itself a value",
        ),
        (
            "optim.micro_batch_tokens=many",
            "optim.micro_batch_tokens='many': input should be a valid integer",
        ),
        ("optim.micro_batch_tokens=many", ", or input should be 'auto'"),
        (
            "model.lora={targets: 5}",
            "model.lora.targets=5: a text goes here; put it in quotes, or a list goes here",
        ),
    ],
)
def test_what_is_no_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_interpolation_and_a_dollar_sign() -> None:
    config = load_config(
        QUICKSTART, ["run_dir=runs/${name}-1", r"data.system_prompt=cost: \${x}, $y"]
    )
    assert (config.run_dir, config.data.system_prompt) == ("runs/quickstart-1", "cost: ${x}, $y")


def test_a_later_override_wins_and_mappings_merge() -> None:
    config = load_config(
        QUICKSTART,
        ["model={dtype: float32}", "optim.lr=1e-3", "optim.lr=1e-2", "data.kinds={story: 2}"],
    )
    assert (
        config.model.tiny is not None
        and config.model.dtype == "float32"
        and config.optim.lr == 1e-2
    )
    assert config.data.kinds == {"chain": 1, "solve": 1, "story": 2}


def test_null_takes_an_entry_out_of_a_mapping_of_the_users_own_keys() -> None:
    config = load_config(
        QUICKSTART,
        ["data.kinds={story: 2}", "data.kinds.chain=null", "reward.parts.answer=null",
         "reward.parts.mine={use: math, options: {percent: null}}", "data.system_prompt=null"],
    )  # fmt: skip
    assert config.data.kinds == {"solve": 1, "story": 2}
    assert set(config.reward.parts) == {"mine"}, "and `options` are the reward's to read"
    assert config.data.system_prompt is None
    again = load_config(QUICKSTART, ["data.kinds.chain=null", "data.kinds.chain=3"])
    assert again.data.kinds == {"chain": 3, "solve": 1}
    with pytest.raises(ConfigError, match="optim"):  # a group's key is no entry
        load_config(QUICKSTART, ["optim=null"])

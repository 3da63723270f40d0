"""The learner's log-probs and gradients where the model does more to its logits than multiply."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from emberl.kernels.loss.terms import TokenStats, TokenTerms
from emberl.rl.batch import sft_batch
from emberl.rl.config.load import LoraConfig
from emberl.rl.learner.logits import LinearHead, own_logits
from emberl.rl.learner.lora import inject_adapters
from emberl.rl.learner.policy import Policy, to_tensors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), LinearHead()),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=2), LinearHead()),
    "phi, with a bias": (PhiConfig(**SIZES), LinearHead()),
    "gpt-neox": (GPTNeoXConfig(**SIZES), LinearHead()),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), LinearHead(scale=0.125)),
    "cohere2": (
        Cohere2Config(**SIZES, logit_scale=0.25, layer_types=["full_attention"] * 2),
        LinearHead(scale=0.25),
    ),
    "gemma2": (
        Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0),
        LinearHead(softcap=2.0),
    ),
}
SEQUENCES = [((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1), ((6, 6, 7, 9, 30, 11, 39), 3)]


def make(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        deepcopy(config), dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)  # logits that a scale and a cap change visibly
    return model


class Weighted:
    """The sum of c logp - d entropy with numbers of each token's own."""

    whole_sequences = False
    needs_entropy = True

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        assert stats.entropy is not None
        c, d = 0.3 + index.to(stats.logp), 0.1 * index.to(stats.logp)
        return TokenTerms(loss=c * stats.logp - d * stats.entropy, dlogp=c, dentropy=-d)


def by_hand(model: Any, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probs [n] by the model's own forward, sequence after sequence, and the gradients of
    `Weighted`."""
    logps, loss, position = [], torch.zeros((), dtype=torch.float64), 0
    for tokens, prompt in SEQUENCES:
        logs = (model(torch.tensor([tokens])).logits[0].double() / temperature).log_softmax(-1)
        for t in range(prompt, len(tokens)):
            entropy, logp, index = (
                -(logs[t - 1].exp() * logs[t - 1]).sum(),
                logs[t - 1, tokens[t]],
                position + t,
            )
            loss = loss + (0.3 + index) * logp - 0.1 * index * entropy
            logps.append(logp.detach())
        position += len(tokens)
    return torch.stack(logps), gradients(model, loss)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, policy: Policy, temperature: float = 0.7) -> None:
    expected, slopes = by_hand(model, temperature)
    micro = to_tensors(sft_batch(SEQUENCES), (0, 1, 2), torch.device("cpu"))
    _, plain, _ = policy(micro, None, None, temperature)
    torch.testing.assert_close(plain.logp.detach(), expected, rtol=0, atol=1e-6)
    loss, stats, _ = policy(micro, Weighted(), None, temperature)
    torch.testing.assert_close(stats.logp.detach(), expected, rtol=0, atol=1e-6)
    assert loss is not None
    mine = gradients(model, loss)
    assert mine.keys() == slopes.keys()
    for name, slope in slopes.items():
        # eager attention's softmax is float32
        torch.testing.assert_close(mine[name], slope, rtol=1e-5, atol=1e-5)


# torch groups no float64 products
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_the_model_s_own_scale_and_cap_are_found(family: str) -> None:
    config, head = FAMILIES[family]
    model = make(config)
    policy = Policy(model)
    assert policy.head == head
    check(model, policy)


def test_a_formula_that_is_not_known_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(FAMILIES["granite"][0])
    model.config.logits_scaling, hidden = 1.0, torch.randn(3, 32, dtype=torch.float64)
    scaled = own_logits(model, hidden)
    assert Policy(model).head == LinearHead()
    # one that no configuration speaks of
    monkeypatch.setattr(type(model), "forward", other_forward)
    torch.testing.assert_close(own_logits(model, hidden), 1.5 * scaled)
    policy = Policy(model)
    assert policy.head is None
    check(model, policy)


def other_forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
    body = self.model(input_ids=input_ids, use_cache=False)
    body.logits = 1.5 * self.lm_head(body.last_hidden_state)
    return body


def test_adapters_in_the_output_layer_are_trained() -> None:
    pytest.importorskip("peft", reason="peft (the extra `lora`) is not installed")
    model = make(FAMILIES["qwen3"][0])
    inject_adapters(model, LoraConfig(rank=2, alpha=4, targets=("lm_head", "q_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    * 0.3
                )
    policy = Policy(model)
    assert policy.head is None
    check(model, policy)
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any(name.startswith("lm_head.lora_A") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_another_formula(dtype: torch.dtype) -> None:
    for config, head in FAMILIES.values():
        assert Policy(make(config, dtype)).head == head


def test_the_body_is_itself_again_after_the_model_s_own_logits() -> None:
    model = make(FAMILIES["qwen3"][0])
    own_logits(model, torch.zeros(2, 32, dtype=torch.float64))
    assert "forward" not in vars(model.model)
    model.model.forward = wrapped = model.model.forward
    with pytest.raises(RuntimeError):
        # of a size that the head does not take
        own_logits(model, torch.zeros(2, 31, dtype=torch.float64))
    assert vars(model.model)["forward"] is wrapped

"""GRPO in a plain transformers loop: `linear_policy_loss` takes the hidden states in the place of logits and loss.

The reward is the share of even token ids among the sampled ones. A random model starts at about 0.5 and is at 0.9 and
more after 30 steps:

    python docs/examples/transformers_loop.py                        # a tiny random Llama, on the CPU in seconds
    python docs/examples/transformers_loop.py --model FOLDER         # a model of yours, on the GPU where there is one
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from ilr_kernels.advantage import calibrated_advantage
from ilr_kernels.lm_head import linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, UPDATES = 4, 8, 4, 12, 2
LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28)


def make_model(folder: str | None, device: str) -> Any:
    """The model of a folder in bfloat16 on a GPU, or a tiny one with random weights."""
    if folder:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).to(device)


@torch.no_grad()
def sample(model: Any) -> Tensor:
    """Random prompts, each continued SAMPLES times: token ids [PROMPTS · SAMPLES, PROMPT_TOKENS + NEW_TOKENS]."""
    prompts = torch.randint(model.config.vocab_size, (PROMPTS, PROMPT_TOKENS), device=model.device)
    tokens = prompts.repeat_interleave(SAMPLES, 0)
    for _ in range(NEW_TOKENS):
        logits = model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def step(model: Any, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Samples, and updates the model twice on what it sampled; returns the mean reward and entropy."""
    tokens = sample(model)
    reward_S = (tokens[:, PROMPT_TOKENS:] % 2 == 0).float().mean(1)
    _, advantage_MQG = calibrated_advantage(reward_S.view(1, PROMPTS, SAMPLES), calibrate="none")

    # `target[t]` is the token that `hidden[t]` predicts: shifted by one, −100 where a prompt's token is predicted
    target = tokens[:, 1:].clone()
    target[:, : PROMPT_TOKENS - 1] = -100
    advantage_T = advantage_MQG.flatten().repeat_interleave(target.shape[1])
    weight_T = (target != -100).float().flatten() / (target != -100).sum()

    old_logp_T = None  # the first update is on-policy, the second is off the policy that sampled
    for _ in range(UPDATES):
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        loss, stats = linear_policy_loss(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            target.flatten(),
            advantage_T,
            weight_T,
            old_logp_T=old_logp_T,
            loss=LOSS,
            with_logp=True,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if old_logp_T is None:
            old_logp_T, entropy = stats["logp_T"], stats["entropy_T"].nanmean()
    return float(reward_S.mean()), float(entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO in a plain transformers loop")
    parser.add_argument("--model", help="a model's folder; without it, a tiny random one")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, help="learning rate; 1e-2 for the random model, 1e-5 for one of yours")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    lr = args.lr or (1e-5 if args.model else 1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for number in range(1, args.steps + 1):
        reward, entropy = step(model, optimizer)
        print(f"step {number:3d}  reward {reward:.3f}  entropy {entropy:.2f}")


if __name__ == "__main__":
    main()

"""What a run of PPO says of itself before it begins: the settings that follow from others, and what is to be known of them."""

from __future__ import annotations

from posttrain.stages.ppo.config import Ppo


def lines_of_method(cfg: Ppo) -> list[str]:
    """For the first lines of a run: the method, and what it does not do as one may think."""
    ppo, rollout, penalty = cfg.ppo, cfg.rollout, cfg.reward.missing_eos_penalty
    taken = "taken off the reward" if ppo.kl_in == "reward" else "in the loss"
    kl = f"KL ({ppo.kl_estimator}) times {ppo.kl_coef:g} {taken}" if ppo.kl_coef else "no KL penalty"
    ends = f"{penalty:g} off without an end" if penalty else "nothing off without an end"
    lines = [
        f"ppo.advantage={ppo.advantage} ppo.loss={ppo.loss}: ratios from {1 - ppo.clip:g} to {1 + ppo.clip_high:g}; {kl}; "
        f"answers of up to {rollout.max_new_tokens} tokens, {ends}"
    ]
    if ppo.dynamic_sampling:
        lines.append(
            f"ppo.dynamic_sampling: a step draws prompts until enough have answers of different reward, up to {ppo.max_draws} "
            "times; train/reward is of those that are kept, train/drawn_reward of all"
        )
    if ppo.minibatches > cfg.train.grad_accum:
        lines.append(
            f"ppo.minibatches={ppo.minibatches} of train.grad_accum={cfg.train.grad_accum} micro-batches: an update has "
            f"one at least, so a pass has {cfg.train.grad_accum}"
        )
    cut = [f"rollout.{name}" for name, on in (("top_p", rollout.top_p < 1), ("top_k", rollout.top_k)) if on]
    if cut and rollout.correction == "none":
        lines.append(
            f"{' and '.join(cut)}: answers are drawn from a part of the policy, so gradients are biased; "
            "rollout.correction=truncate weighs what was drawn as the policy does"
        )
    return lines

"""A Decision Transformer on the blocks of GPT-2 (Chen et al., 2021; Appendix E.2 of the paper).

Every step of an episode becomes four tokens: return-to-go, state, action, reward. The action is predicted at the token
of the state, so from the steps before and from the return that is asked for. Without reward tokens there are three.

Dimension names: b windows, k steps, s numbers of a state, a of an action, t tokens of a step, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.utils import ModelOutput

from evatune.errors import EvaError


class DecisionTransformerConfig(GPT2Config):
    """The sizes of a Decision Transformer; those of its blocks have GPT-2's names (`n_layer`, `n_head`, `n_embd`).

    Args:
        state_size: numbers of a state.
        action_size: numbers of an action.
        context: steps that the model looks back, the present one included.
        reward_tokens: also give the model the reward of each step.
        time_steps: embed the number of the step in its episode, for episodes of at most so many steps; 0 leaves it
            out. The position of a token in the window is always embedded.
        reward_scale: rewards are divided by this.
        return_scale: returns-to-go are divided by this.
        options: GPT-2's own.
    """

    model_type = "evatune_decision_transformer"

    def __init__(
        self,
        *,
        state_size: int = 39,
        action_size: int = 4,
        context: int = 50,
        reward_tokens: bool = True,
        time_steps: int = 0,
        reward_scale: float = 10.0,
        return_scale: float = 1000.0,
        **options: Any,
    ) -> None:
        self.state_size = state_size
        self.action_size = action_size
        self.context = context
        self.reward_tokens = reward_tokens
        self.time_steps = time_steps
        self.reward_scale = reward_scale
        self.return_scale = return_scale
        own: dict[str, Any] = {
            "vocab_size": 1,  # there are no words
            "bos_token_id": None,
            "eos_token_id": None,
            "n_positions": context * (3 + reward_tokens),
            "activation_function": "relu",
            "use_cache": False,
        }
        super().__init__(**{**own, **options})


def checked_config(config: Any, *, name: str, context: int | None) -> DecisionTransformerConfig:
    """Return the configuration of a pretrained model, if it is one for control.

    Args:
        config: what was read.
        name: of the model.
        context: steps that the settings ask for; None takes those of the model.

    Raises:
        EvaError: it is another model, or one for another number of steps.
    """
    if not isinstance(config, DecisionTransformerConfig):
        raise EvaError(
            f"{name!r} is a model of type {config.model_type!r}, but task 'control' needs a Decision Transformer; "
            "pretrain one with evatune finetune recipes/small/metaworld-pretrain.yaml."
        )
    if context not in (None, config.context):
        raise EvaError(f"data.context is {context}, but {name!r} was made for {config.context} steps.")
    return config


@dataclass
class DecisionTransformerOutput(ModelOutput):
    """What a forward pass returns."""

    loss: Tensor | None = None
    """Mean squared error of the actions, over the steps that are not padding."""
    actions: Tensor | None = None
    """(b, k, a): the action predicted at every step."""


class DecisionTransformer(GPT2PreTrainedModel):
    """Predicts the next action from the last steps of an episode and the return that is asked for.

    The embeddings of states, actions, rewards and returns-to-go are linear layers; states are standardized by the mean
    and scale of the pretraining data, which are saved with the weights.
    """

    config_class = DecisionTransformerConfig
    state_mean: Tensor
    state_scale: Tensor

    def __init__(self, config: DecisionTransformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.register_buffer("state_mean", torch.zeros(config.state_size))
        self.register_buffer("state_scale", torch.ones(config.state_size))
        self.embed_state = nn.Linear(config.state_size, size)
        self.embed_action = nn.Linear(config.action_size, size)
        self.embed_return = nn.Linear(1, size)
        self.embed_reward = nn.Linear(1, size) if config.reward_tokens else None
        self.embed_time = nn.Embedding(config.time_steps, size) if config.time_steps else None
        self.embed_norm = nn.LayerNorm(size, eps=config.layer_norm_epsilon)
        self.transformer = GPT2Model(config)
        self.action_head = nn.Linear(size, config.action_size)
        self.post_init()

    def token_mask(self, attention_mask: Tensor) -> Tensor:
        """Return the mask of the tokens, (b, k · t), from that of the steps, (b, k)."""
        return attention_mask.repeat_interleave(3 + self.config.reward_tokens, dim=1)

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        returns_to_go: Tensor,
        *,
        timesteps: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> DecisionTransformerOutput:
        """Predict the action of every step.

        Args:
            states: (b, k, s), as observed.
            actions: (b, k, a), in [-1, 1]; the one of the last step is not looked at by the prediction.
            rewards: (b, k), as received after each step.
            returns_to_go: (b, k), the sum of rewards from each step on.
            timesteps: (b, k), number of each step in its episode; needed if the time is embedded.
            attention_mask: (b, k), 1 for steps and 0 for padding, which stands after them; None if there is none.
        """
        config = self.config
        tokens = [
            self.embed_return(returns_to_go[..., None] / config.return_scale),
            self.embed_state((states - self.state_mean) / self.state_scale),
            self.embed_action(actions),
        ]
        if self.embed_reward is not None:
            tokens.append(self.embed_reward(rewards[..., None] / config.reward_scale))
        tokens_bkth = torch.stack(tokens, dim=2)
        if self.embed_time is not None:
            tokens_bkth = tokens_bkth + self.embed_time(timesteps)[:, :, None]
        # Padding stands behind the steps and attention looks back only, so that no step ever sees it.
        hidden = self.transformer(inputs_embeds=self.embed_norm(tokens_bkth).flatten(1, 2)).last_hidden_state
        at_states = hidden.unflatten(1, (states.shape[1], -1))[:, :, 1]
        predicted = self.action_head(at_states)
        errors = (predicted.float() - actions).square().mean(-1)
        weights = torch.ones_like(errors) if attention_mask is None else attention_mask.to(errors.dtype)
        return DecisionTransformerOutput(loss=(errors * weights).sum() / weights.sum(), actions=predicted)


# What the Auto classes know, `evatune.models` can load.
AutoConfig.register(DecisionTransformerConfig.model_type, DecisionTransformerConfig, exist_ok=True)
AutoModel.register(DecisionTransformerConfig, DecisionTransformer, exist_ok=True)

"""AdamW that honors the per-parameter overrides the model sets."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from emkum.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class GroupedAdamWConfig(FairseqDataclass):
    adamw_beta1: float = field(default=0.9, metadata={"help": "decay of the first moment"})
    adamw_beta2: float = field(default=0.98, metadata={"help": "decay of the second moment"})
    adamw_eps: float = field(default=1e-6, metadata={"help": "term added to the denominator"})
    adamw_weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay; 0 = none"})
    lr: list[float] = II("optimization.lr")
    fp16: bool = II("common.fp16")


def describe_groups(
    groups: Mapping[tuple[float, float], Sequence[torch.nn.Parameter]], weight_decay: float
) -> Iterator[str]:
    """Lines that say of each group how many parameters it has, how they learn, and what they belong to.

    Args:
        groups: parameters by their factors of learning rate and weight decay.
        weight_decay: what the latter multiplies.
    """
    for (lr_scale, decay_scale), members in groups.items():
        count = sum(parameter.numel() for parameter in members)
        # A dict keeps the order and drops repetitions.
        parts = dict.fromkeys(getattr(p, "optim_overrides", {}).get("part", "unnamed") for p in members)
        yield (
            f"group of {count:>11,} parameters, lr x {lr_scale:<8.4g} weight decay {decay_scale * weight_decay:<6g} "
            f"{', '.join(parts)}"
        )


@register_optimizer("grouped_adamw", dataclass=GroupedAdamWConfig)
class GroupedAdamW(FairseqOptimizer):
    """torch.optim.AdamW over groups of parameters that share `optim_overrides`.

    A parameter's attribute `optim_overrides = {"optimizer": {"lr_scale": s, "weight_decay_scale": w}, "part": words}`
    (fairseq's own convention, which its fp16 copies keep with `--fp16-no-flatten-grads`) multiplies learning rate and
    weight decay, and says what the parameter belongs to. The groups are logged, one a line.
    """

    def __init__(self, cfg: GroupedAdamWConfig, params) -> None:
        super().__init__(cfg)
        # Whether the gradients of the present update are not finite.
        self.is_skipping = False
        groups = defaultdict(list)
        for parameter in params:
            overrides = getattr(parameter, "optim_overrides", {}).get("optimizer", {})
            groups[overrides.get("lr_scale", 1.0), overrides.get("weight_decay_scale", 1.0)].append(parameter)
        for line in describe_groups(groups, cfg.adamw_weight_decay):
            logger.info("%s", line)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": members, "lr_scale": lr_scale, "weight_decay": decay_scale * cfg.adamw_weight_decay}
                for (lr_scale, decay_scale), members in groups.items()
            ],
            # One fused kernel a step where the device has it; CPU too.
            fused=True,
            **{key: value for key, value in self.optimizer_config.items() if key != "weight_decay"},
        )
        self.set_lr(self.optimizer_config["lr"])

    @property
    def optimizer_config(self) -> dict:
        cfg = self.cfg
        lr = cfg.lr[0] if hasattr(cfg.lr, "__getitem__") else cfg.lr
        return {"lr": lr, "betas": (cfg.adamw_beta1, cfg.adamw_beta2), "eps": cfg.adamw_eps}

    @property
    def supports_flat_params(self) -> bool:
        return False

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn=None) -> torch.Tensor:
        """Clip, unless the norm is not finite: then the next step leaves everything as it is, and the norm counts as 0.

        fairseq would end the run. It reads the norm on the host at each update, too. Under `--fp16` the norm is left to
        fairseq's scaler of losses, which skips the update and tries a smaller scale.
        """
        norm = super().clip_grad_norm(max_norm, aggregate_norm_fn)
        if self.cfg.fp16:
            return norm
        self.is_skipping = not bool(torch.isfinite(norm))
        return torch.zeros_like(norm) if self.is_skipping else norm

    def step(self, closure=None, scale=1.0, groups=None) -> None:
        if not self.is_skipping:
            super().step(closure, scale, groups)

    def set_lr(self, lr: float) -> None:
        self._base_lr = lr
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def get_lr(self) -> float:
        return self._base_lr

    def load_state_dict(self, state_dict, optimizer_overrides=None) -> None:
        """Restore the state; the groups keep this run's own scales and weight decay.

        Raises:
            UserError: the state is of other groups.
        """
        own = [{key: group[key] for key in ("lr_scale", "weight_decay")} for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        except ValueError:
            raise UserError(
                "the checkpoint's optimizer has other groups of parameters: give the same --lr-scale-* and --freeze-* "
                "options as before, or --reset-optimizer"
            ) from None
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept, **{k: v for k, v in self.optimizer_config.items() if k != "lr"})
        self.set_lr(self.optimizer_config["lr"])

"""AdamW that honors the per-parameter overrides the model sets."""

import logging
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

logger = logging.getLogger(__name__)


@dataclass
class GroupedAdamWConfig(FairseqDataclass):
    adamw_beta1: float = field(default=0.9, metadata={"help": "decay of the first moment"})
    adamw_beta2: float = field(default=0.98, metadata={"help": "decay of the second moment"})
    adamw_eps: float = field(default=1e-6, metadata={"help": "term added to the denominator"})
    adamw_weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay; 0 = none"})
    lr: list[float] = II("optimization.lr")


@register_optimizer("grouped_adamw", dataclass=GroupedAdamWConfig)
class GroupedAdamW(FairseqOptimizer):
    """torch.optim.AdamW over groups of parameters that share `optim_overrides`.

    A parameter's attribute `optim_overrides = {"optimizer": {"lr_scale": s, "weight_decay_scale": w}}` (fairseq's own
    convention, which its fp16 copies keep with `--fp16-no-flatten-grads`) multiplies learning rate and weight decay.
    """

    def __init__(self, cfg: GroupedAdamWConfig, params) -> None:
        super().__init__(cfg)
        groups = defaultdict(list)
        for parameter in params:
            overrides = getattr(parameter, "optim_overrides", {}).get("optimizer", {})
            groups[overrides.get("lr_scale", 1.0), overrides.get("weight_decay_scale", 1.0)].append(parameter)
        for (lr_scale, decay_scale), members in groups.items():
            numel = sum(parameter.numel() for parameter in members)
            decay = decay_scale * cfg.adamw_weight_decay
            logger.info("parameter group: %s parameters, lr x %g, weight decay %g", f"{numel:,}", lr_scale, decay)
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

    def set_lr(self, lr: float) -> None:
        self._base_lr = lr
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def get_lr(self) -> float:
        return self._base_lr

    def load_state_dict(self, state_dict, optimizer_overrides=None) -> None:
        """Restore the state; the groups keep this run's own scales and weight decay."""
        own = [{key: group[key] for key in ("lr_scale", "weight_decay")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept, **{k: v for k, v in self.optimizer_config.items() if k != "lr"})
        self.set_lr(self.optimizer_config["lr"])

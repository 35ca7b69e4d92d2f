"""The methods that `language.py` compares, on one language model.

As in `contenders.py`: a contender is built once for a rank and options, and
then trains any number of times, each from the start. All adapt all linear
layers, with AdamW at a rate that falls to zero, and see the same batches. Rank
r means LoRA of rank r; `geolora` gets as many parameters and shares them out,
AdaLoRA has r as its mean rank. `peft_cut` is LoRA of four times the rank, cut
afterwards to 95 % of the energy of each update.
"""

import copy
import math

import contenders
import measuring
import numpy as np
from contenders import (
    EPSILON,
    WEIGHT_DECAY,
    counted,
    draw_weights,
    make_adamw,
)

AT_ONCE = 20


class OnKeras:
    """A contender on KerasHub's model; a subclass says how to adapt it."""

    start_rank = None

    def __init__(self, folder, rank, steps, **options):
        import instructions
        import keras

        self.rank, self.steps = rank, steps
        self.model, _ = instructions.load(folder)
        self.layers = {}
        optimizer = self.adapt(make_adamw(steps), **options)
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            ),
            weighted_metrics=[],
            jit_compile=keras.backend.backend() == "jax",
        )
        self.optimizer = optimizer
        optimizer.build(self.model.trainable_variables)
        trained = [*self.model.trainable_variables, *optimizer.variables]
        first = counted(trained)
        known = {id(v) for v in first}
        rest = [v for v in trained if id(v) not in known]
        self._start = measuring.remember([*first, *rest])

    def train(self, rows, batches, rate, seed):
        """Trains on batches of rows, and returns the losses."""
        import keras

        keras.utils.set_random_seed(seed)
        measuring.restore(self._start)
        self.draw(seed)
        self.optimizer.learning_rate = rate
        x, labels, weights = rows
        return [
            float(
                self.model.train_on_batch(
                    {name: column[batch] for name, column in x.items()},
                    labels[batch],
                    sample_weight=weights[batch],
                )
            )
            for batch in batches
        ]

    def draw(self, seed):
        """Draws the random weights of the adapters."""
        draw_weights(self.model, seed, self.start_rank)

    def logits(self, x):
        """Returns the logits of a few rows."""
        return np.asarray(self.model.predict_on_batch(x))

    def parameters(self):
        """Returns the number of trainable parameters."""
        trained = counted(self.model.trainable_variables)
        return sum(math.prod(v.shape) for v in trained)

    def effective(self):
        """Returns the number of parameters at the ranks found."""
        return self.parameters()

    def ranks(self):
        """Returns the rank of every layer."""
        return [self.rank] * len(self.layers)


class GeoLoRA(contenders.Adapted, OnKeras):
    """This library, with the parameters that LoRA of the rank has.

    With `falling`, the budget begins at `room` times as much, and falls within
    that share of the steps.
    """

    def adapt(self, inner, room=2, falling=0.0, **options):
        import keras_geolora

        budget = self.enable(room, falling)
        return keras_geolora.GeoLoRA(inner, parameter_budget=budget, **options)

    def train(self, *args):
        losses = super().train(*args)
        self.optimizer.cut()
        return losses


class KerasLoRA(OnKeras):
    """Keras' `enable_lora`: of a kernel of heads it factors the last axis."""

    def adapt(self, optimizer):
        from contenders import enable_keras_lora

        self.layers = enable_keras_lora(self.model, self.rank)
        return optimizer


class Full(OnKeras):
    """Full fine-tuning, the ceiling."""

    def adapt(self, optimizer):
        return optimizer

    def draw(self, seed):
        """Draws nothing: all weights are pretrained."""


class OnPEFT(contenders.OnPEFT):
    """A contender of PEFT on the model of transformers."""

    def __init__(self, folder, rank, steps, **options):
        import torch
        import transformers

        self.rank, self.steps, self.options = rank, steps, options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )

    def train(self, rows, batches, rate, seed):
        """Trains on batches of rows, and returns the losses."""
        import peft
        import torch

        torch.manual_seed(seed)
        config = self.config(
            self.steps, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(copy.deepcopy(self.base), config)
        self.model.to(self.device).train()
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            rate,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )
        allocate = getattr(self.model.base_model, "update_and_allocate", None)
        x, labels, weights = rows
        losses = []
        for count, batch in enumerate(batches):
            logits = self._logits({k: v[batch] for k, v in x.items()})
            weight = torch.tensor(weights[batch]).to(self.device)
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2),
                torch.tensor(labels[batch]).long().to(self.device),
                reduction="none",
            )
            loss = (each * weight).sum() / weight.sum()
            losses.append(loss.item())
            (loss + self.penalty()).backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - count / self.steps)
            optimizer.step()
            if allocate is not None:
                allocate(count)
            optimizer.zero_grad()
        self.model.eval()
        self.finish()
        return losses

    def penalty(self):
        """Returns what the method adds to the loss."""
        return 0.0

    def finish(self):
        """Does what the method does after training."""

    def _logits(self, x):
        import torch

        return self.model(
            input_ids=torch.tensor(x["token_ids"]).long().to(self.device),
            attention_mask=torch.tensor(x["padding_mask"]).to(self.device),
        ).logits

    def logits(self, x):
        """Returns the logits of a few rows."""
        import torch

        with torch.no_grad():
            return self._logits(x).cpu().numpy()

    def parameters(self):
        """Returns the number of trainable parameters."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return sum(parameter.numel() for parameter in trained)


class Untrained(OnPEFT):
    """The pretrained model, which learns nothing."""

    def train(self, rows, batches, rate, seed):
        self.model = self.base.to(self.device).eval()
        return []

    def parameters(self):
        return 0

    def ranks(self):
        return []


class PEFTLoRA(OnPEFT):
    """LoRA, rank-stabilised LoRA or DoRA, of scale 1 but for the second."""

    def config(self, steps, **shared):
        import peft

        options = dict(self.options)
        times = options.pop("times", 1)
        alpha = self.rank * times
        return peft.LoraConfig(r=alpha, lora_alpha=alpha, **options, **shared)

    def ranks(self):
        """Returns the rank of every layer, maybe after a cut."""
        return [len(A) for A in self.factors("A")]


class PEFTCut(PEFTLoRA):
    """LoRA of a larger rank, cut afterwards by the energy of each update."""

    def finish(self):
        import tempfile

        import peft

        with tempfile.TemporaryDirectory() as folder:
            peft.save_as_lora(folder, self.model, rank=0.95)
            base = copy.deepcopy(self.base)
            self.model = peft.PeftModel.from_pretrained(
                base, folder, is_trainable=True
            )
        self.model.to(self.device).eval()


class PEFTAdaLoRA(OnPEFT, contenders.PEFTAdaLoRA):
    """AdaLoRA as in `contenders.py`, with its penalty on every loss."""

    def penalty(self):
        import torch

        weight = self.model.peft_config["default"].orth_reg_weight
        total, number = 0.0, 0
        for A, B in zip(self.factors("A"), self.factors("B"), strict=True):
            for gram in (A @ A.T, B.T @ B):
                eye = torch.eye(len(gram), device=gram.device)
                total, number = total + torch.norm(gram - eye), number + 1
        return weight * total / number


# The bound of each layer, in deep models, until it was shared among all layers.
EARLIER = {"max_update_ratio": measuring.BOUND}
# Each with its options.
METHODS = {
    "untrained": (Untrained, {}),
    "geolora": (GeoLoRA, {}),
    "geolora, every step": (GeoLoRA, measuring.PAPER),
    "geolora, no bound": (GeoLoRA, {"max_update_ratio": None}),
    "geolora, bound 0.008": (GeoLoRA, EARLIER),
    "geolora, falling budget": (GeoLoRA, {"falling": 0.6}),
    "geolora, falling budget, bound 0.008": (
        GeoLoRA,
        EARLIER | {"falling": 0.6},
    ),
    "keras_lora": (KerasLoRA, {}),
    "peft_lora": (PEFTLoRA, {}),
    "peft_rslora": (PEFTLoRA, {"use_rslora": True}),
    "peft_dora": (PEFTLoRA, {"use_dora": True}),
    "peft_adalora": (PEFTAdaLoRA, {"scale": 1.0}),
    "peft_cut": (PEFTCut, {"times": 4}),
    "full": (Full, {}),
}

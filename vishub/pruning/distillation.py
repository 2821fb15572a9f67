"""Losses of pruning and of the fine-tuning after it, and the recipe that fine-tunes on the common training loop."""
import copy
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from vishub.models.nvit import NViT
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.recipe import Recipe

__all__ = ['DistilledRecipe', 'head_logits', 'label_loss', 'mean_logits', 'soft_kl']

Logits = Tuple[torch.Tensor, ...]  # (class head,) or (class head, distillation head), each (B, classes)


def head_logits(model: NViT, images: torch.Tensor) -> Logits:
    """Logits of each head apart, in either mode."""
    x, x_dist = model.pool(model.forward_features(images))
    return (model.head(x),) if model.head_dist is None else (model.head(x), model.head_dist(x_dist))


def mean_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the model answers: the mean over its heads."""
    return sum(logits[1:], logits[0]) / len(logits)


def label_loss(
        logits: Sequence[torch.Tensor],
        labels: torch.Tensor,
        teacher_labels: Optional[torch.Tensor] = None,
        alpha: float = 0.5,
) -> torch.Tensor:
    """Cross entropy of the mean logits with the labels and, given a CNN teacher's labels, of the distillation head.

    `(1 - alpha) * CE(mean, labels) + alpha * CE(distillation, teacher_labels)`. A model with one head uses it for
    both. The base loss takes the mean of both heads, as the official code does and DeiT does not.

    Args:
        logits: One or two tensors (B, classes).
        labels: Class indices (B,) or shares of classes (B, classes).
        teacher_labels: The teacher's class indices (B,).
        alpha: Weight of the teacher, 0..1.
    """
    loss = F.cross_entropy(mean_logits(logits), labels)
    if teacher_labels is None:
        return loss
    return (1 - alpha) * loss + alpha * F.cross_entropy(logits[-1], teacher_labels)


def soft_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of the softened answers, mean over the batch; no factor temperature ** 2.

    The official code takes the mean over batch and classes and weighs it by 1e5; with 1000 classes that is a weight
    of 100 here, and the weight does not depend on the number of classes.
    """
    return F.kl_div(
        F.log_softmax(student / temperature, dim=-1), F.log_softmax(teacher / temperature, dim=-1),
        log_target=True, reduction='batchmean')


class DistilledRecipe(Recipe):
    """Fine-tunes a pruned model on another recipe's data, taught by the unpruned model and, if given, a CNN.

    The loss is `label_loss` plus `kl_weight` times the mean over the heads of `soft_kl` at `temperature` (paper: 100
    in this scale, and 20). Run it with `vishub.training.train(DistilledRecipe(...), config)`.

    Args:
        student: The pruned model. Build it without drop rates: the official run keeps them off.
        recipe: Gives the data, its preparation and validation.
        teacher: The unpruned model; None leaves its term out.
        cnn_teacher: A model of images -> logits, whose top answers are labels for the distillation head.
        alpha: Weight of the CNN teacher's labels.
        kl_weight: Weight of the unpruned model's answers.
        temperature: Their softening.
    """

    def __init__(
            self,
            student: NViT,
            recipe: Recipe,
            teacher: Optional[NViT] = None,
            cnn_teacher: Optional[nn.Module] = None,
            alpha: float = 0.5,
            kl_weight: float = 100.,
            temperature: float = 20.,
    ) -> None:
        self.student = student
        self.recipe = recipe
        self.metric = recipe.metric
        self.teacher = copy.deepcopy(teacher).eval() if teacher is not None else None
        self.cnn_teacher = cnn_teacher.eval() if cnn_teacher is not None else None
        self.alpha, self.kl_weight, self.temperature = alpha, kl_weight, temperature

    def build_model(self) -> NViT:
        student = copy.deepcopy(self.student)
        student.set_distilled_training(student.distilled)  # both heads' logits, in train mode
        return student

    def train_set(self) -> Dataset:
        return self.recipe.train_set()

    @torch.no_grad()
    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[torch.Tensor, Any]:
        images, labels = self.recipe.prepare(batch, side, training)
        answers = teacher_labels = None
        if training and self.teacher is not None:
            answers = head_logits(self.teacher.to(images.device), images)
        if training and self.cnn_teacher is not None:
            teacher_labels = self.cnn_teacher.to(images.device)(images).argmax(dim=-1)
        return images, (labels, answers, teacher_labels)

    def loss(self, output: Any, targets: Any) -> torch.Tensor:
        labels, answers, teacher_labels = targets
        logits = output if isinstance(output, tuple) else (output,)
        loss = label_loss(logits, labels, teacher_labels, self.alpha)
        if answers is not None:
            if len(answers) != len(logits):
                logits, answers = (mean_logits(logits),), (mean_logits(answers),)
            terms = [soft_kl(ours, theirs, self.temperature) for ours, theirs in zip(logits, answers)]
            loss = loss + self.kl_weight * sum(terms) / len(terms)
        return loss

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        return self.recipe.validate(model, side, device)

    def describe(self) -> Dict[str, Any]:
        return {
            **self.recipe.describe(), 'dims': self.student.dims, 'alpha': self.alpha, 'kl_weight': self.kl_weight,
            'temperature': self.temperature, 'teacher': self.teacher is not None,
            'cnn_teacher': type(self.cnn_teacher).__name__ if self.cnn_teacher is not None else None,
        }

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> None:
        model.set_distilled_training(False)

"""Heads that a student keeps: on disk beside it, and what they answer, by their teachers' own post-processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.teachers.heads import Head, TeacherHead, ZeroShot

Sizes = Sequence[tuple[int, int]]  # (h, w) of each original image in px


def post_process(graft: Head, output: Any, sizes: Sizes, threshold: float = 0.5) -> list[Any]:
    """What a head's output means for each image, in the form of the transformers pipeline of its task.

    Args:
        output: what `graft` gave.
        sizes: (h, w) of the original images; boxes and masks are in their pixels.
        threshold: objects of a lower score are left out.

    Returns:
        Classification: ``[{label, score}]``, best first. Detection: ``[{label, score, box}]``. Segmentation:
        ``[{label, score, mask}]`` with masks (h, w) bool. Depth: ``{predicted_depth}`` (h, w).

    Raises:
        RecipeError: the head comes without the image processor that its task needs.
    """
    check_processor(graft)
    return answer_kind(graft)(graft, output, list(sizes), threshold)


def check_processor(graft: Head) -> None:
    """Refuse a head whose answers cannot be read for want of its teacher's image processor.

    Raises:
        RecipeError: with the ways out.
    """
    step = READ_WITH.get(answer_kind(graft))
    if step is not None and not hasattr(graft.processor, step):
        raise RecipeError(
            "this head has no preprocessor_config.json, which its post-processing needs, or none that loads here; "
            "add the teacher's, or install torchvision where it needs that"
        )


def answer_kind(graft: Head) -> Callable[..., list[Any]]:
    """The function of `ANSWERS` for a head."""
    name = type(graft.model).__name__
    return next(function for ending, function in ANSWERS.items() if name.endswith(ending))


def needs_prompts(head: Head) -> bool:
    """Whether a head takes points or boxes beside the image."""
    return answer_kind(head) is prompted


def task_of(graft: Head) -> str | None:
    """The task of `shoulders.tasks.TASKS` that a head answers, or None."""
    tasks: dict[Callable[..., list[Any]], str] = {
        classified: "classification",
        matched: "classification",
        detected: "detection",
        segmented: "semantic",
        instances: "instance",
    }
    return tasks.get(answer_kind(graft))


def classified(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Classes, the best five first, each by itself where several can be right; the threshold does not apply."""
    config = graft.model.config
    alone = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return _best(output.logits.sigmoid() if alone else output.logits.softmax(-1), graft.classes)


def matched(graft: ZeroShot, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Class names, the best five first; the threshold does not apply."""
    return _best(output.scores, output.classes)


def _best(scores: Tensor, names: Sequence[str]) -> list[Any]:
    """The five best of scores (B, K)."""
    top, kinds = scores.sort(descending=True, stable=True)
    pairs = [list(zip(row, which, strict=True))[:5] for row, which in zip(top.tolist(), kinds.tolist(), strict=True)]
    return [[{"label": names[kind], "score": score} for score, kind in row] for row in pairs]


def detected(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Objects with boxes."""
    found = graft.processor.post_process_object_detection(output, threshold=threshold, target_sizes=sizes)
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        [
            {"label": graft.label(kind), "score": score, "box": dict(zip(corners, box, strict=True))}
            for score, kind, box in zip(*(one[part].tolist() for part in ("scores", "labels", "boxes")), strict=True)
        ]
        for one in found
    ]


def segmented(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """A mask for each class that is there; the threshold does not apply."""
    maps = graft.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
    return [
        [{"label": graft.label(kind), "score": None, "mask": image == kind} for kind in image.unique().tolist()]
        for image in maps
    ]


def instances(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Objects with masks."""
    found = graft.processor.post_process_instance_segmentation(output, threshold=threshold, target_sizes=sizes)
    return [
        [
            {"label": graft.label(one["label_id"]), "score": one["score"], "mask": image["segmentation"] == one["id"]}
            for one in image["segments_info"]
        ]
        for image in found
    ]


def depths(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Depth of each pixel; the threshold does not apply."""
    found = graft.processor.post_process_depth_estimation(output, target_sizes=sizes)
    return [{"predicted_depth": one["predicted_depth"]} for one in found]


def prompted(graft: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """A mask for each prompt, the best of those that the head offers; the threshold does not apply."""
    best = output.iou_scores.argmax(-1)  # (B, P)
    told = []
    for masks, scores, which, size in zip(output.pred_masks, output.iou_scores, best, sizes, strict=True):
        chosen = masks[torch.arange(len(which)), which][:, None]  # (P, 1, H, W)
        full = torch.nn.functional.interpolate(chosen, size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        picked = scores[torch.arange(len(which)), which].tolist()
        told.append([{"label": None, "score": score, "mask": mask} for mask, score in zip(full, picked, strict=True)])
    return told


# end of the model's class name -> what its output means
ANSWERS: dict[str, Callable[..., list[Any]]] = {
    "ForImageClassification": classified,
    "ForObjectDetection": detected,
    "ForSemanticSegmentation": segmented,
    "ForUniversalSegmentation": instances,
    "ForInstanceSegmentation": instances,
    "ForDepthEstimation": depths,
    "SamModel": prompted,
    "Sam2Model": prompted,
    "CLIPModel": matched,
    "SiglipModel": matched,
    "Siglip2Model": matched,
}


# what needs a step of the image processor
READ_WITH: dict[Callable[..., list[Any]], str] = {
    detected: "post_process_object_detection",
    segmented: "post_process_semantic_segmentation",
    instances: "post_process_instance_segmentation",
    depths: "post_process_depth_estimation",
}

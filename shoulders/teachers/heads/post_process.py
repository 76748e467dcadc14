"""From a head's output to classes, boxes and masks, by the post-processing of its teacher's own image processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.teachers.heads import ClassScores, Head, ModuleHead, TeacherHead, ZeroShot
from shoulders.teachers.heads.whole import WholeModel

Sizes = Sequence[tuple[int, int]]  # (h, w) of each original image in px


def post_process(head: Head, output: Any, sizes: Sizes, threshold: float = 0.5) -> list[Any]:
    """A head's predictions for each image, in the form of the transformers pipeline of its task.

    Args:
        head: the head.
        output: its output.
        sizes: (h, w) of the original images; boxes and masks are in their pixels.
        threshold: objects of a lower score are left out.

    Returns:
        Classification: ``[{label, score}]``, best first. Detection: ``[{label, score, box}]``. Segmentation:
        ``[{label, score, mask}]`` with masks (h, w) bool. Depth: ``{predicted_depth}`` (h, w).

    Raises:
        RecipeError: the head has no image processor, and its task needs one.
    """
    check_processor(head)
    return _post_processor(head)(head, output, list(sizes), threshold)


def check_processor(head: Head | WholeModel) -> None:
    """Refuse a head whose predictions cannot be computed because it lacks its teacher's image processor.

    Raises:
        RecipeError: the message says how to add one.
    """
    method = PROCESSOR_METHODS.get(_post_processor(head))
    if method is not None and not hasattr(head.processor, method):
        raise RecipeError(
            "this head has no preprocessor_config.json, which its post-processing needs, or none that loads here; "
            "add the teacher's, or install torchvision where it needs that"
        )


def needs_prompts(head: Head) -> bool:
    """Whether a head takes points or boxes beside the image."""
    return _post_processor(head) is to_prompted_masks


def _post_processor(head: Head | WholeModel) -> Callable[..., list[Any]]:
    """The function of `POST_PROCESSORS`, or `MODULE_POST_PROCESSORS`, for a head."""
    if isinstance(head, ModuleHead):
        return MODULE_POST_PROCESSORS[head.task]
    return next(function for ending, function in POST_PROCESSORS.items() if head.class_name.endswith(ending))


def to_classes(head: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """The five best classes, each scored by itself where several can be right; the threshold does not apply."""
    config = head.model.config
    independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return _best(output.logits.sigmoid() if independent else output.logits.softmax(-1), head.classes)


def to_scored_names(
    head: ZeroShot | ModuleHead, output: ClassScores, sizes: list[tuple[int, int]], threshold: float
) -> list[Any]:
    """The five classes of highest score; the threshold does not apply."""
    return _best(output.scores, output.classes)


def _best(scores: Tensor, names: Sequence[str]) -> list[Any]:
    """The five best of scores (B, K), best first."""
    values, indices = scores.sort(descending=True, stable=True)
    predictions = []
    for row, classes in zip(values.tolist(), indices.tolist(), strict=True):
        pairs = list(zip(row, classes, strict=True))[:5]
        predictions.append([{"label": names[index], "score": score} for score, index in pairs])
    return predictions


def to_boxes(head: TeacherHead | ModuleHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Objects with boxes."""
    images = head.processor.post_process_object_detection(output, threshold=threshold, target_sizes=sizes)
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        [
            {"label": head.label(index), "score": score, "box": dict(zip(corners, box, strict=True))}
            for score, index, box in zip(*(image[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
        ]
        for image in images
    ]


def to_class_masks(
    head: TeacherHead | ModuleHead, output: Any, sizes: list[tuple[int, int]], threshold: float
) -> list[Any]:
    """A mask for each class in the image; the threshold does not apply."""
    maps = head.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
    return [
        [{"label": head.label(index), "score": None, "mask": image == index} for index in image.unique().tolist()]
        for image in maps
    ]


def to_instance_masks(head: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Objects with masks."""
    images = head.processor.post_process_instance_segmentation(output, threshold=threshold, target_sizes=sizes)
    return [
        [
            {
                "label": head.label(segment["label_id"]),
                "score": segment["score"],
                "mask": image["segmentation"] == segment["id"],
            }
            for segment in image["segments_info"]
        ]
        for image in images
    ]


def to_binary_masks(head: ModuleHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """Objects with masks that may overlap."""
    images = head.processor.post_process_instance_segmentation(output, threshold=threshold, target_sizes=sizes)
    return [
        [
            {"label": head.label(segment["label_id"]), "score": segment["score"], "mask": mask}
            for segment, mask in zip(image["segments_info"], image["segmentation"], strict=True)
        ]
        for image in images
    ]


def to_depth(head: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """The depth of each pixel; the threshold does not apply."""
    images = head.processor.post_process_depth_estimation(output, target_sizes=sizes)
    return [{"predicted_depth": image["predicted_depth"]} for image in images]


def to_prompted_masks(head: TeacherHead, output: Any, sizes: list[tuple[int, int]], threshold: float) -> list[Any]:
    """The best mask of the head for each prompt; the threshold does not apply."""
    best = output.iou_scores.argmax(-1)  # (B, P)
    predictions = []
    for masks, scores, indices, size in zip(output.pred_masks, output.iou_scores, best, sizes, strict=True):
        prompts = torch.arange(len(indices))
        chosen = masks[prompts, indices][:, None]  # (P, 1, H, W)
        full = torch.nn.functional.interpolate(chosen, size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        pairs = zip(full, scores[prompts, indices].tolist(), strict=True)
        predictions.append([{"label": None, "score": score, "mask": mask} for mask, score in pairs])
    return predictions


# end of the model's class name -> how its output becomes predictions
POST_PROCESSORS: dict[str, Callable[..., list[Any]]] = {
    "ForImageClassification": to_classes,
    "ForImageClassificationWithTeacher": to_classes,
    "ForObjectDetection": to_boxes,
    "ForSemanticSegmentation": to_class_masks,
    "ForUniversalSegmentation": to_instance_masks,
    "ForInstanceSegmentation": to_instance_masks,
    "ForDepthEstimation": to_depth,
    "SamModel": to_prompted_masks,
    "Sam2Model": to_prompted_masks,
    "CLIPModel": to_scored_names,
    "SiglipModel": to_scored_names,
    "Siglip2Model": to_scored_names,
}

# task of a head of your own -> how its output becomes predictions
MODULE_POST_PROCESSORS: dict[str, Callable[..., list[Any]]] = {
    "classification": to_scored_names,
    "semantic": to_class_masks,
    "detection": to_boxes,
    "instance": to_binary_masks,
}

# the method of the image processor that a function needs
PROCESSOR_METHODS: dict[Callable[..., list[Any]], str] = {
    to_boxes: "post_process_object_detection",
    to_class_masks: "post_process_semantic_segmentation",
    to_instance_masks: "post_process_instance_segmentation",
    to_depth: "post_process_depth_estimation",
}

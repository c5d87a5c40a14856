"""Rows that detectors use: choosing boxes, and pooling inside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import scalar

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


def _corners(boxes: Tensor, center: int) -> Tensor:
    """Boxes [n, 4] as low and high corners."""
    if center:
        middle, half = boxes[:, :2], boxes[:, 2:] / 2
        return torch.cat([middle - half, middle + half], 1)
    return torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box [4] with others [n, 4]."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    common = (high - low).clamp(0).prod(1)
    return common / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common)


@op("NonMaxSuppression", since=10, host=(2, 3, 4))
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Rows (batch, class, box), best first within a class; of boxes that overlap only the best stays."""
    limit = 0 if max_output_boxes_per_class is None else int(scalar(max_output_boxes_per_class))
    most = 0.0 if iou_threshold is None else scalar(iou_threshold)
    chosen = []
    for batch in range(scores.shape[0]):
        corners = _corners(boxes[batch].detach(), center_point_box)
        for label in range(scores.shape[1]):
            values = scores[batch, label].detach()
            left = torch.argsort(values, descending=True, stable=True)
            left = left if score_threshold is None else left[values[left] > scalar(score_threshold)]
            kept = 0
            while len(left) and kept < limit:
                chosen.append([batch, label, int(left[0])])
                kept += 1
                left = left[1:][_overlap(corners[left[0]], corners[left[1:]]) <= most]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _averages(values: Mapping[str, Any]) -> str | None:
    return "mode max, which ONNX defines by parts of samples" if values.get("mode", "avg") != "avg" else None


@op("RoiAlign", check=_averages)
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str | None = None,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
    opset: int,
) -> Tensor:
    """Each box [left, top, right, bottom] is cut into bins, each bin is sampled at some points and averaged.

    Before opset 16 no shift by half a pixel.
    """
    default = "half_pixel" if opset >= 16 else "output_half_pixel"
    shift = 0.5 if (coordinate_transformation_mode or default) == "half_pixel" else 0.0
    pooled = []
    for roi, image in zip(rois * spatial_scale - shift, x[batch_indices.long()], strict=True):
        lengths = roi[2:] - roi[:2] if shift else (roi[2:] - roi[:2]).clamp(min=1.0)
        axes = []
        for place, bins in ((1, output_height), (0, output_width)):
            count = sampling_ratio or int(torch.ceil(lengths[place] / bins))
            steps = (torch.arange(bins * count, device=x.device) + 0.5) / count
            axes.append((roi[place] + steps * lengths[place] / bins, count))
        (y, rows), (z, columns) = axes
        samples = _bilinear(image, y, z).unflatten(1, (output_height, rows)).unflatten(3, (output_width, columns))
        pooled.append(samples.mean((2, 4)))
    return torch.stack(pooled)


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """image [c, h, w] at the grid of places y and x: [c, len(y), len(x)]; places more than 1 outside give 0."""
    height, width = image.shape[1:]
    inside = ((y >= -1) & (y <= height))[:, None] & ((x >= -1) & (x <= width))
    grid = torch.stack(torch.meshgrid(*(_unit(x, width), _unit(y, height))[::-1], indexing="ij")[::-1], -1)
    return F.grid_sample(image[None], grid[None], align_corners=True, padding_mode="border")[0] * inside


def _unit(places: Tensor, length: int) -> Tensor:
    """Places from 0 to length - 1 as -1 to 1."""
    return places.clamp(0, length - 1) * 2 / max(length - 1, 1) - 1

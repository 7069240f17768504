"""Matching, SSD's loss and mAP against float64 written out and torchvision's; the models."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.detector_heads import DetectorHeads
from disco.errors import InputError
from disco.executor import Executor, InProcessHub, run_together
from disco.partition import build_all, decide
from disco.small_models.detectors import grid_anchors
from disco.tasks import Detection, DistillOptions, LossOptions, task_named
from disco.tasks.boxes import MATCH_IOU, decode, encode, iou, match, padded, suppress
from disco.tasks.mean_average_precision import MeanAveragePrecision, detect
from disco.torchvision_compat import import_torchvision
from disco.zoo import build_model
from tests.tasks.small_boxes import random_boxes, target

TASK = Detection()
CLASSES = 5
ANCHORS = grid_anchors((6, 3), (0.2, 0.4, 0.8), 48)


def _part(name: str) -> Any:
    import_torchvision()
    return importlib.import_module(f"torchvision.models.detection.{name}")


def _targets(counts: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        target(
            random_boxes(count, generator),
            torch.randint(0, CLASSES, (count,), generator=generator).tolist(),
            [0] if count > 3 else [],
        )
        for count in counts
    ]


def _outputs(images: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, len(ANCHORS), CLASSES + 1, generator=generator)
    return logits, torch.randn(images, len(ANCHORS), 4, generator=generator), ANCHORS


def test_anchors_are_torchvisions() -> None:
    scales = (0.2, 0.4, 0.8)
    generator = _part("anchor_utils").DefaultBoxGenerator([[2], [2]], scales=list(scales))
    images = _part("image_list").ImageList(torch.zeros(1, 3, 48, 48), [(48, 48)])
    (theirs,) = generator(images, [torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 3, 3)])
    # There, the larger square is the second of a cell's four.
    ours = ANCHORS.reshape(-1, 4, 4)[:, [0, 3, 1, 2]].reshape(-1, 4)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_matching_is_torchvisions() -> None:
    targets = _targets([0, 1, 3, 9, 6])
    boxes, labels, there = padded(targets)
    assert boxes.shape == (5, 8, 4) and there.sum(1).tolist() == [0, 1, 3, 8, 5]
    found = match(boxes, there, ANCHORS)
    box_iou, matcher = import_torchvision().ops.box_iou, _part("_utils").SSDMatcher(MATCH_IOU)
    for image, wanted in enumerate(targets):
        kept = wanted["boxes"][~wanted["ignored"]]
        assert torch.equal(boxes[image, : len(kept)], kept)
        assert torch.equal(labels[image, : len(kept)], wanted["labels"][~wanted["ignored"]])
        if not len(kept):
            assert (found[image] == -1).all()
            continue
        quality = box_iou(kept, ANCHORS)
        assert torch.allclose(iou(kept, ANCHORS), quality, rtol=0, atol=1e-6)
        if len(quality.argmax(1).unique()) == len(kept):
            assert torch.equal(found[image], matcher(quality).clamp(min=-1))
    # Two objects whose best anchor is the same: the later one has it.
    same = match(ANCHORS[None, [7, 7, 3]], torch.ones(1, 3, dtype=torch.bool), ANCHORS)
    assert same[0, 7] == 1 and same[0, 3] == 2


def test_offsets_and_boxes_are_inverse() -> None:
    boxes = random_boxes(len(ANCHORS), torch.Generator().manual_seed(0))
    assert torch.allclose(decode(encode(boxes, ANCHORS), ANCHORS), boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_torchvisions(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_boxes(60, generator) for _ in range(4)])
    labels = torch.randint(0, 3, (4, 60), generator=generator)
    there = torch.arange(60) < torch.tensor([60, 31, 1, 0])[:, None]
    kept = suppress(boxes, labels, there, threshold)
    scores = torch.arange(60, 0, -1).float()
    for image, count in enumerate((60, 31, 1, 0)):
        expected = import_torchvision().ops.batched_nms(
            boxes[image, :count], scores[:count], labels[image, :count], threshold
        )
        assert kept[image].nonzero().flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("counts", [[4, 0, 1], [0, 0], [12]])
def test_the_loss_is_ssds(counts: list[int], smoothing: float) -> None:
    targets, outputs = _targets(counts), _outputs(len(counts))
    exact = _exact_loss(*outputs, targets, smoothing)
    logits = outputs[0].requires_grad_()
    loss = TASK.loss((logits, *outputs[1:]), targets, LossOptions(smoothing))
    # Sums of some hundred terms of up to about 10, each off by an epsilon or two.
    assert abs(float(loss.detach()) - exact) <= 1e-5 * max(1.0, exact)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert bool(logits.grad.any()) == any(counts)


def _exact_loss(
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    targets: list[dict[str, Tensor]],
    smoothing: float,
) -> float:
    """Image by image, anchor by anchor, in float64."""
    total, matched = 0.0, 0
    boxes, _, there = padded(targets)
    which = match(boxes, there, anchors)
    for image, wanted in enumerate(targets):
        kept = ~wanted["ignored"]
        names, places = wanted["labels"][kept], wanted["boxes"][kept].double()
        surprise = []
        for anchor, number in enumerate(which[image].tolist()):
            log = logits[image, anchor].detach().double().log_softmax(0)
            label = 0 if number < 0 else int(names[number]) + 1
            error = -(1 - smoothing) * log[label] - smoothing * log.mean()
            if number < 0:
                surprise.append(float(error))
                continue
            total, matched = total + float(error), matched + 1
            a, b = anchors[anchor].double(), places[number]
            centre, side = (a[:2] + a[2:]) / 2, a[2:] - a[:2]
            shift = 10 * ((b[:2] + b[2:]) / 2 - centre) / side
            growth = 5 * ((b[2:] - b[:2]) / side).log()
            off = (offsets[image, anchor].double() - torch.cat((shift, growth))).abs()
            total += float(torch.where(off < 1, off**2 / 2, off - 0.5).sum())
        positives = int((which[image] >= 0).sum())
        total += sum(sorted(surprise, reverse=True)[: 3 * positives])
    return total / max(1, matched)


def test_distillation() -> None:
    student, teacher = _outputs(3), _outputs(3, seed=2)
    teacher[0][..., 0] += 8  # mostly background, as it is
    t = 2.0
    p, q = ((x[0].double() / t).softmax(-1) for x in (teacher, student))
    seen = teacher[0].argmax(-1) > 0
    assert 0 < int(seen.sum()) < seen.numel() / 4
    off = (student[1].double() - teacher[1].double()).abs()[seen]
    distance = torch.where(off < 1, off**2 / 2, off - 0.5).sum()
    exact = float(((p * (p / q).log()).sum() * t**2 + distance) / seen.sum())
    found = float(TASK.distillation(student, teacher, DistillOptions(t)))
    assert abs(found - exact) <= 1e-5 * exact
    assert float(TASK.distillation(teacher, teacher, DistillOptions(t))) == 0.0
    teacher[0][..., 0] += 100
    assert TASK.distillation(student, teacher, DistillOptions(t)).isfinite()


def _perfect(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that say exactly what the targets do, by an anchor an object."""
    logits = torch.zeros(len(targets), len(ANCHORS), CLASSES + 1)
    logits[..., 0] = 30.0
    offsets = torch.zeros(len(targets), len(ANCHORS), 4)
    for image, wanted in enumerate(targets):
        for number, (box, label) in enumerate(zip(wanted["boxes"], wanted["labels"], strict=True)):
            logits[image, number, int(label) + 1] = 60.0
            offsets[image, number] = encode(box[None], ANCHORS[number, None])[0]
    return logits, offsets, ANCHORS


# Apart, so that none suppresses another.
_APART = torch.tensor([[0.0, 0, 9, 12], [20, 2, 44, 15], [3, 20, 14, 47], [22, 25, 30, 33]])


def test_perfect_outputs_have_an_map_of_1() -> None:
    targets = [
        target(_APART, [0, 1, 1, 4]),
        target(_APART[:1], [2]),
        target(torch.zeros(0, 4), []),
        target(_APART[1:3], [0, 0]),
    ]
    meter = TASK.new_meter(tuple("abcde"))
    outputs = _perfect(targets)
    meter.update(tuple(part[:2] if part is not ANCHORS else part for part in outputs), targets[:2])
    meter.update(tuple(part[2:] if part is not ANCHORS else part for part in outputs), targets[2:])
    assert meter.value() == pytest.approx(1.0, abs=1e-6)
    assert meter.others() == pytest.approx({"mAP50": 1.0, "mAP75": 1.0}, abs=1e-6)


def test_what_lies_on_objects_to_ignore_costs_nothing() -> None:
    for ignored, worse in (([3], False), ([], True)):
        targets = [target(_APART, [0, 0, 0, 0], ignored)]
        logits, offsets, anchors = _perfect(targets)
        meter = TASK.new_meter(())
        logits[0, 1, 0] = logits[0, 2, 0] = 61.0  # found, but less surely than the last
        meter.update((logits, offsets, anchors), targets)
        found = meter.value()
        moved = [target(torch.cat((_APART[:3], _APART[3:] + 10)), [0, 0, 0, 0], ignored)]
        missed = TASK.new_meter(())
        missed.update((logits, offsets, anchors), moved)
        assert found > 0.99 and missed.value() < 0.9, (found, missed.value(), worse)


def test_numbers_that_are_none_are_no_detections() -> None:
    targets = [target(_APART, [0, 1, 2, 3])]
    logits, offsets, anchors = _perfect(targets)
    logits[0, 5], offsets[0, 1] = float("nan"), float("nan")
    found = detect(logits, offsets, anchors)[0]
    assert sorted(found["labels"].tolist()) == [0, 2, 3]
    logits[:] = float("nan")
    assert len(detect(logits, offsets, anchors)[0]["boxes"]) == 0
    meter = TASK.new_meter(())
    meter.update((logits, offsets, anchors), targets)
    assert meter.value() == 0.0


def test_no_objects_at_all() -> None:
    targets = [target(torch.zeros(0, 4), [])] * 2
    assert TASK.loss(_outputs(2), targets, LossOptions()) == 0.0
    meter = TASK.new_meter(())
    meter.update(_outputs(2), targets)
    assert meter.value() == 0.0


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_map_is_cocos(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its definition in float64: precision at 101 recalls, over thresholds and classes."""
    from disco.tasks import mean_average_precision as module

    monkeypatch.setattr(module, "_BACKENDS", (backend,))
    targets, generator = _targets([3, 1, 2, 3, 0, 3] * 3), torch.Generator().manual_seed(5)
    found = []
    for wanted in targets:
        near = wanted["boxes"] + 2 * torch.randn(len(wanted["boxes"]), 4, generator=generator)
        boxes = torch.cat((near, random_boxes(2, generator)))
        labels = torch.cat((wanted["labels"], torch.randint(0, CLASSES, (2,), generator=generator)))
        scores = torch.rand(len(boxes), generator=generator).sort(descending=True).values
        found.append({"boxes": boxes, "labels": labels, "scores": scores})
    meter = MeanAveragePrecision()
    meter.update(found, targets)
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    exact = [
        sum(_average_precision(found, targets, c, t) for c in range(CLASSES)) / CLASSES
        for t in thresholds
    ]
    assert 0.1 < sum(exact) / 10 < 0.9
    assert meter.value() == pytest.approx(sum(exact) / 10, abs=1e-6)
    assert meter.others()["mAP50"] == pytest.approx(exact[0], abs=1e-6)
    assert meter.others()["mAP75"] == pytest.approx(exact[5], abs=1e-6)


def _average_precision(found: Any, targets: Any, label: int, threshold: float) -> float:
    marks, wanted = [], 0
    for image, truth in zip(found, targets, strict=True):
        left = truth["boxes"][truth["labels"] == label].double()
        wanted += len(left)
        free = torch.ones(len(left), dtype=torch.bool)
        for box, name, score in zip(image["boxes"], image["labels"], image["scores"], strict=True):
            if int(name) != label:
                continue
            overlap = torch.where(free, iou(box[None].double(), left)[0], -1.0)
            hit = len(left) > 0 and float(overlap.max()) >= threshold
            if hit:
                free[overlap.argmax()] = False
            marks.append((float(score), hit))
    marks.sort(reverse=True)
    precision, recall, hits = [], [], 0
    for number, (_, hit) in enumerate(marks, 1):
        hits += hit
        precision.append(hits / number)
        recall.append(hits / wanted)
    total = 0.0
    for point in np.linspace(0, 1, 101).tolist():
        total += max((p for p, r in zip(precision, recall, strict=True) if r >= point), default=0.0)
    return total / 101


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    for absent, said in (
        (("torchmetrics",), "pip install torchmetrics"),
        (("faster_coco_eval", "pycocotools"), "pip install pycocotools"),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, a=absent: None if n in a else real(n)
        )
        with pytest.raises(InputError, match=said):
            TASK.new_meter(())


@pytest.mark.parametrize(
    "outputs",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(4, 4)),
        {"out": torch.ones(1)},
        3,
    ],
)
def test_outputs_that_are_none_of_a_detector_are_refused(outputs: object) -> None:
    with pytest.raises(InputError, match="in place of class logits .* choose ssd_small"):
        TASK.loss(outputs, _targets([1, 1]), LossOptions())


@torch.no_grad()
@pytest.mark.parametrize("name", ["ssd_small-w8", "vit_ssd_small-w32"])
def test_small_detectors_are_cut_exactly(name: str) -> None:
    model = TASK.build_model("disco", name, CLASSES, 32, seed=1)
    x = torch.randn(3, 3, 32, 32)
    disco.sparsify_(model, 4, 0.25, (x,))
    captured = capture(model, (x,))
    anchors = model.anchors.clone()
    exact = model.double()(x.double())
    assert exact[0].shape == (3, len(anchors), CLASSES + 1)
    for nodes in (2, 4):
        plan, ranks = build_all(decide(*captured, nodes))
        executors = [Executor(rank.program, rank.weights) for rank in ranks]
        transports = InProcessHub(nodes).transports()
        for logits, offsets, third in run_together(executors, (x,), transports):
            for a, b in ((logits, exact[0]), (offsets, exact[1])):
                assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())
            assert torch.equal(third, anchors)
        # The anchors are known to every node.
        sent = sum(transport.bytes_sent for transport in transports)
        assert sent == len(x) * plan.bytes_per_image
    assert "anchors" not in model.state_dict()


def test_detectors_by_name() -> None:
    assert isinstance(task_named("detection"), Detection)
    for name in ("ssd_small", "vit_ssd_small"):
        for size in (40, 48, 96):
            logits, offsets, anchors = TASK.build_model("disco", name, 3, size, seed=0)(
                torch.zeros(2, 3, size, size)
            )
            assert logits.shape == (2, len(anchors), 4) and offsets.shape == (2, len(anchors), 4)
            centres = (anchors[:, :2] + anchors[:, 2:]) / 2
            assert bool((centres > 0).all()) and bool((centres < size).all())


@torch.no_grad()
def test_the_network_in_an_ssd_of_torchvision() -> None:
    name = "ssdlite320_mobilenet_v3_large"
    detector = build_model("torchvision", name, num_classes=CLASSES + 1, seed=3)
    heads = TASK.build_model("torchvision", f"{name}:heads", CLASSES, 320, seed=3)
    assert list(heads.state_dict()) == list(detector.state_dict())
    x = torch.rand(2, 3, 320, 320)
    logits, offsets, anchors = heads(2 * x - 1)  # as the detector normalises images
    assert logits.shape == (2, len(anchors), CLASSES + 1)
    features = list(detector.backbone(2 * x - 1).values())
    head = detector.head(features)
    assert torch.equal(logits, head["cls_logits"])
    assert torch.equal(offsets, head["bbox_regression"])
    images = _part("image_list").ImageList(x, [(320, 320)] * 2)
    assert torch.equal(detector.anchor_generator(images, features)[0], anchors)
    loss = TASK.loss((logits, offsets, anchors), _targets([2, 3]), LossOptions())
    assert loss.isfinite()


def test_other_detectors_of_torchvision_are_refused() -> None:
    import_torchvision()
    with pytest.raises(InputError, match="Identity do not have SSD's form"):
        DetectorHeads(nn.Identity(), 320)
    with pytest.raises(InputError, match=r"no model 'ssd301': did you mean"):
        TASK.build_model("torchvision", "ssd301:heads", 3, 320, seed=0)


@pytest.mark.slow
def test_a_size_that_an_ssd_of_torchvision_cannot_have() -> None:
    with pytest.raises(InputError, match="cannot be used on images of 16 x 16 pixels"):
        TASK.build_model("torchvision", "ssd300_vgg16:heads", 3, 16, seed=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize(
    ("name", "size"), [("ssd300_vgg16", 300), ("ssdlite320_mobilenet_v3_large", 320)]
)
def test_ssds_of_torchvision_are_cut_exactly(name: str, size: int, nodes: int) -> None:
    model = TASK.build_model("torchvision", f"{name}:heads", CLASSES, size, seed=1)
    x = torch.randn(1, 3, size, size)
    pattern = disco.sparsify_(model, nodes, 0.2, (x,))
    exact = model(x)
    found = disco.partition(model, (x,), nodes, pattern=pattern)(x)
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())

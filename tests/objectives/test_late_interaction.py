"""Late interaction against loops over patches and tokens, its memory, and that matched targets cannot collapse."""

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emkum.errors import UserError
from emkum.objectives import build_objectives, objective_configs, required
from emkum.objectives.base import Objective
from emkum.objectives.late_interaction import (
    Tokens,
    late_interaction,
    late_interaction_scores,
    match_tokens,
    random_projection,
    select_tokens,
)
from emkum.outputs import Batch, ModalityOutput, StudentOutput, TeacherOutput
from tests.objectives.cases import SETTING, make_case, part_of, with_gradients

IMAGES = 4


def build(name: str, **options: object) -> Objective:
    torch.manual_seed(0)
    return build_objectives([name], {f"{name}_{key}": value for key, value in options.items()}, SETTING)[name].double()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def naive_scores(patches: Tensor, words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Both scores of one image's patches (N, D) and one caption's words."""
    if not words:
        return patches.sum() * 0, patches.sum() * 0
    table = [[cosine(patch, word) for word in words] for patch in patches]
    i2t = sum(max(row) for row in table) / len(table)
    t2i = sum(max(row[j] for row in table) for j in range(len(words))) / len(words)
    return i2t, t2i


def words_of(tokens: Tensor, special: Tensor) -> list[Tensor]:
    return [token for token, hidden in zip(tokens, special.tolist(), strict=True) if not hidden]


def naive_contrast(scores: list[list[Tensor]], own: list[int], other: list[int], scale: Tensor) -> Tensor:
    losses = []
    for row, mine in zip(scores, own, strict=True):
        exponentials = [(scale * score).exp() for score in row]
        shares = [-(e / sum(exponentials)).log() for e, id_ in zip(exponentials, other, strict=True) if id_ == mine]
        losses.append(sum(shares) / len(shares))
    return sum(losses) / len(losses)


def naive_cmli(objective: Objective, student: StudentOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses image to text and text to image."""
    image_tokens, text_tokens = student.image.tokens[:, 1:], student.text.tokens
    if objective.image_projection is not None:
        image_tokens = image_tokens @ objective.image_projection.weight.T + objective.image_projection.bias
        text_tokens = text_tokens @ objective.text_projection.weight.T + objective.text_projection.bias
    captions = [words_of(tokens, hidden) for tokens, hidden in zip(text_tokens, batch.special, strict=True)]
    pairs = [[naive_scores(patches, words) for words in captions] for patches in image_tokens]
    ids, owners = batch.image_ids.tolist(), batch.caption_image.tolist()
    text_ids, scale = [ids[owner] for owner in owners], objective.scale.log_scale.exp()
    i2t = naive_contrast([[pair[0] for pair in row] for row in pairs], ids, text_ids, scale)
    columns = [[pairs[image][text][1] for image in range(len(ids))] for text in range(len(captions))]
    return i2t, naive_contrast(columns, text_ids, ids, scale)


def gradients_of(objective: Objective, leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    found = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return found | {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("dim", [0, 5])
def test_cmli_against_naive_reference(dim: int, chunk: int) -> None:
    """Two captions an image, an image twice, padding, and one caption without any word."""
    student, _, batch = make_case(IMAGES)
    batch.special[3] = True
    student, leaves = with_gradients(student)
    objective = build("cmli", dim=dim, chunk=chunk).train()
    out = objective(student, None, batch)
    i2t, t2i = naive_cmli(objective, student, batch)
    torch.testing.assert_close(out.loss, (i2t + t2i) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.metrics["i2t_loss"], i2t.detach())
    torch.testing.assert_close(out.metrics["t2i_loss"], t2i.detach())
    ours = gradients_of(objective, leaves, out.loss)
    theirs = gradients_of(objective, leaves, (i2t + t2i) / 2)
    assert {"image.tokens", "text.tokens", "scale.log_scale"} <= ours.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    single = build("cmli", dim=dim, chunk=chunk).float()
    text, image = (replace(part, tokens=part.tokens.detach().float()) for part in (student.text, student.image))
    loss = single(replace(student, text=text, image=image), None, batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), out.loss, rtol=1e-4, atol=1e-4)


def test_chunks_change_neither_value_nor_gradient() -> None:
    results = []
    for chunk in (0, 1, 3, IMAGES, 100):
        student, leaves = with_gradients(make_case(IMAGES)[0])
        objective = build("cmli", chunk=chunk)
        loss = objective(student, None, make_case(IMAGES)[2]).loss
        results.append({"loss": loss.detach()} | gradients_of(objective, leaves, loss))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it that are still held, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def released() -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.finalize(storage, released)
        self.now += size
        self.peak = max(self.peak, self.now)


def held_bytes(images: int, chunk: int) -> tuple[int, int]:
    """Of CMLI on `images` images of 16 patches and as many captions of 8 tokens: held for the backward, and the peak
    of forward and backward."""
    patches, texts = torch.randn(images, 16, 4).requires_grad_(), torch.randn(images, 8, 4).requires_grad_()
    special = torch.zeros(images, 8, dtype=torch.bool)
    with LiveBytes() as live:
        scores = late_interaction(patches, texts, special, chunk)
        loss = (scores.image_to_text + scores.text_to_image).diagonal().sum()
        held = live.now
        loss.backward()
    return held, live.peak


def test_memory_grows_with_the_chunk_and_not_with_all_pairs() -> None:
    torch.manual_seed(0)
    table = 4 * 16 * 8
    full_held, full_peak = held_bytes(64, 0)
    # Without chunks, what is held and what is at work do hold the similarities of all tokens: the probe sees them.
    assert full_peak > 64 * 64 * table
    small_held, small_peak = held_bytes(32, 2)
    held, peak = held_bytes(64, 2)
    assert full_peak > 8 * peak
    # Beside the inputs and outputs a few tables of one chunk: twice the captions, twice the memory.
    assert peak < 2.6 * small_peak
    assert peak < 8 * 2 * 64 * table
    # For the backward pass no table is held at all.
    assert held < 64 * 64 * table / 16 and held < full_held / 8
    assert held_bytes(64, 8)[1] > 2 * peak


def test_evaluation_scores_equal_those_of_training() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(5, 7, 4).double(), torch.randn(6, 3, 4).double().requires_grad_()
    special = torch.rand(6, 3) < 0.4
    special[2] = True
    want = late_interaction(images, texts, special)
    for chunk, text_chunk in ((1, 1), (2, 4), (5, 6), (99, 99)):
        scores = late_interaction_scores(images, texts, special, chunk, text_chunk)
        assert not scores.image_to_text.requires_grad
        torch.testing.assert_close(scores.image_to_text, want.image_to_text.detach())
        torch.testing.assert_close(scores.text_to_image, want.text_to_image.detach())


def test_a_caption_without_words_and_an_empty_batch_of_them_are_finite() -> None:
    student, teacher, batch = make_case(IMAGES)
    batch.special[:] = True
    for name in ("cmli", "target_cmli"):
        student, leaves = with_gradients(student)
        objective = build(name)
        out = objective(student, teacher, batch)
        gradients = gradients_of(objective, leaves, out.loss)
        assert out.loss.isfinite() and all(value.isfinite() for value in out.metrics.values())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    # All scores are 0, so that of an image's captions each is as good as any.
    loss = build("cmli")(student, None, replace(batch, image_ids=torch.arange(IMAGES))).metrics["t2i_loss"]
    assert loss.item() == pytest.approx(math.log(IMAGES))


@pytest.mark.parametrize("name", ["cmli", "target_cmli"])
def test_special_tokens_and_padding_do_not_count(name: str) -> None:
    student, teacher, batch = make_case(IMAGES)
    objective = build(name).eval()
    want = objective(student, teacher, batch).loss
    tokens = torch.where(batch.special[..., None], 1e3, student.text.tokens)
    more = torch.nn.functional.pad(tokens, (0, 0, 0, 3), value=7.0)
    longer = replace(student, text=replace(student.text, tokens=more))
    special = torch.nn.functional.pad(batch.special, (0, 3), value=True)
    torch.testing.assert_close(objective(longer, teacher, replace(batch, special=special)).loss, want)
    image = student.image.tokens.clone()
    image[:, 0] = 1e3
    changed = replace(student, image=replace(student.image, tokens=image))
    torch.testing.assert_close(objective(changed, teacher, batch).loss, want)
    with pytest.raises(UserError, match=f"objective {name} must know which tokens are special"):
        objective(student, teacher, replace(batch, special=None))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_selection_of_tokens_against_sorting(fraction: float) -> None:
    torch.manual_seed(0)
    features, importance, special = torch.randn(6, 10, 2), torch.rand(6, 10), torch.rand(6, 10) < 0.4
    special[5] = True
    chosen = select_tokens(features, special, importance, fraction)
    assert chosen.features.shape[1] == math.ceil(fraction * 10)
    for row in range(6):
        places = [i for i in range(10) if not special[row, i]]
        places = sorted(places, key=lambda i: -importance[row, i].item())[: math.ceil(fraction * len(places))]
        kept = words_of(chosen.features[row], chosen.special[row])
        assert [k.tolist() for k in kept] == [features[row, i].tolist() for i in places]


def test_top_fraction_keeps_what_the_cls_token_attends_to() -> None:
    student, _, batch = make_case(IMAGES)
    assert required(objective_configs(["cmli"], {"cmli_top_fraction": 0.5})).cls_attention
    assert not required(objective_configs(["cmli"], {})).cls_attention
    objective = build("cmli", top_fraction=0.5, dim=0).eval()
    bare = replace(student, image=replace(student.image, cls_attention=None))
    with pytest.raises(UserError, match="--cmli-top-fraction: this student has no attention"):
        objective(bare, None, batch)
    image = torch.rand(student.image.tokens.shape[:2])
    text = torch.rand(student.text.tokens.shape[:2])
    # Attention to the CLS token itself must not shift the places.
    image[:, 0] = text[:, 0] = 9.0
    student = replace(
        student,
        image=replace(student.image, cls_attention=image),
        text=replace(student.text, cls_attention=text),
    )
    out = objective(student, None, batch)
    special = batch.special.clone()
    for row, hidden in enumerate(special):
        words = [i for i in range(len(hidden)) if not hidden[i]]
        for i in sorted(words, key=lambda i: -text[row, i].item())[math.ceil(len(words) / 2) :]:
            hidden[i] = True
    rows = [sorted(range(1, 5), key=lambda i: -image[row, i].item())[:2] for row in range(IMAGES)]
    patches = torch.stack([student.image.tokens[row, [0, *places]] for row, places in enumerate(rows)])
    naive = replace(student, image=ModalityOutput(patches))
    i2t, t2i = naive_cmli(build("cmli", dim=0), naive, replace(batch, special=special))
    torch.testing.assert_close(out.loss, (i2t + t2i) / 2)


def test_accuracy_of_captions_that_repeat_a_patch() -> None:
    torch.manual_seed(0)
    patches = torch.randn(3, 5, SETTING.width).double()
    image = ModalityOutput(torch.cat([torch.zeros(3, 1, SETTING.width).double(), patches], dim=1))
    batch = Batch(torch.arange(3), torch.tensor([2, 0, 1]), torch.zeros(3, 2, dtype=torch.bool))
    objective = build("cmli", dim=0).eval()
    right = objective(StudentOutput(image, ModalityOutput(patches[batch.caption_image, 1:3])), None, batch).metrics
    wrong = objective(StudentOutput(image, ModalityOutput(patches[:, 1:3])), None, batch).metrics
    assert right["t2i_accuracy"] == 100 and wrong["t2i_accuracy"] == 0
    assert right["i2t_accuracy"] == 100 and right["scale"].item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cmli", {"top_fraction": 0.0}, "--cmli-top-fraction 0.0: choose above 0"),
        ("cmli", {"chunk": -1}, "--cmli-chunk -1: choose 0 or more"),
        ("target_cmli", {"dim": 0}, "--target-cmli-dim 0: choose 1 or more"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **options)


def run_part(rows: slice, length: int) -> dict[str, Tensor]:
    """Some images of a case whose last two have shorter captions, cut to `length`."""
    case = make_case(IMAGES)
    case[2].special[IMAGES:, 4:] = True
    student, _, batch = part_of(case, rows)
    text = replace(student.text, tokens=student.text.tokens[:, :length])
    objective = build("cmli", chunk=1).train()
    objective(replace(student, text=text), None, replace(batch, special=batch.special[:, :length])).loss.backward()
    return {name: p.grad for name, p in objective.named_parameters()}


def run_ragged(rank: int, port: int) -> dict[str, Tensor]:
    """Gradients, averaged, of two ranks with two images each; the second one's captions are shorter."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    try:
        gradients = run_part(slice(2 * rank, 2 * rank + 2), 6 - 2 * rank)
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
        return {name: gradient / 2 for name, gradient in gradients.items()}
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_with_captions_of_other_lengths(free_port: int) -> None:
    want = run_part(slice(0, IMAGES), 6)
    # This process is the first rank.
    other = mp.get_context("spawn").Process(target=run_ragged, args=(1, free_port))
    other.start()
    found = run_ragged(0, free_port)
    other.join()
    assert other.exitcode == 0
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-10)


def whitened(patches: Tensor) -> Tensor:
    centered = patches - patches.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("empty", [False, True])
def test_target_cmli_against_naive_reference(empty: bool) -> None:
    student, teacher, batch = make_case(IMAGES)
    batch.special[3] = True
    student, leaves = with_gradients(student)
    objective = build("target_cmli", dim=5, empty_target=empty).train()
    out = objective(student, teacher, batch)
    targets = whitened(teacher.patches) @ objective.projection
    image = student.image.tokens[:, 1:] @ objective.image_projection.weight.T + objective.image_projection.bias
    image_loss = sum((p - t).square().mean() for p, t in zip(image.flatten(0, 1), targets.flatten(0, 1), strict=True))
    image_loss = image_loss / (image.shape[0] * image.shape[1])
    tokens = student.text.tokens @ objective.text_projection.weight.T + objective.text_projection.bias
    losses, shares, similarities = [], [], []
    for row, owner in enumerate(batch.caption_image.tolist()):
        errors, to_empty, alike = [], [], []
        for token in words_of(tokens[row], batch.special[row]):
            candidates = list(targets[owner]) + ([objective.empty] if empty else [])
            cosines = [cosine(token, candidate).item() for candidate in candidates]
            best = cosines.index(max(cosines))
            # The empty target comes to the token, not the token to it.
            moved = token.detach() if best == len(targets[owner]) else token
            errors.append((moved - candidates[best]).square().mean())
            to_empty.append(float(best == len(targets[owner])))
            alike.append(cosines[best])
        count = max(1, len(errors))
        losses.append(sum(errors) / count)
        shares.append(sum(to_empty) / count)
        similarities.append(sum(alike) / count)
    text_loss = sum(losses) / len(losses)
    torch.testing.assert_close(out.loss, (image_loss + text_loss) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.metrics["text_loss"], text_loss.detach())
    torch.testing.assert_close(out.metrics["image_loss"], image_loss.detach())
    assert out.metrics["text_similarity"].item() == pytest.approx(sum(similarities) / len(similarities))
    if empty:
        assert 0 < out.metrics["empty_share"] < 100
        assert out.metrics["empty_share"].item() == pytest.approx(100 * sum(shares) / len(shares))
    ours = gradients_of(objective, leaves, out.loss)
    theirs = gradients_of(objective, leaves, (image_loss + text_loss) / 2)
    assert {"image.tokens", "text.tokens"} <= ours.keys() and ("empty" in ours) == empty
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("empty", [False, True])
def test_neither_side_of_target_cmli_collapses(empty: bool) -> None:
    """Words name one of an image's patches each; a way to no error without looking at them would be found here."""
    objective = build("target_cmli", dim=6, empty_target=empty).float().train()
    generator = torch.Generator().manual_seed(0)
    kinds, special = 8, torch.zeros(16, 4, dtype=torch.bool)
    looks, names = (torch.randn(kinds, width, generator=generator) for width in (SETTING.patch_width, SETTING.width))
    views = torch.nn.Parameter(torch.randn(kinds, SETTING.width, generator=generator))
    words = torch.nn.Parameter(names)
    optimizer = torch.optim.Adam([*objective.parameters(), views, words], lr=1e-2)
    cls = torch.zeros(16, 1, SETTING.width)
    for _ in range(400):
        things = torch.stack([torch.randperm(kinds, generator=generator)[:4] for _ in range(16)])
        noise = 0.1 * torch.randn(16, 4, SETTING.patch_width, generator=generator)
        student = StudentOutput(ModalityOutput(torch.cat([cls, views[things]], dim=1)), ModalityOutput(words[things]))
        batch = Batch(torch.arange(16), torch.arange(16), special)
        out = objective(student, TeacherOutput(cls[:, 0], patches=looks[things] + noise), batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    targets = objective.project_patches(looks[None])[0]
    for projection, learned in ((objective.image_projection, views), (objective.text_projection, words)):
        spread = projection(learned).std(0).mean()
        assert spread > 0.5 * targets.std(0).mean()
    assert out.metrics["image_similarity"] > 0.9
    if empty:
        assert out.metrics["empty_share"] < 50


def test_empty_target_is_matched_where_no_patch_fits() -> None:
    targets = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    matches = match_tokens(torch.tensor([[[5.0, 1.0, 0.0], [0.1, 0.2, 9.0], [0.0, 3.0, 1.0]]]), targets)
    assert matches.rows.tolist() == [[0, 2, 1]]
    assert matches.similarity[0, 0].item() == pytest.approx(5 / math.sqrt(26))


@pytest.mark.parametrize("width, dim", [(12, 5), (5, 12)])
def test_projection_of_the_teacher_is_fixed_and_keeps_scale(width: int, dim: int) -> None:
    projection = random_projection(width, dim).double()
    torch.rand(3)
    assert torch.equal(projection, random_projection(width, dim).double())
    gram = projection.T @ projection if dim <= width else projection @ projection.T
    torch.testing.assert_close(gram, torch.eye(len(gram)).double() * max(1, dim / width), rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    projected = whitened(torch.randn(4000, width).double()) @ projection
    assert projected.square().mean().item() == pytest.approx(1, rel=0.1)
    objective = build("target_cmli")
    assert "projection" in objective.state_dict() and not objective.projection.requires_grad


def test_patch_counts_that_differ_are_named() -> None:
    student, teacher, batch = make_case(IMAGES)
    teacher = replace(teacher, patches=teacher.patches[:, :3])
    with pytest.raises(UserError, match="the student has 4 patches, the teacher 3"):
        build("target_cmli")(student, teacher, batch)


def test_tokens_are_projected_for_retrieval() -> None:
    student, _, batch = make_case(IMAGES)
    objective = build("cmli", dim=3).eval()
    images, texts = objective.image_tokens(student.image), objective.text_tokens(student.text, batch.special)
    assert isinstance(images, Tokens) and images.features.shape == (IMAGES, 4, 3) and not images.special.any()
    scores = late_interaction_scores(images.features, texts.features, texts.special)
    i2t = scores.image_to_text * objective.scale()
    target = (batch.image_ids[:, None] == batch.caption_ids).double()
    want = objective(student, None, batch).metrics["i2t_loss"]
    loss = torch.nn.functional.cross_entropy(i2t, target / target.sum(1, keepdim=True))
    torch.testing.assert_close(loss.detach(), want)

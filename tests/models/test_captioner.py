"""The captioner's merge, loss and generation match transformers and do not depend on padding."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmcap.config import LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator, flat_indices
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.types import Batch, Clip, Sample, Skipped

FRAMES = 2
VISUAL = 8  # 2 frames of 4 patches
LONG = "푸른 바다 위로 아침 해가 천천히 떠오른다."
SHORT = "산이다."


@pytest.fixture
def captioner(siglip_folder: Path, llm_folder: Path) -> VideoCaptioner:
    torch.manual_seed(0)
    encoder = load_encoder(siglip_folder, EncoderOptions(-1, torch.float32)).requires_grad_(False).eval()
    llm = load_language_model(llm_folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu")
    llm = add_lora(llm, LoraConfig(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # as after some training
    prompt = load_prompt(llm_folder, LlmConfig(prompt="설명해 주세요."))
    projector = build_projector(
        MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=32, out_dim=64, grid=(2, 2), num_frames=FRAMES)
    )
    return VideoCaptioner(encoder, projector, llm, prompt, GenerationSettings(max_new_tokens=12)).eval()


def samples() -> list[Sample]:
    frames = torch.randint(
        0, 256, (2, FRAMES, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return [Sample(Clip(str(i), f"{i}.mp4", (text,)), frames=frames[i]) for i, text in enumerate((LONG, SHORT))]


def collate(captioner: VideoCaptioner, items: list[Sample], mode: str = "train") -> Batch:
    return Collator(captioner.prompt, VISUAL, 200, mode=mode)(items)  # type: ignore[arg-type]


def padded_left(batch: Batch, pad_id: int, width: int) -> Batch:
    """Returns the batch with `width` positions of left padding."""

    def pad(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (width, 0), value=value)

    return dataclasses.replace(
        batch,
        input_ids=pad(batch.input_ids, pad_id),
        attention_mask=pad(batch.attention_mask, 0),
        **flat_indices(pad(batch.visual_mask, 0), None),
    )


@torch.no_grad()
def test_visual_tokens_stand_at_their_places(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples())
    assert batch.frames is not None
    embeddings = captioner.embed(batch)
    visual = captioner.projector(captioner.encode(batch))
    first = len(captioner.prompt.prefix_ids)
    for row in range(2):
        torch.testing.assert_close(embeddings[row, first : first + VISUAL], visual[row])
    words = base_model(captioner.llm).get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
    torch.testing.assert_close(embeddings[~batch.visual_mask], words[~batch.visual_mask], atol=0, rtol=0)
    assert embeddings.shape == (*batch.input_ids.shape, 64)


@torch.no_grad()
def test_the_merge_goes_by_mask_wherever_the_padding_is(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples()[:1], "generate")
    padded = padded_left(batch, captioner.prompt.pad_id, 5)
    torch.testing.assert_close(captioner.embed(padded)[:, 5:], captioner.embed(batch))


def test_features_of_the_cache_give_what_frames_give(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples())
    assert batch.frames is not None
    cached = dataclasses.replace(batch, frames=None, features=captioner.encode(batch))
    assert captioner(cached)[0].item() == pytest.approx(captioner(batch)[0].item(), rel=1e-6)
    captioner.encoder = None
    captioner(cached)
    with pytest.raises(AssertionError, match="encoder was not loaded"):
        captioner(batch)


def test_a_wrong_number_of_placeholders_is_caught(captioner: VideoCaptioner) -> None:
    batch = Collator(captioner.prompt, VISUAL - 1, 200)(samples())
    with pytest.raises(AssertionError, match="differ in number"):
        captioner(batch)


def test_loss_and_gradients_are_those_of_full_logits(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples())
    weights = [p for p in captioner.parameters() if p.requires_grad]
    loss, count = captioner(batch)
    gradients = torch.autograd.grad(loss, weights)
    output = captioner.llm(
        inputs_embeds=captioner.embed(batch), attention_mask=batch.attention_mask, labels=batch.labels
    )
    assert count == batch.num_label_tokens
    assert (loss / count).item() == pytest.approx(output.loss.item(), rel=1e-6)
    expected = torch.autograd.grad(output.loss * count, weights)
    assert len(weights) > 10
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_loss_has_the_scale_that_the_class_gives_its_logits(captioner: VideoCaptioner) -> None:
    """HyperCLOVA X scales the output of the head.

    Without it, training would see logits several times those that captions are decoded from.
    """
    from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = HyperCLOVAXConfig(
        vocab_size=len(captioner.prompt.tokenizer), logits_scaling=0.125, initializer_range=0.5, **sizes
    )
    captioner.llm = HyperCLOVAXForCausalLM(config).eval()
    batch = collate(captioner, samples())
    loss, count = captioner(batch)
    output = captioner.llm(
        inputs_embeds=captioner.embed(batch), attention_mask=batch.attention_mask, labels=batch.labels
    )
    assert (loss / count).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_the_head_sees_label_positions_only(captioner: VideoCaptioner) -> None:
    batch, seen = collate(captioner, samples()), []
    base_model(captioner.llm).lm_head.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape)
    )  # type: ignore[union-attr,operator]
    captioner(batch)
    assert seen == [(batch.num_label_tokens, 64)]


@torch.no_grad()
def test_loss_of_two_is_that_of_one_and_one(captioner: VideoCaptioner) -> None:
    both, counts = captioner(collate(captioner, samples()))
    single = [captioner(collate(captioner, [item])) for item in samples()]
    assert both.item() == pytest.approx(sum(loss.item() for loss, _ in single), rel=1e-5)
    assert counts == sum(count for _, count in single)
    assert single[0][1] != single[1][1]  # or nothing was padded


def test_captions_of_two_are_those_of_one_and_one(captioner: VideoCaptioner) -> None:
    both = captioner.generate(collate(captioner, samples(), "generate"))
    assert both == [captioner.generate(collate(captioner, [item], "generate"))[0] for item in samples()]
    assert both[0] != both[1]  # it depends on the video


def test_captions_do_not_depend_on_left_padding(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples(), "generate")
    assert captioner.generate(padded_left(batch, captioner.prompt.pad_id, 7)) == captioner.generate(batch)


def test_captions_are_greedy_whatever_the_checkpoint_says(captioner: VideoCaptioner) -> None:
    """Qwen3's generation settings enable sampling, like those of the fixture."""
    batch = collate(captioner, samples()[:1], "generate")
    ids: list[int] = []
    embeddings = captioner.embed(batch)
    table = base_model(captioner.llm).get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(captioner.llm(inputs_embeds=embeddings).logits[0, -1].argmax()))
            if ids[-1] in captioner.prompt.stop_ids:
                break
            embeddings = torch.cat([embeddings, table(torch.tensor([[ids[-1]]]))], dim=1)
    assert captioner.generate(batch) == captioner.prompt.decode([ids])


def with_next_tokens(captioner: VideoCaptioner, tokens: list[int]) -> None:
    """Makes the head predict `tokens` one after another, and then the last one forever."""
    said = iter(tokens)
    last = tokens[-1]

    def speak(_module: object, _inputs: object, logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, -100.0)
        forced[..., next(said, last)] = 100.0
        return forced

    base_model(captioner.llm).lm_head.register_forward_hook(speak)  # type: ignore[union-attr,operator]


def test_generation_stops_at_the_end_token(captioner: VideoCaptioner) -> None:
    prompt = captioner.prompt
    caption = prompt.encode_caption("산이다.")
    assert len(caption) < 10
    for end in prompt.stop_ids:
        with_next_tokens(captioner, [*caption, end, *prompt.encode_caption("더 있다")])
        assert captioner.generate(collate(captioner, samples()[:1], "generate")) == ["산이다."]
        base_model(captioner.llm).lm_head._forward_hooks.clear()  # type: ignore[union-attr,operator]


def test_generation_stops_at_max_new_tokens(captioner: VideoCaptioner) -> None:
    letter = captioner.prompt.encode_caption("a")
    with_next_tokens(captioner, letter)
    assert captioner.generate(collate(captioner, samples()[:1], "generate")) == ["a" * 12]


def test_training_moves_projector_and_adapters_and_nothing_else(captioner: VideoCaptioner) -> None:
    frozen = {name: p.detach().clone() for name, p in captioner.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in captioner.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert {name.split(".")[0] for name in frozen} == {"encoder", "llm"}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss, count = captioner(collate(captioner, samples()))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(captioner.named_parameters())
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
    assert all(not torch.equal(before[name], now[name]) for name in before)


def test_files_come_back_in_order_with_the_unreadable_named(captioner: VideoCaptioner) -> None:
    paths = [Path("0.mp4"), Path("bad.mp4"), Path("1.mp4")]
    clips = [
        dataclasses.replace(item, clip=dataclasses.replace(item.clip, id=name))
        for item, name in zip(samples(), "02", strict=True)
    ]
    skipped = Skipped(Clip("1", str(paths[1]), ()), "it is empty")
    batch = Collator(captioner.prompt, VISUAL, 200, mode="generate")([clips[0], skipped, clips[1]])
    empty = Collator(captioner.prompt, VISUAL, 200, mode="generate")([skipped])
    captioner.reader = lambda _paths, _batch_size: [batch]
    found = list(captioner.caption_files(paths))
    assert [path for path, _ in found] == paths
    assert found[1][1] == skipped
    assert [found[0][1], found[2][1]] == captioner.generate(batch)
    with pytest.raises(UserError, match=r"bad\.mp4 could not be read: it is empty"):
        captioner.caption(paths)
    captioner.reader = lambda _paths, _batch_size: [empty]
    assert [caption for _, caption in captioner.caption_files(paths)] == [skipped]


def test_the_captioner_is_imported_without_transformers() -> None:
    code = "import sys, vlmcap.models.captioner; print('transformers' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False", "True"]

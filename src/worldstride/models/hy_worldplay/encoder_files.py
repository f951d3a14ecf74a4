"""Where HY-WorldPlay's text and image encoders lie, and reading them through `transformers`.

Of the 8B models' encoders two layouts are read, each in either: the one that tencent/HunyuanVideo-1.5 documents for its
downloads, and that of its conversion for diffusers. The names of Glyph's tensors and tokens are those that public
converters of its file use; the published files themselves have not been at hand, so what does not fit exactly is
refused. The WAN-5B variant's, which is Matrix-Game-3.0's, too, lies as Wan-AI publishes it for diffusers, or in
Wan's own file as Skywork publishes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldstride.errors import CheckpointError, MissingDependencyError
from worldstride.models.shards import check_fit, find, read_json
from worldstride.models.wan import umt5

Encoder = Literal["language model", "glyph encoder", "image encoder", "text encoder of Wan"]

_INDEX = ("model.safetensors.index.json", "model.safetensors")
_CONVERTED = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"
_QWEN, _BYT5, _REDUX = "Qwen/Qwen2.5-VL-7B-Instruct", "google/byt5-small", "black-forest-labs/FLUX.1-Redux-dev (gated)"
WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
"""Repository of what the WAN-5B variant shares with Wan2.2."""
_SKYWORK = "Skywork/Matrix-Game-3.0"
_GLYPH = "AI-ModelScope/Glyph-SDXL-v2 (on ModelScope)"
_COLOURS, _FONTS = "assets/color_idx.json", "assets/multilingual_10-lang_idx.json"
_GLYPH_WEIGHTS, _TOWER = "checkpoints/byt5_model.pt", "module.text_tower.encoder."


@dataclass(frozen=True)
class Place:
    """A folder that an encoder is read from."""

    folder: str
    """Its name; none for the folder that all lie in."""
    files: tuple[str, ...]
    """Files that have to be in it."""
    origin: str
    """Repository that it comes from."""
    weights: bool = False
    """Whether weights have to be in it, too: one safetensors file, or several with an index."""

    def lacks(self, root: Path) -> list[str]:
        """What of it is not there, by names below `root`."""
        folder = root / self.folder
        absent = [file for file in self.files if not (folder / file).is_file()]
        if self.weights and not find(folder, _INDEX):
            absent.append(" or ".join(_INDEX))
        return [(Path(self.folder) / file).as_posix() for file in absent]


_LAYOUTS: dict[Encoder, tuple[tuple[Place, ...], ...]] = {
    "language model": (
        (Place("text_encoder/llm", ("config.json", "tokenizer_config.json"), _QWEN, weights=True),),
        (
            Place("text_encoder", ("config.json",), _CONVERTED, weights=True),
            Place("tokenizer", ("tokenizer_config.json",), _CONVERTED),
        ),
    ),
    "glyph encoder": (
        (
            Place("text_encoder/byt5-small", ("config.json", "tokenizer_config.json"), _BYT5),
            Place("text_encoder/Glyph-SDXL-v2", (_COLOURS, _FONTS, _GLYPH_WEIGHTS), _GLYPH),
        ),
        (
            Place("text_encoder_2", ("config.json",), _CONVERTED, weights=True),
            Place("tokenizer_2", ("tokenizer_config.json",), _CONVERTED),
        ),
    ),
    "image encoder": (
        (
            Place("vision_encoder/siglip/image_encoder", ("config.json",), _REDUX, weights=True),
            Place("vision_encoder/siglip/feature_extractor", ("preprocessor_config.json",), _REDUX),
        ),
        (
            Place("image_encoder", ("config.json",), _CONVERTED, weights=True),
            Place("feature_extractor", ("preprocessor_config.json",), _CONVERTED),
        ),
    ),
    "text encoder of Wan": (
        (
            Place("text_encoder", ("config.json",), WAN, weights=True),
            Place("tokenizer", ("tokenizer_config.json",), WAN),
        ),
        (
            Place("", (umt5.FILE,), _SKYWORK),
            Place(umt5.TOKENIZER, ("tokenizer_config.json",), _SKYWORK),
        ),
    ),
}


def find_encoder(path: Path, encoder: Encoder) -> list[Path]:
    """Folders of an encoder below `path`, in the order of its layout; nothing is loaded.

    Of several layouts the first that is complete. Raises `CheckpointError` that names what is missing and the
    repository it comes from.
    """
    layouts = _LAYOUTS[encoder]
    # `text_encoder` is there in both layouts, so a file has to tell
    begun = [layout for layout in layouts if any((path / p.folder / f).is_file() for p in layout for f in p.files)]
    if not begun:
        ways = (
            " and ".join(
                f"{' and '.join(p.folder or ', '.join(p.files) for p in places)} from {origin}"
                for origin, places in groupby(layout, lambda p: p.origin)
            )
            for layout in layouts
        )
        raise CheckpointError(f"{path} has no {encoder}: it needs {', or '.join(ways)}")
    lacking = list[str]()
    for layout in begun:
        first = next(((absent, place) for place in layout if (absent := place.lacks(path))), None)
        if first is None:
            return [path / place.folder for place in layout]
        lacking.append(f"{', '.join(first[0])}; it comes from {first[1].origin}")
    raise CheckpointError(f"the {encoder} in {path} lacks {', or else '.join(lacking)}")


def libraries() -> tuple[Any, Any]:
    """The modules `transformers` and `diffusers`; `MissingDependencyError` where one is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"encoding prompts needs transformers and diffusers ({error}): pip install 'worldstride[encoders]'"
        ) from error
    return transformers, diffusers


def language_model(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Qwen2.5-VL's language model, without the part that sees, and its tokenizer."""
    transformers, _ = libraries()
    folders = find_encoder(path, "language model")
    folder = folders[0]
    if read_json(folder / "config.json").get("model_type") == "qwen2_5_vl":
        model = _read(transformers.Qwen2_5_VLModel, folder, dtype, idle=("lm_head.weight",)).language_model
    else:
        model = _read(transformers.Qwen2_5_VLTextModel, folder, dtype)
    tokenizer = _read_entry(transformers.AutoTokenizer, folders[-1])
    if not tokenizer.chat_template:
        raise CheckpointError(f"{folders[-1]}: the tokenizer has no chat template; take it from {_QWEN}")
    return model, tokenizer


def glyph_encoder(path: Path) -> tuple[nn.Module, Any]:
    """ByT5's encoder with Glyph's weights, in float32, and its tokenizer."""
    transformers, _ = libraries()
    first, second = find_encoder(path, "glyph encoder")
    if (second / "tokenizer_config.json").is_file():
        model = _read(transformers.T5EncoderModel, first, torch.float32)
        return model, _read_entry(transformers.ByT5Tokenizer, second)
    tokenizer = _read_entry(transformers.ByT5Tokenizer, first)
    colours, fonts = (read_json(second / name) for name in (_COLOURS, _FONTS))
    made = [f"<color-{i}>" for i in range(len(colours))]
    made += [f"<{name[:2]}-font-{number}>" for name, number in fonts.items()]  # a name begins with its language
    tokenizer.add_tokens(made, special_tokens=True)
    # everything that the encoder holds is in Glyph's file: ByT5's own weights are not needed
    config = transformers.T5Config.from_dict({**read_json(first / "config.json"), "vocab_size": len(tokenizer)})
    model = transformers.T5EncoderModel(config).float().eval()
    file = second / _GLYPH_WEIGHTS
    tensors = _glyph_tensors(file)
    check_fit(model.encoder, tensors, file, f"{_BYT5} with {len(made)} tokens for colours and fonts")
    model.encoder.load_state_dict(tensors)
    return model, tokenizer


def image_encoder(path: Path) -> tuple[nn.Module, Any]:
    """SigLIP's vision model, in float32, and its image processor."""
    transformers, _ = libraries()
    first, second = find_encoder(path, "image encoder")
    # Pillow's resizing, which models were trained with, whether or not torchvision is there with a resizing of its own
    processor = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    return _read(transformers.SiglipVisionModel, first, torch.float32), _read_entry(processor, second)


def wan_text_encoder(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """umT5's encoder on a device, and its tokenizer."""
    transformers, _ = libraries()
    first, second = find_encoder(path, "text encoder of Wan")
    tokenizer = _read_entry(transformers.AutoTokenizer, second)
    if (first / umt5.FILE).is_file():
        return umt5.read(transformers, first / umt5.FILE, device, dtype), tokenizer
    return _read(transformers.UMT5EncoderModel, first, dtype).to(device), tokenizer


def _glyph_tensors(file: Path) -> Mapping[str, Tensor]:
    """The encoder's tensors of a file of Glyph: bare, or inside the state of what was trained."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways inside the parser, all mean the same
        raise CheckpointError(f"cannot read tensors from {file}: {error}") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
        raise CheckpointError(f"{file} must hold named tensors, as {_GLYPH} publishes it")
    return {k.removeprefix(_TOWER): t for k, t in held.items() if k.startswith(_TOWER)} or held


def _read(kind: Any, folder: Path, dtype: torch.dtype, idle: Iterable[str] = ()) -> Any:
    """A model of `transformers`; `CheckpointError` where a tensor is missing or foreign, but for those in `idle`."""
    try:
        model, told = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:  # a damaged file fails in many ways inside the library, all mean the same
        raise CheckpointError(f"transformers cannot read {folder}: {error}") from error
    for what, names in (("lack", told["missing_keys"]), ("hold unknown", told["unexpected_keys"])):
        if wrong := sorted(set(names) - set(idle)):
            raise CheckpointError(
                f"{folder}: its weights {what} {len(wrong)} tensors of a {kind.__name__}; first {wrong[0]!r}"
            )
    return model.eval()


def _read_entry(kind: Any, folder: Path) -> Any:
    """A tokenizer, which pads behind a text, or an image processor, of `transformers`."""
    try:
        made = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read {folder}: {error}") from error
    if hasattr(made, "padding_side"):
        made.padding_side = "right"
    return made

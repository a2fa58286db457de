"""A checkpoint -> a model folder that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moelm.hub.folder import INDEX, SOURCE_CONFIG, read_json
from moelm.hub.models import architecture_of, write_config
from moelm.hub.reading import transformers
from moelm.hub.streaming import ShardWriter, Written, by_layer, cast, empty_state
from moelm.hub.tokenizer_files import special_ids, write_tokenizer
from moelm.training.checkpoint_io import (
    find_checkpoint,
    has_file,
    load_checkpoint_config,
    tokenizer_file,
    weight_files,
)
from moelm.training.weight_files import CheckpointError, TensorFiles


class Export:
    """The constructor finds out whether it can be done, without reading a tensor. Raises UserError."""

    def __init__(self, checkpoint: Path, dtype: str = "auto") -> None:
        self.step = find_checkpoint(checkpoint)
        self.dtype = dtype
        self.config = load_checkpoint_config(self.step)
        self.architecture, self.hf = write_config(self.config.model)
        self.tensors = TensorFiles(weight_files(self.step))
        self.empty, self.state = empty_state(self.config.model)
        if self.tensors.shapes != {name: tuple(tensor.shape) for name, tensor in self.empty.items()}:
            raise CheckpointError(f"{self.step}: the weights do not fit its config.yaml")
        self.ids: dict[str, int] | None = None
        if has_file(self.step, "tokenizer.json"):
            self.ids = special_ids(tokenizer_file(self.step), self.config.data.corpus.tokenizer)
        self.left_out = sorted(name for name in self.tensors if self.architecture.left_out(name))

    def write(self, out: Path, name: str) -> Written:
        """Fill the empty folder `out`. Raises UserError."""
        shards = ShardWriter(out)
        for weight in by_layer(self.architecture.weights(self.config.model, fused=False), "converting"):
            is_state = weight.ours[0] in self.state
            for their_name, tensor in weight.to_theirs(self.tensors).items():
                shards.add(their_name, cast(tensor, weight.ours[0], self.dtype, is_state))
        shards.flush()
        _name_files(out, shards)
        notes, longest = [], self.longest_text()
        hf = self.hf | {self.architecture.length_key: longest}
        if self.ids is None:
            notes.append("no tokenizer.json in the checkpoint: none is written")
        else:
            write_tokenizer(tokenizer_file(self.step), out, self.config.data.corpus.tokenizer, longest)
            hf |= self.ids
            _write_json(out / "generation_config.json", {"do_sample": False, **self.ids, **_version()})
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in shards.dtypes)
        hf["dtype"] = "bfloat16" if "bfloat16" in dtypes else "float32"
        _write_json(out / "config.json", hf | _version())
        if self.left_out:
            notes.append(f"left out: {len(self.left_out)} tensors that only training needs, such as {self.left_out[0]}")
        return Written(self.architecture.model_type, shards.n_elements, shards.n_bytes, dtypes, notes)

    def longest_text(self) -> int:
        """What the config.json of an imported model said; else what the model was trained on, or what its RoPE was
        stretched to."""
        if has_file(self.step, SOURCE_CONFIG):
            source = read_json(self.step / SOURCE_CONFIG)
            if length := architecture_of(source).longest_text(source):
                return length
        stretched: int = self.hf.get(self.architecture.length_key, 0)
        return max(self.config.data.seq_len, stretched)


def _name_files(out: Path, shards: ShardWriter) -> None:
    """As transformers names them, now that their number is known; an index if there are several."""
    n = len(shards.files)
    names = {file: f"model-{i:05d}-of-{n:05d}.safetensors" for i, file in enumerate(shards.files, 1)}
    if n == 1:
        names = dict.fromkeys(names, "model.safetensors")
    for file, name in names.items():
        file.rename(out / name)
    if n > 1:
        weight_map = {name: names[file] for name, file in shards.file_of.items()}
        _write_json(out / INDEX, {"metadata": {"total_size": shards.n_bytes}, "weight_map": weight_map})


def _version() -> dict[str, str]:
    return {"transformers_version": transformers().__version__}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""A model folder of transformers -> a checkpoint that holds weights only."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moelm.config import Config, DataConfig, OptimConfig, RunConfig, to_yaml
from moelm.hub.folder import SOURCE_CONFIG, ModelFolder
from moelm.hub.reading import HubError
from moelm.hub.streaming import ShardWriter, Written, by_layer, cast, empty_state
from moelm.hub.tokenizer_files import left_behind, read_special_tokens
from moelm.training.checkpoint_io import write_manifest

MAX_SEQ_LEN = 4096  # what the model is evaluated with, unless the config is changed


class Import:
    """The constructor finds out whether it can be done, without reading a tensor (but for the two copies of a tied
    table). Raises UserError."""

    def __init__(self, model: Path, dtype: str = "auto") -> None:
        self.folder = ModelFolder(model)
        self.dtype = dtype
        self.weights = self.folder.weights()
        self.empty, self.state = empty_state(self.folder.config)
        self.tokenizer = read_special_tokens(model, self.folder.hf, self.folder.config.vocab_size)

    def write(self, out: Path, name: str) -> Written:
        """Fill the empty folder `out`; `name` becomes run.name. Raises UserError."""
        shards = ShardWriter(out)
        for weight in by_layer(self.weights, "converting"):
            try:
                ours = weight.to_ours(self.folder.tensors)
            except (RuntimeError, ValueError, IndexError) as error:  # torch's, of shapes that do not go together
                raise HubError(f"{self.folder.path}: {weight.theirs[0]} has no right shape", [str(error)]) from None
            for ours_name, tensor in ours.items():
                if tensor.shape != self.empty[ours_name].shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(self.empty[ours_name].shape)}"
                    raise HubError(f"{self.folder.path}: {weight.theirs[0]} makes {ours_name} {shapes}", [])
                shards.add(ours_name, cast(tensor, weight.theirs[0], self.dtype, ours_name in self.state))
        shards.flush()
        (out / "config.yaml").write_text(to_yaml(self.config(name)), encoding="utf-8")
        shutil.copyfile(self.folder.path / "config.json", out / SOURCE_CONFIG)
        if (self.folder.path / "tokenizer.json").is_file():
            shutil.copyfile(self.folder.path / "tokenizer.json", out / "tokenizer.json")
        write_manifest(out, step=0)
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in shards.dtypes)
        notes = left_behind(self.folder.path, self.folder.hf, self.tokenizer)
        if ignored := self.folder.ignored:
            notes.append(f"left out: {len(ignored)} tensors that are none of the model, such as {ignored[0]}")
        return Written(self.folder.architecture.model_type, shards.n_elements, shards.n_bytes, dtypes, notes)

    def config(self, name: str) -> Config:
        """A whole config whose model is the imported one. Data and optimizer are no more than a beginning."""
        longest = self.folder.architecture.longest_text(self.folder.hf)
        seq_len = min(longest or MAX_SEQ_LEN, MAX_SEQ_LEN)
        config = Config(
            run=RunConfig(name=re.sub(r"^[^\w]+|[^\w.+-]", "-", name).lstrip("-")[:80] or None),
            model=self.folder.config,
            data=DataConfig(seq_len=seq_len),
            optim=OptimConfig(
                micro_batch_size=1, batch_tokens=seq_len * max(1, round(OptimConfig().batch_tokens / seq_len))
            ),
        )
        config.data.corpus.tokenizer = self.tokenizer
        return config

"""A model folder as transformers writes it: config.json and safetensors, read without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moelm.config import ModelConfig
from moelm.data.token_shards import read_json as read_any_json
from moelm.hub.base import Architecture
from moelm.hub.models import architecture_of, find_weights
from moelm.hub.reading import HubError
from moelm.hub.weights import Weight
from moelm.training.weight_files import TensorFiles

INDEX = "model.safetensors.index.json"
SOURCE_CONFIG = "source_config.json"  # in an imported checkpoint: the config.json that it was made from
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelFolder:
    """What a folder says it is. The constructor reads the config and the headers of the weights, and raises HubError or
    CheckpointError for anything that is missing, damaged or not understood."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise HubError(f"{path}: no such folder", ["give a folder with config.json and *.safetensors"])
        self.hf = read_json(path / "config.json")
        self.architecture: Architecture = architecture_of(self.hf)
        self.config: ModelConfig = self.architecture.read_config(self.hf)
        self.n_prediction_layers = self.architecture.n_prediction_layers(self.hf)
        self.tensors = TensorFiles(self._weight_files())
        self._check_index()

    def _weight_files(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            names = sorted(set(self._weight_map().values()))
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise HubError(f"{self.path / INDEX} names {name!r}", ["it is no safetensors file of the folder"])
            return [self.path / name for name in names]
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        pickles = sorted(file.name for pattern in PICKLES for file in self.path.glob(pattern))
        reasons = [f"{name} is a pickle, which can run code: it is not opened" for name in pickles]
        raise HubError(f"{self.path}: no model.safetensors and no {INDEX}; safetensors only", reasons)

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise HubError(f"{self.path / INDEX} has no weight_map from tensors to files", [])
        return weight_map

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        said, found = self._weight_map(), {name: file.name for name, file in self.tensors.file_of.items()}
        wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
        reasons = [f"{name}: the index says {said.get(name)}, it is in {found.get(name)}" for name in wrong]
        if reasons:
            raise HubError(f"{self.path / INDEX} is not the index of the files beside it", reasons)

    @property
    def ignored(self) -> list[str]:
        """Tensors that are none of the model: see `Architecture.ignored`."""
        n = self.n_prediction_layers
        return sorted(name for name in self.tensors if self.architecture.ignored(name, self.config, n))

    def weights(self) -> list[Weight]:
        """See `find_weights`."""
        return find_weights(self.architecture, self.config, self.tensors, self.n_prediction_layers)


def read_json(file: Path) -> dict[str, Any]:
    """Raises HubError for anything but a mapping."""
    try:
        loaded = read_any_json(file)
    except FileNotFoundError:
        raise HubError(f"{file}: missing", []) from None
    except (OSError, ValueError) as error:
        raise HubError(f"{file}: cannot be read: {error}", []) from None
    if not isinstance(loaded, dict):
        raise HubError(f"{file}: not a mapping", [])
    return loaded

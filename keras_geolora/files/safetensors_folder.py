"""The tensors of a Hugging Face folder, read and written one by one."""

import json
import pathlib
import struct

import numpy as np

from keras_geolora.files.adapter_format import CONTRADICTIONS, AdapterFileError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}
DTYPES |= {"BF16": "bfloat16"}
CHUNK = 1 << 24


class SafetensorsFolder:
    """A folder with `model.safetensors`, or with several files and an index.

    Args:
        folder: Path.

    Attributes:
        entries: Dict from the name of a tensor to its entry in a header, with
            `dtype`, `shape` and `data_offsets`.
        index: Dict, the content of the index, or `None`.

    Raises:
        FileNotFoundError: If a file is missing.
        AdapterFileError: If a file is damaged.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.index = self._read_index()
        if self.index is None:
            names = [ONE]
        else:
            names = sorted(set(self.index["weight_map"].values()))
        self._headers, self._starts, self._file_of = {}, {}, {}
        for name in names:
            self._read_header(name)
        self.entries = {
            key: entry
            for header in self._headers.values()
            for key, entry in header.items()
            if key != "__metadata__"
        }

    def _read_index(self):
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            index = json.loads(path.read_text())
            names = set(index["weight_map"].values())
            if any(pathlib.PurePath(name).name != name for name in names):
                raise ValueError("a path")
        except CONTRADICTIONS as error:
            raise AdapterFileError(
                f"'{path}' is not an index of safetensors files: {error}."
            ) from error
        return index

    def _read_header(self, name):
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file '{path}'. The base must be a folder with "
                f"'{ONE}', or with '{INDEX}' and what it lists."
            )
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    raise ValueError("cut off")
                header = json.loads(file.read(length))
            for key, entry in header.items():
                if key != "__metadata__":
                    self._file_of[key] = name
                    if entry["data_offsets"][1] > size - 8 - length:
                        raise ValueError("cut off")
        except (*CONTRADICTIONS, struct.error) as error:
            raise AdapterFileError(
                f"'{path}' is damaged, or not a safetensors file: {error}."
            ) from error
        self._headers[name], self._starts[name] = header, 8 + length

    def named(self, ending):
        """Returns the names that are this one, or end with it after a dot."""
        dotted = f".{ending}"
        return [x for x in self.entries if x == ending or x.endswith(dotted)]

    def shape(self, key):
        """Returns the shape of a tensor."""
        return tuple(self.entries[key]["shape"])

    def dtype(self, key):
        """Returns the name of a floating-point dtype, or `None`."""
        return DTYPES.get(self.entries[key]["dtype"])

    def read(self, key):
        """Returns a floating-point tensor as an array."""
        dtype = np.dtype(self.dtype(key))
        data = b"".join(self._chunks(key))
        return np.frombuffer(data, dtype).reshape(self.shape(key))

    def _chunks(self, key):
        """Yields the bytes of a tensor."""
        name = self._file_of[key]
        begin, end = self.entries[key]["data_offsets"]
        with open(self.folder / name, "rb") as file:
            file.seek(self._starts[name] + begin)
            while begin < end:
                yield file.read(min(CHUNK, end - begin))
                begin += CHUNK

    def files(self, change, added):
        """Returns a dict from name to the parts of a file.

        Args:
            change: Function from the name of a tensor to its new value, an
                array of the same shape and dtype, or `None`.
            added: Dict from name to array, of new tensors.
        """
        last = list(self._headers)[-1]
        files = {
            name: self._parts(name, change, added if name == last else {})
            for name in self._headers
        }
        if self.index is not None:
            index = json.loads(json.dumps(self.index))
            index["weight_map"] |= dict.fromkeys(added, last)
            sizes = index.get("metadata", {})
            if "total_size" in sizes:
                sizes["total_size"] += sum(x.nbytes for x in added.values())
            files[INDEX] = [json.dumps(index, indent=2).encode()]
        return files

    def _parts(self, name, change, added):
        """Yields the parts of a file, tensor by tensor."""
        header = dict(self._headers[name])
        keys = [key for key in header if key != "__metadata__"]
        keys.sort(key=lambda key: header[key]["data_offsets"])
        end = header[keys[-1]]["data_offsets"][1] if keys else 0
        kinds = {dtype: kind for kind, dtype in DTYPES.items()}
        for key, value in added.items():
            header[key] = {
                "dtype": kinds[str(value.dtype)],
                "shape": list(value.shape),
                "data_offsets": [end, end + value.nbytes],
            }
            end += value.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield struct.pack("<Q", len(text)) + text
        for key in keys:
            value = change(key)
            if value is None:
                yield from self._chunks(key)
            else:
                yield np.ascontiguousarray(value).tobytes()
        for value in added.values():
            yield np.ascontiguousarray(value).tobytes()

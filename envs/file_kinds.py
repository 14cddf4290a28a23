"""Recognition of files that are not .npz, by their first bytes and then by their names, with advice on conversion."""

import zipfile
from pathlib import Path

_SAVE = "np.savez('data.npz', observations=..., actions=..., rewards=..., terminals=...)"
_MINARI = "put it into Minari's local store (~/.minari/datasets/<id>), and give --env_name=minari:<id>"
_MAGIC = {
    b"\x89HDF\r\n\x1a\n": ("HDF5", f"read its arrays with h5py (file['observations'][:], ...) and save them: {_SAVE}"),
    b"PAR1": ("parquet", f"read its columns with pandas.read_parquet and save them as arrays: {_SAVE}"),
    b"\x93NUMPY": (
        "one array or pickled object of np.save",
        f"np.load(path, allow_pickle=True) reads it; save its arrays by name: {_SAVE}",
    ),
    b"\x1f\x8b": ("a gzip archive", "unpack it, and give the .npz file in it"),
    b"BZh": ("a bzip2 archive", "unpack it, and give the .npz file in it"),
    b"\xfd7zXZ": ("an xz archive", "unpack it, and give the .npz file in it"),
    b"\x28\xb5\x2f\xfd": ("a zstandard archive", "unpack it, and give the .npz file in it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it, and give the .npz file in it"),
    b"MATLAB": ("MATLAB", f"read its arrays with scipy.io.loadmat and save them: {_SAVE}"),
    b"version https://git-lfs": ("a pointer of Git LFS", "get the file itself: git lfs pull"),
    **{
        b"\x80" + bytes([protocol]): ("a pickle", f"load it with pickle or torch.load and save its arrays: {_SAVE}")
        for protocol in range(2, 6)
    },
}
_TEXTS = {
    ".json": ("JSON", f"read its arrays with json.load and save them as arrays: {_SAVE}"),
    ".jsonl": ("lines of JSON", f"read them with json.loads and save their columns as arrays: {_SAVE}"),
    ".csv": ("a table of text", f"read its columns with np.genfromtxt and save them as arrays: {_SAVE}"),
    ".html": ("a web page", "what was downloaded is a page, not the file; download it by its direct address"),
    "": ("text", f"save the arrays as numbers: {_SAVE}"),
}
_SUFFIXES = {  # Kinds by name, if the bytes are not conclusive.
    (".h5", ".hdf5"): ("HDF5 by name, and damaged", "get it again, or name another file"),
    (".pkl", ".pickle", ".pt", ".pth"): ("a pickle by name", f"load it and save its arrays: {_SAVE}"),
    (".tfrecord",): ("TFRecord", f"read its episodes with tensorflow_datasets and save their arrays: {_SAVE}"),
    (".safetensors",): ("safetensors", f"read its arrays with safetensors.numpy and save them: {_SAVE}"),
    (".tar",): ("a tar archive", "unpack it, and give the .npz file in it"),
}


def other_kind(path: Path) -> str | None:
    """Returns the kind of a file and advice, if it is recognised as something other than an .npz file.

    Returns None for a file that is missing or cannot be read.
    """
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists() and not path.is_file():
            return "a device or pipe; name a file"
        with path.open("rb") as file:
            head = file.read(4096)
        found = _by_content(path, head) if head else ("empty", "get it again, or name another file")
    except OSError:
        return None
    return found and "; ".join(found)


def _folder(path: Path) -> str:
    """Returns the kind of a folder, and advice."""
    if any((path / place).is_file() for place in ("main_data.hdf5", "data/main_data.hdf5", "data/metadata.json")):
        return f"a Minari dataset; {_MINARI}"
    if (path / "meta/info.json").is_file():
        return f"a LeRobotDataset; import it: python -m real.import_rollouts {path} --output=data.npz"
    if any(path.glob("*.npz")):
        return "a folder; name one of its .npz files (shards of one dataset: --ogbench_dataset_dir)"
    return "a folder; name an .npz file"


def _by_content(path: Path, head: bytes) -> tuple[str, str] | None:
    """Returns kind and advice, from the first bytes of a file."""
    if path.name == "main_data.hdf5":
        return "a Minari dataset (HDF5)", _MINARI
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if zipfile.is_zipfile(path):
        return _archive(path)
    named = next((kind for suffixes, kind in _SUFFIXES.items() if path.suffix.lower() in suffixes), None)
    return named or _text(path, head)


def _archive(path: Path) -> tuple[str, str] | None:
    """Returns kind and advice for a zip archive, None for an .npz file."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except zipfile.BadZipFile:
        return None
    if any(name.endswith(".npy") for name in names):
        return None
    if any(name.endswith("data.pkl") for name in names):
        return "a file of torch.save", f"load it with torch.load and save its arrays: {_SAVE}"
    inside = next((name for name in names if name.endswith(".npz")), None)
    advice = f"unpack it, and give {inside}" if inside else f"give a file of np.savez: {_SAVE}"
    return f"a zip archive without arrays ({', '.join(names[:3])[:60] or 'empty'})", advice


def _text(path: Path, head: bytes) -> tuple[str, str] | None:
    """Returns kind and advice for a text file."""
    if b"\0" in head:
        return None
    try:
        text = head.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # Not merely cut within a character.
            return None
        text = head[: error.start].decode("utf-8-sig").strip()
    begin = text[:15].lower()
    if begin.startswith(("<!doctype html", "<html")):
        return _TEXTS[".html"]
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".csv", ".json"):
        return _TEXTS[suffix]
    if text.startswith(("{", "[")):
        return _TEXTS[".json"]
    return _TEXTS[".csv" if suffix in (".tsv", ".txt") or "," in text.split("\n")[0] else ""]

"""Data folders in fairseq's older formats: --dataset-impl raw, lazy and cached."""

from typing import Optional

from fairseq.data.indexed_dataset import IndexedDataset, IndexedRawTextDataset

from .patch import original

#: What `fairseq-preprocess --only-source --dataset-impl raw` appends to the name of a subset.
RAW_SUFFIX = ".None-None"


def infer_dataset_impl(path: str) -> Optional[str]:
    """Replaces `fairseq.data.indexed_dataset.infer_dataset_impl`: "lazy" and "cached" are one format, read lazily."""
    implementation = original("fairseq.data.indexed_dataset:infer_dataset_impl")(path)
    return "lazy" if implementation == "cached" else implementation


def get_indexed_dataset_to_local(path: str) -> str:
    """Replaces `fairseq.data.indexed_dataset.get_indexed_dataset_to_local`: finds raw text under its full name too."""
    path = original("fairseq.data.indexed_dataset:get_indexed_dataset_to_local")(path)
    exists = IndexedDataset.exists(path) or IndexedRawTextDataset.exists(path)
    return path if exists or not IndexedRawTextDataset.exists(path + RAW_SUFFIX) else path + RAW_SUFFIX

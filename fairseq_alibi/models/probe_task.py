"""The task `probe`: a language model learns and predicts the answers in its text, and nothing else."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy
from fairseq import data as datasets
from fairseq import utils
from fairseq.data import BaseWrapperDataset, Dictionary, RightPadDataset, data_utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import II
from torch import Tensor

logger = logging.getLogger(__name__)

#: Beside the subset `train` stands the subset `train.answers`: the same sentences with padding for all but the answers.
ANSWERS = ".answers"


class AnswerTokens(BaseWrapperDataset):
    """The tokens of each sentence that are not padding."""

    def __init__(self, dataset: Any, padding: int) -> None:
        super().__init__(dataset)
        self.padding = padding

    def __getitem__(self, index: int) -> Tensor:
        """(N,) tokens of a sentence."""
        tokens = self.dataset[index]
        return tokens[tokens != self.padding]


@dataclass
class ProbeConfig(LanguageModelingConfig):
    """The options of language modelling."""

    train_subset: str = II("dataset.train_subset")


@register_task("probe", dataclass=ProbeConfig)
class ProbeTask(LanguageModelingTask):
    """Language modelling of what `fairseq-alibi probe make` makes: the loss is that of the answers alone.

    Of several folders, with colons between them, it learns all texts at once.
    """

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """See `FairseqTask.load_dataset`.

        ValueError: a folder is not one of `probe make`, has other words than the first, or texts longer than
        --tokens-per-sample.
        """
        folders = utils.split_paths(self.args.data)
        texts, marked = [], []
        for folder in folders:
            words = os.path.join(folder, "dict.txt")
            if not os.path.isfile(words) or Dictionary.load(words) != self.dictionary:
                remedy = "make both with one --vocabulary, --filler"
                raise ValueError(f"{folder} has other words than {folders[0]}: {remedy}")
            path, options = os.path.join(folder, split), (self.dictionary, self.args.dataset_impl)
            text, answers = (data_utils.load_indexed_dataset(name, *options) for name in (path, path + ANSWERS))
            if text is None or answers is None:
                raise ValueError(f"{path} is no subset of probe data: make the folder with fairseq-alibi probe make")
            longest = int(text.sizes.max())
            if split == self.args.train_subset and longest > self.args.tokens_per_sample:
                raise ValueError(f"{path} has texts of {longest} tokens: pass --tokens-per-sample {longest}")
            texts.append(text)
            marked.append(answers)
        text, answers = datasets.ConcatDataset(texts), datasets.ConcatDataset(marked)
        padding = self.dictionary.pad()
        begun = datasets.RollDataset(text, 1)  # a text begins with the end of a line
        columns = {
            "id": datasets.IdDataset(),
            "net_input": {
                "src_tokens": RightPadDataset(begun, pad_idx=padding),
                "src_lengths": datasets.NumelDataset(text),
            },
            "target": RightPadDataset(answers, pad_idx=padding),
            "nsentences": datasets.NumSamplesDataset(),
            "ntokens": datasets.NumelDataset(AnswerTokens(answers, padding), reduce=True),
        }
        nested = datasets.NestedDictionaryDataset(columns, sizes=[text.sizes])
        with data_utils.numpy_seed(self.args.seed):
            order = numpy.random.permutation(len(text))
        self.datasets[split] = datasets.SortDataset(nested, sort_order=[order, text.sizes])
        logger.info("%s: %d texts; the loss is that of their answers alone", split, len(text))

"""fairseq's models with this project's position methods. Importing this folder registers them with fairseq."""

try:
    import fairseq  # noqa: F401  first, as the end of its import imports this folder too, see `fairseq_alibi.register`
except ImportError as error:
    raise ImportError(
        f"the models need fairseq ({error}): pip install --no-deps fairseq==0.12.2; see also fairseq-alibi doctor"
    ) from error

from . import language_model, masked_model, probe_task, translation  # noqa: F401

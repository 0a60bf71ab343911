"""ALiBi (attention with linear biases) for fairseq: train short, test long.

Where things are:
    positions.py          the bias and the other position methods (pure torch)
    attention.py          attention under a mask that carries the bias, and without any mask (pure torch)
    modules.py            attention and transformer layers for any PyTorch model (pure torch)
    show_bias.py          pictures of the bias
    adaptive.py           adaptive input and softmax, and the loss of targets alone (pure torch)
    decoder.py            the hooks of fairseq's decoder that we override
    encoder.py            the same of its encoder
    language_model.py     the model `alibi_lm`, its options and architectures
    masked_lm.py          the model `alibi_masked_lm`, its options and architectures
    translation.py        the model `alibi_transformer`, from sequence to sequence
    options.py            options that the models have in common
    prompts.py            fairseq's generator, which reads a prompt in one pass
    generate.py           text that continues a prompt: fairseq-alibi generate
    compatibility.py      repairs of fairseq under numpy 2 and torch's safe loader
    training.py           whole checkpoints, restarts, SIGTERM: training that survives
    export_hf.py          checkpoints as folders for transformers, with modeling_alibi.py and tokenization_alibi.py
    import_checkpoint.py  the ALiBi authors' checkpoints as checkpoints of `alibi_lm`
    prepare_data.py       corpora: get, check, tokenize, binarize
    download.py           a file from several sources, resumed and checked
    windows.py            which tokens are scored with which context
    scoring.py            the loss of every token, by windows or as one stream
    evaluate.py           perplexity at many lengths: fairseq-alibi evaluate
    processes.py          several processes on one evaluation, under torchrun
    eval_lm.py            the same through fairseq-eval-lm
    report.py             results to tables and plots
    reproduce.py          all position methods, trained and evaluated alike, on one page
    plan.py               parameters, memory and FLOPs of a run before it starts
    doctor.py             what works of an environment, and the first thing to fix: fairseq-alibi doctor
    inputs.py             checkpoints and data folders, read safely; results.py: result files, written whole
    benchmark.py          speed and memory beside fairseq's own model; benchmark_report.py: its table and plot
    soak.py               a long run that looks for leaks
    startup/              lets fairseq be imported on Python 3.11 and newer, without hydra's old warnings

Importing the package, as `--user-dir fairseq_alibi` does, registers its models with fairseq.
"""

import warnings

__version__ = "0.1.0"

try:
    import fairseq  # noqa: F401
except Exception as error:  # missing, or whatever a broken one raises
    warnings.warn(
        f"fairseq cannot be imported ({error}), so no model is registered (positions and attention work without it). "
        "Get it with: pip install --no-deps fairseq==0.12.2; if it is there: fairseq-alibi doctor",
        stacklevel=2,
    )
else:
    from .models import language_model, masked_model, translation  # noqa: F401
    from .patches import compatibility, training  # noqa: F401

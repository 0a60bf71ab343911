"""The models that fairseq trains: options, decoder, encoder, language model, masked model, translation, generator."""

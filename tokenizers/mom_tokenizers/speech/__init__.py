"""Speech tokenizers, which encode recordings as units and make sound of them again.

units     the tokenizer: finds the nearest centroid of features, or takes a codec's own codes
codecs    Mimi, NeuCodec, X-codec 2 and DAC: codes of recordings, and sound of codes
vocoders  make sound of units that are no codec's; inverse_stft is the one that vocoder_training trains
delay     several codebooks as one row of ids
features  computes the features: log-mel bands, and hidden states of published models
"""

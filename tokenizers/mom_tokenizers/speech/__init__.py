"""Speech tokenizers, which encode recordings as units and, for log-mel units, make sound of them again.

units     the tokenizer: finds the nearest centroid of features, or takes a codec's own codes
features  computes the features: log-mel bands, hidden states of published models, and Mimi's codes
"""

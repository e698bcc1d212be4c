"""Speech tokenizers: recordings become units, and sound again."""

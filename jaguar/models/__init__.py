"""Models and tokenizers: loading, adapters, what is trained, and the errors of the libraries below."""

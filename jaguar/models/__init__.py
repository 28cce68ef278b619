"""Models and tokenizers: loading, adapters, trained parameters, and the errors of the libraries."""
